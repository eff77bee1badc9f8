"""Signals that ask a tool to stop: it saves and ends with status 75 (``errors.STOPPED_STATUS``).

``timeout``, ``scancel``, systemd and docker send SIGTERM, to one process or to its whole group;
SLURM warns with SIGUSR1; a terminal that closes sends SIGHUP. A signal that is ignored when the
tool starts (``nohup``) stays ignored.
"""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from core.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

Handler = Callable[[int, FrameType | None], Any]


class StopRequests:
    """Within the block a stop signal only sets ``requested``; the work goes on until it can stop.

    If the block ends normally all the same, the signal acts then. Signals are left alone outside
    the main thread, where Python sets no handlers.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        self._before = _handle(self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.requested and kind is None:
            signal.raise_signal(self.requested)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        leave_lost_terminal()
        self.requested = signal.Signals(number)


@contextlib.contextmanager
def raising_stopped() -> Iterator[None]:
    """Within the block the first stop signal raises ``Stopped``; those after it are ignored.

    They are ignored from then on, also behind the block: a group gets a signal several times.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        _handle(lambda number, frame: None)
        leave_lost_terminal()
        before.clear()
        raise Stopped(f"stopped by {signal.Signals(number).name}")

    before = _handle(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Block the stop signals; they act when the block ends.

    Processes and threads that begin inside it have them blocked for good: a data-loading worker
    survives a signal to the group and ends when its parent says so.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends (Linux only).

    Args:
        parent: the parent's process id, known from before this process began.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), number)


def _handle(handler: Handler) -> dict[int, Any]:
    """Install a handler for all stop signals that are not ignored; return those before it."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    heeded = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heeded}


def leave_lost_terminal() -> None:
    """Send output nowhere if it goes to a terminal that has closed: writing to it would fail."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
