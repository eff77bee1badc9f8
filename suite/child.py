"""Runs one command: its output goes to our terminal as it comes, and to a log file.

On a terminal the child gets a terminal of its own, so that it draws its progress bars; the log
keeps the last state of every line. The child runs in a session of its own: an interruption is
handed to it once, and it gets the time to save.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

GRACE_SECONDS = 60.0  # for the child to save after an interruption
KILL_SECONDS = 10.0  # between SIGTERM and SIGKILL


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised as the interruption that it is."""


def run_child(command: Sequence[str], log: Path, held: Sequence[int] = ()) -> int:
    """Run ``command`` and return its exit status, negative for a signal.

    Args:
        log: file that the output is appended to, after a line with the command.
        held: file descriptors that the child keeps open (a lock that lasts as long as it does).

    Raises:
        KeyboardInterrupt: we were interrupted; the child has ended by then.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    terminal = sys.stdout.isatty()
    reader, writer = os.openpty() if terminal else os.pipe()
    if terminal:
        with contextlib.suppress(OSError):
            _copy_size(sys.stdout.fileno(), writer)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as file, _sigterm_interrupts():
        file.write(f"$ {subprocess.list2cmdline(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, env=environment,
            start_new_session=True, pass_fds=tuple(held),
        )  # fmt: skip
        os.close(writer)
        copier = _Copier(reader, file)
        try:
            while process.poll() is None:
                copier.copy(0.2)
        except KeyboardInterrupt as interruption:
            _stop(process, copier, isinstance(interruption, Terminated))
            raise
        finally:
            copier.drain()
            os.close(reader)
    return process.returncode


class _Copier:
    """Copies what the child writes to our stdout and, line by line, to its log."""

    def __init__(self, reader: int, log: IO[bytes]) -> None:
        self.reader, self.log = reader, log
        self.line = b""
        self.open = True

    def copy(self, seconds: float) -> bool:
        """Copy what comes within some seconds; return whether anything came."""
        if not self.open:
            time.sleep(seconds)
            return False
        if not select.select([self.reader], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.reader, 65536)
        except OSError:  # how a terminal says that its other end is closed
            data = b""
        if not data:
            self.open = False
            return False
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            _write(sys.stdout, data)
        *lines, self.line = (self.line + data).split(b"\n")
        for line in lines:
            self.log.write(_last_state(line) + b"\n")
        self.log.flush()
        return True

    def drain(self) -> None:
        """Copy what is left without waiting for a grandchild that keeps the other end open."""
        while self.copy(0.0):
            pass
        if self.line:
            self.log.write(_last_state(self.line) + b"\n")
            self.line = b""


def _write(stream: IO[str], data: bytes) -> None:
    buffer = getattr(stream, "buffer", None)
    if buffer is None:  # a stand-in for stdout that takes text only
        stream.write(data.decode(errors="replace"))
    else:
        buffer.write(data)
    stream.flush()


def _last_state(line: bytes) -> bytes:
    """Return what a line shows in the end, after all its carriage returns."""
    return line.rstrip(b"\r").rsplit(b"\r", 1)[-1]


def _stop(process: subprocess.Popen[bytes], copier: _Copier, terminated: bool) -> None:
    """Hand the interruption on and wait; a second one, or too long a wait, ends the child."""
    steps = [  # its own children are its own to end, unless it does not come to that
        (os.kill, signal.SIGTERM if terminated else signal.SIGINT, GRACE_SECONDS),
        (os.killpg, signal.SIGTERM, KILL_SECONDS),
        (os.killpg, signal.SIGKILL, KILL_SECONDS),
    ]
    for send, number, seconds in steps:
        with contextlib.suppress(ProcessLookupError):
            send(process.pid, number)
        end = time.monotonic() + seconds
        try:
            while process.poll() is None and time.monotonic() < end:
                copier.copy(0.2)
        except KeyboardInterrupt:
            continue
        if process.poll() is not None:
            return


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise ``Terminated`` inside the block (in the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _copy_size(source: int, target: int) -> None:
    """Give a pseudo-terminal the size of ours."""
    import fcntl
    import termios

    size = fcntl.ioctl(source, termios.TIOCGWINSZ, b"\0" * 8)
    fcntl.ioctl(target, termios.TIOCSWINSZ, size)
