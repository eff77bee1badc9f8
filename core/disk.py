"""Expected disk space of a run, and the space that is free."""

import dataclasses
import shutil
from pathlib import Path

GB, MB = 1e9, 1e6


@dataclasses.dataclass(frozen=True)
class Files:
    """Files of one kind: how many exist at a time at most, and the bytes of each."""

    count: int
    what: str  # in the singular
    each: int

    def __str__(self) -> str:
        return f"{self.count} {self.what}{'' if self.count == 1 else 's'} of {size(self.each)}"


@dataclasses.dataclass(frozen=True)
class Disk:
    """The files of a run, and the free bytes of their disk."""

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
    """Return the free bytes of the disk of a folder, which need not exist."""
    folder = folder.absolute()
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    return shutil.disk_usage(existing).free


def size(count: float) -> str:
    """Return bytes as ``1.25 GB``, or ``3.1 MB`` below a tenth of a GB."""
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / MB:.1f} MB"
