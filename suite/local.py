"""Jobs as processes of this machine, and the interface of an executor.

A job writes to its own log, which the runner follows; it runs in a session of its own and holds a
lock from its start to its end. So it survives its runner, and the next one finds it.
"""

import contextlib
import dataclasses
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from core.errors import InputError
from core.files import check_not_locked, locked
from core.launch import visible_gpus
from core.signals import leave_lost_terminal

SAVE_SECONDS = 60.0  # after SIGTERM, for jobs to save
KILL_SECONDS = 10.0  # between the next signals
ERROR = re.compile(r"^([\w.]*(error|Error|Exception|Interrupt)\b[^:]*): .")
WAIT_SECONDS = 0.2  # between two looks at the jobs


@dataclasses.dataclass(frozen=True)
class Task:
    """One start of a job."""

    name: str
    command: list[str]
    output: Path  # run folder, or file
    log: Path  # is appended to
    lock: Path  # is held while the job runs; its content names the process
    gpus: int = 0
    resumes: bool = False  # whether the command knows --resume


@dataclasses.dataclass(frozen=True)
class End:
    """How a task has ended."""

    status: int | None  # exit status, negative for a signal; None: unknown
    seconds: float  # that it ran
    why: str = ""  # in words, if the status does not say it


class Attempt(Protocol):
    """A task that has been started."""

    ticket: str  # names it to the user; by it a later call finds it again

    def ended(self) -> End | None:
        """Return how it has ended, None while it runs."""


class Executor(Protocol):
    """A place that runs tasks."""

    slots: int  # tasks at once

    def start(self, task: Task, note: Callable[[str], None]) -> Attempt:
        """Start a task; ``note`` records its ticket, before it can be lost."""

    def again(self, task: Task, ticket: str) -> Attempt | None:
        """Return the attempt that an earlier call has started, None if it does not run."""

    def wait(self) -> None:
        """Let a moment pass; show the output of the tasks where it goes to the terminal."""

    def stop(self, hurries: Callable[[], int]) -> str:
        """Let all tasks save and end, or leave them; return a sentence for the user, or "".

        Args:
            hurries: counts the user's further requests; each one shortens the wait.
        """


class LocalExecutor:
    """Runs tasks as child processes, each with GPUs of its own where several run at once.

    One at a time, a task sees the whole machine and its output is shown; several at once write to
    their logs only, and on CPUs share the cores evenly (``OMP_NUM_THREADS``).

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
        self._running: list[_Process] = []

    def start(self, task: Task, note: Callable[[str], None]) -> "_Process":
        """Start a task on GPUs that are free."""
        self._forget_ended()
        taken = self._free(task.gpus) if self.slots > 1 else []
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("ab") as log, locked(task.lock.parent, name=task.lock.name) as lock:
            log.write(f"$ {subprocess.list2cmdline(task.command)}\n".encode())
            log.flush()
            shown = log.tell() if self.slots == 1 else None
            process = subprocess.Popen(
                task.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | self._share(taken),
                start_new_session=True, pass_fds=[lock],
            )  # fmt: skip
            os.ftruncate(lock, 0)
            holder = f"process {process.pid} on {socket.gethostname()}\n{','.join(taken)}"
            os.pwrite(lock, holder.encode(), 0)
        return self._keep(_Process(task, process.pid, taken, shown, process))

    def again(self, task: Task, ticket: str) -> "_Process | None":
        """Return the process that an earlier call has started, if it still runs.

        Raises:
            InputError: it is a SLURM job that runs.
        """
        if ticket:
            from suite.slurm import in_queue

            queued = in_queue()
            if queued is None or ticket.rpartition(" ")[2] in queued:
                raise InputError(f"{ticket} runs it: take --executor slurm, or end that job")
        if not is_held(task.lock):
            return None
        holder, _, devices = task.lock.read_text().partition("\n")
        found = re.fullmatch(r"process (\d+) on (.+)", holder)
        pid = int(found[1]) if found and found[2] == socket.gethostname() else 0
        taken = devices.split(",") if devices else []
        shown = task.log.stat().st_size if self.slots == 1 else None
        return self._keep(_Process(task, pid if _runs(pid, task) else 0, taken, shown))

    def wait(self) -> None:
        """Let a fifth of a second pass, and show the new lines of the logs."""
        time.sleep(WAIT_SECONDS)
        for process in self._running:
            process.show()

    def stop(self, hurries: Callable[[], int]) -> str:
        """Let all tasks save and end; after too long a wait, or when the user hurries, end them."""
        steps = [  # a task ends its own processes, unless it does not get to it
            (os.kill, signal.SIGTERM, SAVE_SECONDS),
            (os.killpg, signal.SIGTERM, KILL_SECONDS),
            (os.killpg, signal.SIGKILL, KILL_SECONDS),
        ]
        self._running = [process for process in self._running if process.pid]
        for send, number, seconds in steps:
            self._forget_ended()
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    send(process.pid, number)
            end, seen = time.monotonic() + seconds, hurries()
            while self._running and time.monotonic() < end:
                if hurries() > seen and number != signal.SIGKILL:
                    break
                self.wait()
                self._forget_ended()
        return ""

    def _keep(self, process: "_Process") -> "_Process":
        self._running.append(process)
        return process

    def _forget_ended(self) -> None:
        self._running = [process for process in self._running if process.ended() is None]

    def _free(self, gpus: int) -> list[str]:
        """Return devices for a task: the least used one where it asks for none in particular."""
        used = [device for process in self._running for device in process.devices]
        return sorted(self.devices, key=used.count)[: max(gpus, 1)]

    def _share(self, devices: list[str]) -> dict[str, str]:
        """Return the variables that give a task its part of the machine."""
        if devices:
            return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
        if self.slots == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // self.slots, 1))}


class _Process:
    """A task that runs: a child of ours, or one that an earlier runner has left."""

    def __init__(
        self,
        task: Task,
        pid: int,  # leads its own session and group; 0: not known, or of another machine
        devices: list[str],
        shown: int | None,  # byte of its log from which on it is shown; None: not at all
        child: "subprocess.Popen[bytes] | None" = None,
    ) -> None:
        self.task, self.pid, self.devices, self.shown, self.child = task, pid, devices, shown, child
        self.ticket = holder_of(task.lock)

    def ended(self) -> End | None:
        """Return how it has ended, None while it runs; the status is that of a child only."""
        status = self.child.poll() if self.child else None
        if status is None and (self.child or is_held(self.task.lock)):
            return None
        self.show()
        return End(status, max(time.time() - self.task.lock.stat().st_mtime, 0.0))

    def show(self) -> None:
        """Write to stdout what the log has gained."""
        if self.shown is None:
            return
        data = b""
        with contextlib.suppress(FileNotFoundError), self.task.log.open("rb") as log:
            log.seek(self.shown)
            data = log.read()
        self.shown += len(data)
        if data:
            write_out(data)


def is_held(lock: Path) -> bool:
    """Whether a process has locked a file."""
    try:
        check_not_locked(lock.parent, name=lock.name)
    except InputError:
        return True
    return False


def holder_of(lock: Path) -> str:
    """Return ``process PID on HOST`` of the process that has locked a file."""
    return lock.read_text().partition("\n")[0] or "a process"


def write_out(data: bytes) -> None:
    """Write to stdout; no effect if it is a terminal that has closed.

    Raises:
        BrokenPipeError: the reader of a pipe has ended.
    """
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        leave_lost_terminal()


def last_error(text: str) -> str:
    """Return the last line of a program's output that names an error, else its last line."""
    lines = [line.strip() for line in text.splitlines() if any(map(str.isalnum, line))]
    errors = [line for line in lines if ERROR.match(line)]
    return (errors or lines or [""])[-1].removeprefix("error: ")[:300]


def _runs(pid: int, task: Task) -> bool:
    """Whether a process of this machine runs a task: its number may be another's by now."""
    with contextlib.suppress(OSError):
        return str(task.output).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False
