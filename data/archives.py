"""Archives from the net, unpacked so that nothing lands outside its folder or half-way in it."""

import stat
import tarfile
import tempfile
import zipfile
from pathlib import Path

from core.errors import InputError


def unpack(archive: str | Path, folder: str | Path) -> list[str]:
    """Unpack a .zip or .tar(.gz, .bz2, .xz) into a folder; return the names it added there.

    All of it is unpacked beside the folder's contents first and moved in at the end, so that an
    interrupted or refused archive leaves nothing.

    Raises:
        InputError: damaged, no archive, or with an entry that would land outside the folder
            (absolute, ``..``, a link out of it), is a device, or is there already; disk full.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise InputError(f"archive {archive} does not exist")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking.") as temporary:
            content = Path(temporary) / "content"  # so that an entry "." cannot touch its mode
            content.mkdir()
            _extract(archive, content)
            in_the_way = _conflict(content, folder)
            if in_the_way:
                raise InputError(f"{in_the_way} is there already; move it away first")
            names = sorted(entry.name for entry in content.iterdir())
            _merge(content, folder)
            return names
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise InputError(f"archive {archive} is damaged or not safe: {error}") from None
    except OSError as error:
        raise InputError(f"archive {archive} cannot be unpacked in {folder}: {error}") from None


def _extract(archive: Path, folder: Path) -> None:
    if tarfile.is_tarfile(archive):
        if not hasattr(tarfile, "data_filter"):
            raise InputError("this Python unpacks archives unsafely; update it to 3.11.4 or newer")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")  # no absolute paths, no way out, no devices
    elif zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as content:
            for entry in content.infolist():
                _check_entry(archive, entry)
            content.extractall(folder)
    else:
        raise InputError(f"{archive} is no .zip or .tar archive")


def _check_entry(archive: Path, entry: zipfile.ZipInfo) -> None:
    """Refuse what ``zipfile`` would rename in silence, and links, which it would write as files."""
    name = entry.filename.replace("\\", "/")
    if name.startswith("/") or ":" in name.split("/")[0] or ".." in name.split("/"):
        raise InputError(
            f"archive {archive} is not safe: {entry.filename!r} leads out of the folder"
        )
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise InputError(f"archive {archive} is not safe: {entry.filename!r} is a link")


def _conflict(source: Path, target: Path) -> Path | None:
    """Return what stands in the way of moving a folder's contents into another, if anything."""
    for entry in source.iterdir():
        there = target / entry.name
        if entry.is_dir() and not entry.is_symlink() and there.is_dir():
            below = _conflict(entry, there)
            if below:
                return below
        elif there.exists():
            return there
    return None


def _merge(source: Path, target: Path) -> None:
    """Move a folder's contents into another; folders that both have are merged."""
    for entry in source.iterdir():
        there = target / entry.name
        if there.is_dir():
            _merge(entry, there)
        else:
            entry.rename(there)
