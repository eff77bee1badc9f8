"""What a run writes and what is free, told before it starts."""

import dataclasses
import shutil
from pathlib import Path

GB, MB = 1e9, 1e6


@dataclasses.dataclass(frozen=True)
class Files:
    """So many files of one kind, at most at one time, of so many bytes each."""

    count: int
    what: str  # in the singular
    each: int

    def __str__(self) -> str:
        return f"{self.count} {self.what}{'' if self.count == 1 else 's'} of {size(self.each)}"


@dataclasses.dataclass(frozen=True)
class Disk:
    """The files of a run, and the bytes that are free where they go."""

    files: tuple[Files, ...]
    free: int

    @property
    def needed(self) -> int:
        return sum(kind.count * kind.each for kind in self.files)

    @property
    def enough(self) -> bool:
        return self.needed < self.free

    def __str__(self) -> str:
        if not self.files:
            return f"next to nothing, {size(self.free)} free"
        kinds = " + ".join(map(str, self.files))
        return f"at most {kinds} = {size(self.needed)}, {size(self.free)} free"


def free_bytes(folder: Path) -> int:
    """Return what is free on the disk that a folder lies on, or will lie on."""
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    return shutil.disk_usage(there).free


def size(count: float) -> str:
    """Return bytes as ``1.25 GB``, or ``3.1 MB`` below a tenth of a GB."""
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / MB:.1f} MB"
