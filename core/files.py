"""Files that are whole or absent: written beside their name, flushed, renamed; locked folders."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from core.errors import InputError

# no space, over the quota, over the limit of a file's size (ulimit -f)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ENDING = ".tmp"  # of what is being written; its name also begins with a dot
LOCK = ".lock"  # in a folder that one process at a time writes to

_held: set[int] = set()  # descriptors of locks


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
    """Delete the temporary files of killed processes; no process may be writing to the folder."""
    for leftover in folder.glob(f".*{ENDING}"):
        leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, by: str = "another run", name: str = LOCK) -> Iterator[int]:
    """Make a folder and lock it until the block or this process ends.

    Yields the lock's descriptor: a command that inherits it keeps the lock; forked children close
    it. Where the file system has no locks, a warning is printed.

    Args:
        by: name of another holder in the message.

    Raises:
        InputError: another process holds the lock.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(descriptor)
    try:
        _lock(descriptor, fcntl.LOCK_EX, folder, by)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield descriptor
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def check_not_locked(folder: Path, by: str = "another run", name: str = LOCK) -> None:
    """Raise InputError if another process holds a folder's lock; writes nothing."""
    with (
        contextlib.suppress(FileNotFoundError, NotADirectoryError),
        (folder / name).open("rb") as file,
    ):
        _lock(file.fileno(), fcntl.LOCK_SH, folder, by)


def _lock(descriptor: int, how: int, folder: Path, by: str) -> None:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "a process"
        raise InputError(
            f"{folder} is in use by {by}, begun by {holder}: wait for it or end it"
        ) from None
    except OSError as error:
        print(f"warning: {folder} cannot be locked: {error.strerror}", file=sys.stderr)


def check_folder(folder: Path) -> None:
    """Raise InputError if the path or a parent of it is a file."""
    for place in (folder, *folder.absolute().parents):
        if place.is_dir():
            return
        if place.exists():
            raise InputError(f"{place} is a file; name a folder")


def is_empty(folder: Path) -> bool:
    """Whether a folder is absent or holds only locks and temporary files."""
    if not folder.exists():
        return True
    return all(file.name.endswith((LOCK, ENDING)) for file in folder.iterdir())


def _close_locks() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_locks)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
