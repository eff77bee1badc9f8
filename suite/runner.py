"""Runs a plan: what is missing, as commands; what is done is skipped.

A job starts when what it needs is done and its executor has room. A failed job does not stop the
others; an interrupted one goes on the next time. The runner keeps only records and logs:
everything else is what the tools write.
"""

import contextlib
import dataclasses
import fcntl
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from core.config import ROOT, InputError, save_config
from core.errors import STOPPED_STATUS
from core.results import sha256_of
from suite.child import sigterm_interrupts
from suite.clock import Clock, clock_time
from suite.executors import Attempt, End, Executor, LocalExecutor, Task
from suite.plan import Job, Plan, check_weights, command
from suite.records import (
    Record,
    Records,
    State,
    Verdict,
    finished,
    judge,
    make_room,
    source_of,
    verdicts,
)
from suite.space import expected_disk

Say = Callable[[str], None]


@dataclasses.dataclass
class Outcome:
    """How the jobs of a plan ended, by name."""

    done: list[str] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # job → why, and its log
    blocked: dict[str, str] = dataclasses.field(default_factory=dict)  # job → what failed before it

    @property
    def status(self) -> int:
        """Return the exit status: 1 where anything failed."""
        return 1 if self.failed or self.blocked else 0


def run_plan(
    plan: Plan,
    say: Say = print,
    tools: Path = ROOT / "tools",
    executor: Executor | None = None,
) -> Outcome:
    """Run what is missing of a plan.

    Args:
        say: gets every line of our own; children that run alone write to stdout.
        tools: folder of the tools.
        executor: where jobs run; None: on this machine, one after another.

    Raises:
        InputError: a given checkpoint is missing, or another runner (or a job that it has left)
            is at work in the suite's folder. Nothing has been run.
        KeyboardInterrupt: interrupted; a later call goes on from there.
    """
    check_weights(plan)
    plan.root.mkdir(parents=True, exist_ok=True)
    with _lock(plan.root) as held, sigterm_interrupts():
        save_config(plan.suite, plan.root / "suite.yaml")
        return _Runner(plan, say, tools, executor or LocalExecutor(jobs=1), held).run()


@dataclasses.dataclass
class _Running:
    """A job under way."""

    job: Job
    attempt: Attempt
    record: Record
    started: float


class _Runner:
    """Starts what is ready, settles what has ended, until nothing is left."""

    def __init__(self, plan: Plan, say: Say, tools: Path, executor: Executor, held: int) -> None:
        self.plan, self.say, self.tools, self.executor = plan, say, tools, executor
        self.held = held
        self.records = Records(plan.root)
        self.clock = Clock(plan, self.records)
        self.outcome = Outcome()
        self.waiting = list(plan.jobs)
        self.running: dict[str, _Running] = {}
        self.began = time.monotonic()

    def run(self) -> Outcome:
        """Run all; an interruption lets what runs save and end."""
        try:
            while self.waiting or self.running:
                self._start_what_is_ready()
                if self.running:
                    self.executor.wait()
                for work in list(self.running.values()):
                    end = work.attempt.ended()
                    if end is not None:
                        self._settle(work, end)
        except KeyboardInterrupt:
            note = self.executor.stop()
            for work in self.running.values():
                end = work.attempt.ended()
                work.record.seconds += end.seconds if end else 0.0
                self.records.write(work.job, work.record)
            if note:
                self.say(note)
            raise
        return self.outcome

    def _start_what_is_ready(self) -> None:
        unsettled = {*self.running, *(job.name for job in self.waiting)}
        for job in list(self.waiting):
            if len(self.running) >= self.executor.slots:
                return
            if job.needs in unsettled:
                continue
            self.waiting.remove(job)
            if job.needs and job.needs not in self.outcome.done:
                self.outcome.blocked[job.name] = f"{job.needs} has failed"
                self.say(f"{self._head(job)}: not run, for {job.needs} has failed")
            else:
                self._start(job)
            if job.name not in self.running:
                unsettled.remove(job.name)

    def _start(self, job: Job) -> None:
        """Start a job, or take up its attempt of an earlier call, unless it is done."""
        source = source_of(self.plan, job, self.records)
        old = self.records.read(job)
        verdict = judge(job, old, source)
        if verdict.state is State.DONE:
            self.outcome.done.append(job.name)
            self.say(f"{self._head(job)}: done already")
            return
        if old is not None and old.state == "started" and old.ticket:
            attempt = self.executor.again(self._task(job, old.command), old.ticket)
            if attempt is not None and verdict.state is State.RERUN:
                self._fail(job, f"{attempt.ticket} still runs it, but {verdict.reason}: end that")
                return
            if attempt is not None:
                self.running[job.name] = _Running(job, attempt, old, time.monotonic())
                self.say(f"{self._head(job)}: {attempt.ticket} is at it already")
                return
        try:
            work = self._launch(job, old, source, verdict)
        except InputError as error:  # SLURM does not take it
            self._fail(job, str(error))
            return
        self.running[job.name] = work
        if not self._alone:
            ticket = f" as {work.attempt.ticket}" if work.attempt.ticket else ""
            log = shown(log_of(self.plan, job))
            self.say(f"{self._head(job)}: started{ticket}, {self._times()}; log: {log}")

    def _launch(
        self, job: Job, old: Record | None, source: Path | None, verdict: Verdict
    ) -> _Running:
        resume = verdict.state is State.RESUME
        if self._alone:
            self.say(f"{self._head(job)}: {self._times(job)}")
        if verdict.reason:
            how = "going on" if resume else "running it from the beginning"
            self.say(f"  {job.name}: {verdict.reason}: {how}")
        if not resume:
            kept = make_room(job.output, ours=old is not None)
            if kept is not None:
                self.say(f"  what was there is kept as {shown(kept)}")
        job.output.parent.mkdir(parents=True, exist_ok=True)
        given = str(source or job.weights)
        words = command(job, given, resume, self.plan.suite.gpus, self.tools)
        record = Record(
            job.name, "started", job.recipe, sha256_of(source) if source else "", words,
            seconds=old.seconds if old is not None and resume else 0.0,
        )  # fmt: skip
        self.records.write(job, record)
        attempt = self.executor.start(self._task(job, words), self.held)
        if attempt.ticket:
            record.ticket = attempt.ticket
            self.records.write(job, record)
        return _Running(job, attempt, record, time.monotonic())

    def _settle(self, work: _Running, end: End) -> None:
        """Judge and record how an attempt has ended."""
        job, record = work.job, work.record
        del self.running[job.name]
        record.seconds += end.seconds
        record.status = end.status
        if end.status == STOPPED_STATUS:  # the record stays "started"
            problem = "a signal has stopped it, all is saved: the same command goes on"
        else:
            problem = end.why or (f"exit status {end.status}" if end.status else "")
            problem = problem or finished(job, record)
            record.state = "failed" if problem else "done"
        self.records.write(job, record)
        if problem:
            self._fail(job, f"{problem}; log: {shown(log_of(self.plan, job))}")
            return
        self.outcome.done.append(job.name)
        self.clock.note(job, record.seconds)
        if not self._alone:
            took = clock_time(record.seconds)
            self.say(f"{self._head(job)}: done in {took}, {self._times()}")

    def _fail(self, job: Job, problem: str) -> None:
        self.outcome.failed[job.name] = problem
        self.say(f"{self._head(job)}: FAILED, {problem}")

    @property
    def _alone(self) -> bool:
        return self.executor.slots == 1

    def _head(self, job: Job) -> str:
        place = self.plan.jobs.index(job) + 1
        return f"[{place}/{len(self.plan.jobs)}] {describe(job)}"

    def _times(self, next_job: Job | None = None) -> str:
        """Return the time since the beginning and the one that is expected until the end."""
        passed = {name: time.monotonic() - work.started for name, work in self.running.items()}
        rest = self._still_to_run([*self.running, *([next_job.name] if next_job else [])])
        eta = self.clock.eta(rest, self.executor.slots, passed)
        return f"elapsed {clock_time(time.monotonic() - self.began)}, ETA {eta}"

    def _still_to_run(self, current: list[str]) -> list[Job]:
        """Return the current jobs and the waiting ones that are not done, as far as one knows."""
        redone = set(current)
        for job in self.waiting:
            record = self.records.read(job)
            if job.needs in redone or record is None or record.state != "done":
                redone.add(job.name)
        return [job for job in self.plan.jobs if job.name in redone]

    def _task(self, job: Job, words: list[str]) -> Task:
        gpus = self.plan.suite.gpus if job.kind != "convert" else 0
        log = log_of(self.plan, job)
        return Task(job.name, words, job.output, log, gpus, resumes=job.kind != "convert")


def print_plan(plan: Plan, say: Say = print, slots: int = 1) -> None:
    """Print what would be run, why, and the command lines; ``slots`` jobs would run at once."""
    suite = plan.suite
    counts = f"{_count(len(plan.cells), 'cell')}, {_count(len(plan.jobs), 'step')}"
    say(f"{plan.name}: {counts}; seeds {', '.join(map(str, suite.seeds))}; in {shown(plan.root)}")
    records, waiting = Records(plan.root), []
    for place, (job, verdict, source) in enumerate(verdicts(plan), 1):
        why = f" ({verdict.reason})" if verdict.reason else ""
        say(f"[{place}/{len(plan.jobs)}] {verdict.state.value:7}{describe(job)}{why}")
        if verdict.state is State.DONE:
            continue
        waiting.append(job)
        given = str(source or job.weights or f"<{job.needs}>")
        resume = verdict.state is State.RESUME
        words = command(job, given, resume, suite.gpus)
        say("        " + shlex.join([shown(word) for word in words]))
    time = Clock(plan, records).eta(waiting, slots)
    disk = expected_disk(plan, waiting, records)
    say(f"{_count(len(waiting), 'step')} to run, expected time {time}, disk {disk}")


def describe(job: Job) -> str:
    """Return a job in words: ``pretrain ctc, seed 1`` or ``<protocol> ctc, seed 1``."""
    seed = "" if job.weights is not None else f", seed {job.seed}"
    return f"{job.protocol or job.kind} {job.init}{seed}"


def shown(word: str | Path) -> str:
    """Return a path as short as it can be from here, and Python as ``python``."""
    word = str(word)
    if word == sys.executable:
        return "python"
    here = str(Path.cwd()) + os.sep
    return word[len(here) :] if word.startswith(here) else word


def log_of(plan: Plan, job: Job) -> Path:
    """Return the log file of a job."""
    return plan.root / "logs" / (job.name.replace("/", "--") + ".log")


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[int]:
    """Hold the suite's folder; children hold it on, so that no two write to one run."""
    descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{root} is in use by another benchmark, or by a step that one has left running: "
                "wait for it or end it"
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
