"""A command as a child process: its output goes to a log file, and to our terminal where asked.

On a terminal an echoed child gets a terminal of its own, so that it draws its progress bars; the
log keeps the last state of every line. Every child runs in a session of its own: an interruption
of ours is handed to it once, as SIGTERM, and it gets the time to save.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

GRACE_SECONDS = 60.0  # for children to save after an interruption
KILL_SECONDS = 10.0  # between SIGTERM and SIGKILL


class Child:
    """A command that runs in the background.

    Args:
        log: file that the output is appended to, after a line with the command.
        held: file descriptors that the child keeps open (a lock that lasts as long as it does).
        more: environment variables that it gets beside ours.
        echo: whether its output also goes to our stdout, as it comes.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        held: Sequence[int] = (),
        more: Mapping[str, str] | None = None,
        echo: bool = True,
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("ab")
        self._log.write(f"$ {subprocess.list2cmdline(command)}\n".encode())
        self._log.flush()
        self._copier: _Copier | None = None
        writer = self._log.fileno()
        if echo:
            self._copier, writer = self._echo()
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(more or {})},
            start_new_session=True, pass_fds=tuple(held),
        )  # fmt: skip
        if echo:
            os.close(writer)

    @property
    def pid(self) -> int:
        """Return the process, which leads its own session and group."""
        return self._process.pid

    def poll(self, seconds: float = 0.0) -> int | None:
        """Pass its output on for some seconds; return its exit status, None while it runs.

        The status is negative for a signal.
        """
        if not self._log.closed:
            if self._copier is None:
                time.sleep(seconds)
            else:
                self._copier.copy(seconds)
        status = self._process.poll()
        if status is not None and not self._log.closed:
            if self._copier is not None:
                self._copier.drain()
            self._log.close()
        return status

    def _echo(self) -> tuple["_Copier", int]:
        """Return what copies the child's output, and the descriptor that it writes to."""
        terminal = sys.stdout.isatty()
        reader, writer = os.openpty() if terminal else os.pipe()
        if terminal:
            with contextlib.suppress(OSError):
                _copy_size(sys.stdout.fileno(), writer)
        return _Copier(reader, self._log), writer


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
        os.close(self.reader)


def stop(children: Sequence[Child]) -> None:
    """Let all children save and end; a second interruption, or too long a wait, ends them."""
    steps = [  # a child's own children are its own to end, unless it does not come to that
        (os.kill, signal.SIGTERM, GRACE_SECONDS),
        (os.killpg, signal.SIGTERM, KILL_SECONDS),
        (os.killpg, signal.SIGKILL, KILL_SECONDS),
    ]
    for send, number, seconds in steps:
        for child in children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    send(child.pid, number)
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                if all(child.poll(0.2 / len(children)) is not None for child in children):
                    return
        except KeyboardInterrupt:
            continue


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt inside the block (in the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


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


def _copy_size(source: int, target: int) -> None:
    """Give a pseudo-terminal the size of ours."""
    import fcntl
    import termios

    size = fcntl.ioctl(source, termios.TIOCGWINSZ, b"\0" * 8)
    fcntl.ioctl(target, termios.TIOCSWINSZ, size)
