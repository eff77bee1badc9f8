"""Files that are whole or absent: written beside their name, flushed to disk, then renamed."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from core.errors import InputError

# no space, over the quota, over the limit of a file's size (ulimit -f)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ENDING = ".tmp"  # of what is being written; its name also begins with a dot


@contextlib.contextmanager
def atomic_file(path: str | Path, keep_previous: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a temporary file that becomes ``path`` when the block ends without an error.

    An older ``path`` is replaced, or first moved to ``keep_previous``.

    Raises:
        InputError: the disk is full; the older file stays as it was.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=ENDING)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        if keep_previous is not None and path.exists():
            path.replace(keep_previous)
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if is_full(error):
            kept = "; the older file is intact" if path.exists() else ""
            raise InputError(f"no space left to write {path}{kept}") from None
        raise


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that a disk or quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if "PytorchStreamWriter failed" in str(error) or "file write failed" in str(error):
            return True  # torch.save's word for a write that came back short
        error = error.__cause__ or error.__context__
    return False


def sweep(folder: Path) -> None:
    """Delete what killed processes have left half-written in a folder that nobody writes to now."""
    for leftover in folder.glob(f".*{ENDING}"):
        leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
