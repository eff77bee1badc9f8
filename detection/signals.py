"""SIGTERM saves: what a scheduler ends is resumable at the iteration at which it ended."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from core.errors import STOPPED_STATUS
from detection.checkpointer import Checkpointer
from detection.logs import say


class StopOnSignal(HookBase):
    """After SIGTERM, saves at the end of the iteration and leaves with the status of a stopped run.

    The signal may reach one rank only; all ranks leave after the same iteration.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer
        self.asked = False
        self._before: Any = None

    def before_train(self) -> None:
        self._before = signal.signal(signal.SIGTERM, self._remember)

    def after_step(self) -> None:
        asked = any(comm.all_gather(self.asked)) if comm.get_world_size() > 1 else self.asked
        if not asked or self.trainer.iter + 1 >= self.trainer.max_iter:
            return
        if comm.is_main_process():
            path = self.checkpointer.save(self.trainer)
            following = self.trainer.iter + 1
            say(f"SIGTERM: saved {path.name}; --resume goes on with iteration {following}")
        comm.synchronize()
        raise SystemExit(STOPPED_STATUS)

    def after_train(self) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@contextmanager
def passed_on() -> Iterator[None]:
    """Hand SIGTERM on to the processes that this one has started, which save and end."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
