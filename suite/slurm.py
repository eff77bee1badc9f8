"""Tools as SLURM jobs, through submitit: saved, queued again and resumed when their time is over.

SLURM warns a job ``save_seconds`` before it ends it, by time or (``PreemptParameters=
send_user_signal``) by preemption. The tool then gets SIGTERM and saves; the job is queued again and
runs with ``--resume``. After a node failure SLURM itself queues the job again, and it resumes from
what was saved last.
"""

import contextlib
import dataclasses
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.config import ROOT
from core.errors import STOPPED_STATUS, InputError
from core.launch import ALONE, Place
from core.signals import SIGNALS
from suite.local import WAIT_SECONDS, End, Task, holder_of, is_held, last_error
from suite.plan import RANKS, launch
from suite.records import make_room, resumable
from suite.schema import Slurm

FIRST_PORT, PORTS = 20000, 20000  # where the machines of a job meet, by the job's number
LONGEST_WAIT_SECONDS = 30.0  # between two looks at the queue
NAMED = "SLURM job named"  # in place of its number, while it is being submitted


@dataclasses.dataclass
class Step:
    """What SLURM runs, once on each machine of a job; submitit pickles it.

    ``checkpoint`` is submitit's name for what is done when SLURM warns the job.
    """

    words: list[str]  # the tool and its arguments, or (``ready``) a whole command
    output: Path | None = None  # folder of the run, to resume from; None: nothing to resume
    gpus: int = 0  # per machine
    nodes: int = 1
    log: Path | None = None  # None: the job's own
    ready: bool = False
    save_seconds: float = 120.0
    queued_again: bool = False
    seconds: float = 0.0  # of all attempts together
    status: int | None = None  # of the tool, once it has ended
    _pid: int = dataclasses.field(default=0, init=False)
    _warned: bool = dataclasses.field(default=False, init=False)

    def __call__(self) -> End:
        """Run the tool to its end; return its status."""
        place = self._place()
        if self.status is None:
            started = time.monotonic()
            signal.signal(signal.SIGTERM, lambda *_: self._warn())
            self._run(place)
            self.seconds += time.monotonic() - started
        if self.status and (self._warned or place.node > 0 or self.status == STOPPED_STATUS):
            time.sleep(self.save_seconds)  # SLURM ends us now, or the first machine queues us again
        return End(self.status or 0, self.seconds)

    def checkpoint(self) -> Any:
        """Let the tool save; return what is to be queued instead of this."""
        from submitit.helpers import DelayedSubmission

        started = time.monotonic()
        self._warn()
        while self._pid and self.status is None and time.monotonic() - started < self.save_seconds:
            time.sleep(0.1)
        ended = 0 if self.status == 0 else None  # it has just finished: nothing to resume
        again = dataclasses.replace(self, status=ended, queued_again=True)
        return DelayedSubmission(again)

    def command(self, place: Place = ALONE) -> list[str]:
        """Return the command of a machine, with --resume if the run folder has a state."""
        words = list(self.words)
        if self.output is not None and self._again() and "--resume" not in words:
            if resumable(self.output):
                words.insert(words.index("--output"), "--resume")
            elif place.node == 0:
                make_room(self.output, ours=True)
        return words if self.ready else launch(words, self.gpus, place)

    def _run(self, place: Place) -> None:
        with self.log.open("ab") if self.log else os.fdopen(os.dup(1), "wb") as out:
            command = self.command(place)
            out.write(f"$ {subprocess.list2cmdline(command)}\n".encode())
            out.flush()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT if self.log else None,
                env={**os.environ, "PYTHONUNBUFFERED": "1"}, preexec_fn=_ignore_warnings,
            )  # fmt: skip
        self._pid = process.pid

        def keep_status() -> None:
            self.status = process.wait()

        # In a thread, so that the handler of a signal may wait for the status as well.
        threading.Thread(target=keep_status, daemon=True).start()
        while self.status is None:
            time.sleep(0.1)

    def _warn(self) -> None:
        """Hand SIGTERM to the tool, which saves."""
        self._warned = True
        if self._pid and self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)

    def _again(self) -> bool:
        return self.queued_again or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0

    def _place(self) -> Place:
        if self.nodes == 1:
            return ALONE
        from submitit import JobEnvironment

        environment = JobEnvironment()
        port = FIRST_PORT + int(environment.raw_job_id) % PORTS
        return Place(self.nodes, environment.node, environment.hostnames[0], port)


class SlurmExecutor:
    """Runs the tasks of a suite as SLURM jobs, which outlive the command that submits them.

    Args:
        folder: of the suite; on a file system that the cluster shares.
        jobs: in the queue at once; 0: all that are ready.
    """

    def __init__(self, settings: Slurm, folder: Path, jobs: int = 0) -> None:
        self.slots = jobs or 10**6
        self.settings, self.folder = settings, folder / "slurm"
        self._attempts: list[_SlurmAttempt] = []
        self._pause, self._next_look = WAIT_SECONDS, 0.0

    def start(self, task: Task, note: Callable[[str], None]) -> "_SlurmAttempt":
        """Submit a task under a name of its own, which is noted before."""
        task.log.parent.mkdir(parents=True, exist_ok=True)
        step = Step(
            task.command, task.output if task.resumes else None, task.gpus, log=task.log, ready=True
        )
        name = f"{task.name.replace('/', '-')}-{secrets.token_hex(4)}"
        note(f"{NAMED} {name}")
        attempt = self._keep(submit(step, self.settings, self.folder, name))
        note(attempt.ticket)
        return attempt

    def again(self, task: Task, ticket: str) -> "_SlurmAttempt | None":
        """Return a job that is in the queue, or that has ended since it was last looked at.

        Raises:
            InputError: it runs as a process, or SLURM does not say whether it was submitted.
        """
        from submitit import SlurmJob

        if is_held(task.lock):
            raise InputError(
                f"{holder_of(task.lock)} runs it: leave --executor slurm out, or end that"
            )
        kind, _, word = ticket.rpartition(" ")
        number = self._number_of(word) if kind == NAMED else word
        if not number:
            return None
        job: Any = SlurmJob(self.folder / number, number)
        queued = in_queue()
        known = job.paths.result_pickle.exists() or queued is None or number in queued
        return self._keep(job) if known else None

    def wait(self) -> None:
        """Let a moment pass; look at the queue, less often the longer nothing has happened."""
        time.sleep(WAIT_SECONDS)
        if time.monotonic() < self._next_look:
            return
        self._pause = min(1.5 * self._pause, LONGEST_WAIT_SECONDS)
        self._next_look = time.monotonic() + self._pause
        open_attempts = [a for a in self._attempts if not a.look_for_result()]
        queued = in_queue() if open_attempts else None
        for attempt in open_attempts:
            attempt.missed = 0 if queued is None or attempt.number in queued else attempt.missed + 1
        if len(open_attempts) < len(self._attempts):
            self._attempts, self._pause = open_attempts, WAIT_SECONDS

    def stop(self, hurries: Callable[[], int]) -> str:
        """Leave all jobs in the queue."""
        numbers = " ".join(attempt.number for attempt in self._attempts)
        return numbers and (
            f"SLURM continues with jobs {numbers}: the same command takes them up again, "
            f"`scancel {numbers}` ends them"
        )

    def _keep(self, job: Any) -> "_SlurmAttempt":
        attempt = _SlurmAttempt(job)
        self._attempts.append(attempt)
        self._pause, self._next_look = WAIT_SECONDS, 0.0
        return attempt

    def _number_of(self, name: str) -> str:
        """Return the number of the job whose submission was cut off, "" if there is none.

        A job without the pickle of its task, which is stored after sbatch, is ended.
        """
        scripts = self.folder.glob("*/*_submission.sh")
        numbers = {s.parent.name for s in scripts if f"job-name={name}\n" in s.read_text()}
        queued = in_queue(name)
        if queued is None:
            raise InputError(f"squeue does not say whether job {name} was submitted: try later")
        for number in numbers | queued:
            if (self.folder / number / f"{number}_submitted.pkl").exists():
                return number
            subprocess.run(["scancel", number], capture_output=True)
        return ""


class _SlurmAttempt:
    """A job in the queue."""

    def __init__(self, job: Any) -> None:
        self.job, self.number = job, str(job.job_id)
        self.ticket = f"SLURM job {self.number}"
        self.has_result = False
        self.missed = 0  # looks at the queue in which it was not there

    def look_for_result(self) -> bool:
        """Whether it has left a result."""
        with contextlib.suppress(OSError):
            list(self.job.paths.folder.iterdir())  # a network file system looks again
        self.has_result = bool(self.job.paths.result_pickle.exists())
        return self.has_result

    def ended(self) -> End | None:
        """Return how it had ended when the executor looked last, None if it had not."""
        if self.has_result:
            outcome, result = self.job._get_outcome_and_result()
            if outcome == "success":
                return result if isinstance(result, End) else None
            return End(1, 0.0, f"{self.ticket}: {str(result).strip().splitlines()[-1]}")
        if self.missed > 1:
            return End(1, 0.0, f"{self.ticket} has ended without a result: {self.job.paths.stderr}")
        return None


def check_slurm() -> None:
    """Raise InputError where no job can be submitted."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise InputError(
            "SLURM needs submitit, which is not installed: .venv/bin/pip install submitit"
        ) from None
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise InputError(
            f"there is no {' and no '.join(missing)} on this machine: submit from a login node of "
            "a SLURM cluster, or run without SLURM"
        )


def submit(step: Step, settings: Slurm, folder: Path, name: str) -> Any:
    """Submit a step as one task on each machine; return submitit's job.

    Args:
        folder: gets a folder of each job, with its log and its pickle.

    Raises:
        InputError: SLURM refuses the job; its own words are in the sentence.
    """
    from submitit import SlurmExecutor as Submitter
    from submitit.core.utils import FailedJobError

    submitter = Submitter(folder / "%j", max_num_timeout=settings.requeues)
    submitter.update_parameters(**sbatch_options(settings, step, name))
    step.save_seconds = max(settings.save_seconds - 10.0, settings.save_seconds / 2)
    # Ctrl-C in a terminal reaches sbatch too, which would then end without the job's number
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, *SIGNALS])
    try:
        return submitter.submit(step)
    except FailedJobError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise InputError(f"SLURM refuses {name}: {lines[-1].strip()}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def sbatch_options(settings: Slurm, step: Step, name: str) -> dict[str, Any]:
    """Return submitit's parameters of a job."""
    options: dict[str, Any] = {
        "job_name": name.replace("/", "-"),
        "time": max(round(60 * settings.hours), 1),  # minutes
        "nodes": step.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": settings.cpus_per_gpu * max(step.gpus, 1),
        "signal_delay_s": settings.save_seconds,
        "stderr_to_stdout": False,
        "setup": [f'export PYTHONPATH="{ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"'],
        "additional_parameters": {"requeue": True, **settings.extra},
    }
    if step.gpus:
        options["gpus_per_node"] = step.gpus
    if settings.memory_gb:
        options["mem"] = f"{round(1024 * settings.memory_gb)}M"
    given = {"partition": settings.partition, "account": settings.account}
    return options | {key: value for key, value in given.items() if value}


def in_queue(name: str = "") -> set[str] | None:
    """Return the numbers of our jobs (of one name) in the queue; None if SLURM does not answer."""
    command = ["squeue", "--me", "--noheader", "--format=%A"] + [f"--name={name}"] * bool(name)
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if answer.returncode else set(answer.stdout.split())


def submit_tool(
    words: Sequence[str], gpus: int, nodes: int, settings: Slurm, folder: Path
) -> tuple[str, Path]:
    """Submit a tool of ours as a job of its own; return the job's number and its log.

    Args:
        words: the tool's file and its arguments.
        gpus: per machine.

    Raises:
        InputError: no such tool, one that cannot run on so many GPUs or machines, bad input, or no
            --output to resume from.
    """
    tool = Path(words[0])
    file = next((f for f in (tool, ROOT / tool, ROOT / "tools" / tool) if f.is_file()), None)
    if file is None or file.suffix != ".py":
        raise InputError(f"{tool} is no tool: name a Python file, such as tools/run_pretrain.py")
    words = [str(file.absolute()), *words[1:]]
    launch(words, gpus, Place(nodes))  # raises if the tool cannot run so
    output: Path | None = None
    if file.name in RANKS:
        if "--output" not in words[:-1]:
            raise InputError(f"{file.name} needs --output, to resume from when it is queued again")
        output = Path(words[words.index("--output") + 1]).absolute()
    check_slurm()
    if RANKS.get(file.name) == "launcher":
        _rehearse(words)
    job = submit(Step(words, output, gpus, nodes), settings, folder, file.stem)
    return str(job.job_id), Path(job.paths.stdout)


def _rehearse(words: Sequence[str]) -> None:
    """Raise InputError if the tool's --dry-run fails, before the job waits in the queue."""
    answer = subprocess.run([*launch(words, 0), "--dry-run"], capture_output=True, text=True)
    if answer.returncode:
        raise InputError(last_error(answer.stderr) or f"{words[0]} --dry-run fails")


def _ignore_warnings() -> None:
    """In the child: SLURM may send a job's warning to all its processes; it would end ours."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
