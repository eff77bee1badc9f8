"""Where the jobs of a suite run: what the runner asks of such a place, and this machine as one."""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from core.errors import InputError
from core.launch import visible_gpus
from suite.child import Child, stop


@dataclasses.dataclass(frozen=True)
class Task:
    """One start of a job."""

    name: str
    command: list[str]
    output: Path  # run folder, or file
    log: Path
    gpus: int = 0
    resumes: bool = False  # whether the command knows --resume


@dataclasses.dataclass(frozen=True)
class End:
    """How a task has ended."""

    status: int  # exit status, negative for a signal
    seconds: float  # that it ran
    why: str = ""  # in words, where a status does not say it


class Attempt(Protocol):
    """A task that has been started."""

    ticket: str  # by which a later call finds it again; "" where none can

    def ended(self) -> End | None:
        """Return how it has ended, None while it has not."""


class Executor(Protocol):
    """A place that runs tasks."""

    slots: int  # tasks at once

    def start(self, task: Task, held: int) -> Attempt:
        """Start a task; ``held`` is a descriptor of the suite's lock, for children to keep."""

    def again(self, task: Task, ticket: str) -> Attempt | None:
        """Return the attempt that an earlier call has started, None where it is lost."""

    def wait(self) -> None:
        """Pass a moment, and the output of the tasks on where it goes to the terminal."""

    def stop(self) -> str:
        """Let all tasks save and end, or leave them; return what the user is to know."""


class LocalExecutor:
    """Runs tasks as child processes, each with GPUs of its own where several run at once.

    One at a time, a task sees the whole machine and its output goes to our terminal; several at
    once write to their logs only, and on CPUs share the cores evenly (``OMP_NUM_THREADS``).

    Args:
        jobs: tasks at once; 0: as many as the GPUs allow, one without GPUs.
        gpus: of each task; 0: tasks choose by themselves, in one process.

    Raises:
        InputError: more tasks at once than the machine has GPUs for.
    """

    def __init__(self, jobs: int = 0, gpus: int = 0, devices: Sequence[str] | None = None) -> None:
        self.devices = visible_gpus() if devices is None else list(devices)
        room = len(self.devices) // max(gpus, 1)
        if jobs < 0 or (gpus and jobs > max(room, 1)):
            raise InputError(
                f"--jobs {jobs}: with {gpus} GPUs for each job and {len(self.devices)} on this "
                f"machine, at most {max(room, 1)} jobs run at once"
            )
        self.slots = jobs or max(room, 1)
        self._running: list[_LocalAttempt] = []

    def start(self, task: Task, held: int) -> "_LocalAttempt":
        """Start a task on GPUs that are free."""
        self._forget_ended()
        alone = self.slots == 1
        taken = [] if alone else self._free(task.gpus)
        child = Child(
            task.command, task.log, [held], {} if alone else self._environment(taken), echo=alone
        )
        attempt = _LocalAttempt(child, taken)
        self._running.append(attempt)
        return attempt

    def again(self, task: Task, ticket: str) -> None:
        """Return None: the lock has shown that no child of an earlier call is left."""

    def wait(self) -> None:
        """Pass a fifth of a second."""
        for attempt in self._running:
            attempt.child.poll(0.2 / len(self._running))

    def stop(self) -> str:
        """Let all children save and end."""
        children = [attempt.child for attempt in self._running]
        if children:
            stop(children)
        return ""

    def _forget_ended(self) -> None:
        self._running = [a for a in self._running if a.child.poll() is None]

    def _free(self, gpus: int) -> list[str]:
        """Return devices for a task: the least used one where it asks for none in particular."""
        used = [device for attempt in self._running for device in attempt.devices]
        return sorted(self.devices, key=used.count)[: max(gpus, 1)]

    def _environment(self, devices: list[str]) -> dict[str, str]:
        if devices:
            return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
        if "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // self.slots, 1))}


class _LocalAttempt:
    """A child process."""

    ticket = ""

    def __init__(self, child: Child, devices: list[str]) -> None:
        self.child, self.devices = child, devices
        self._started = time.monotonic()

    def ended(self) -> End | None:
        """Return how it has ended, None while it has not."""
        status = self.child.poll()
        return None if status is None else End(status, time.monotonic() - self._started)
