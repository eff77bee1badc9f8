"""Runs a plan: what is missing, as commands one after another; what is done is skipped.

A failed job does not stop the others; an interrupted one goes on the next time. The runner keeps
only records and logs: everything else is what the tools write.
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
from core.results import sha256_of
from suite.child import run_child
from suite.plan import Job, Plan, check_weights, command
from suite.records import Record, Records, State, Verdict, finished, judge, make_room, product_of

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


class Clock:
    """Expects the seconds of jobs: as they took before, as others of their kind, or as declared."""

    def __init__(self, plan: Plan, records: Records) -> None:
        self.seconds: dict[str, float] = {}
        self.alike: dict[str, list[float]] = {}
        for job in plan.jobs:
            record = records.read(job)
            if record is not None and record.state == "done":
                self.note(job, record.seconds)

    def note(self, job: Job, seconds: float) -> None:
        """Learn how long a job has taken."""
        self.seconds[job.name] = seconds
        self.alike.setdefault(_kind(job), []).append(seconds)

    def expect(self, job: Job) -> float | None:
        """Return the expected seconds of a job, None where nothing is known of its like."""
        if job.name in self.seconds:
            return self.seconds[job.name]
        alike = self.alike.get(_kind(job))
        if alike:
            return sum(alike) / len(alike)
        return 60 * job.minutes if job.minutes else None

    def eta(self, jobs: list[Job]) -> str:
        """Return the expected time of jobs; "≥" where some of them are unknown."""
        known = [seconds for job in jobs if (seconds := self.expect(job)) is not None]
        if jobs and not known:
            return "--:--"
        return ("≥ " if len(known) < len(jobs) else "") + clock_time(sum(known))


def run_plan(plan: Plan, say: Say = print, tools: Path = ROOT / "tools") -> Outcome:
    """Run what is missing of a plan.

    Args:
        say: gets every line of our own; the children write to stdout.
        tools: folder of the tools.

    Raises:
        InputError: a given checkpoint is missing, or another runner (or a job that it has left)
            is at work in the suite's folder. Nothing has been run.
        KeyboardInterrupt: interrupted; a later call goes on from there.
    """
    check_weights(plan)
    plan.root.mkdir(parents=True, exist_ok=True)
    with _lock(plan.root) as held:
        save_config(plan.suite, plan.root / "suite.yaml")
        records = Records(plan.root)
        clock = Clock(plan, records)
        outcome = Outcome()
        started = time.monotonic()
        for place, job in enumerate(plan.jobs, 1):
            head = f"[{place}/{len(plan.jobs)}] {describe(job)}"
            if job.needs and job.needs not in outcome.done:
                outcome.blocked[job.name] = f"{job.needs} has failed"
                say(f"{head}: not run, for {job.needs} has failed")
                continue
            source = source_of(plan, job, records)
            verdict = judge(job, records.read(job), source)
            if verdict.state is State.DONE:
                outcome.done.append(job.name)
                say(f"{head}: done already")
                continue
            rest = _still_to_run(plan, records, job)
            elapsed = clock_time(time.monotonic() - started)
            say(f"{head}: elapsed {elapsed}, ETA {clock.eta(rest)}")
            problem = _run_job(plan, job, source, verdict, records, say, tools, held)
            if problem:
                outcome.failed[job.name] = problem
                say(f"{head}: FAILED, {problem}")
            else:
                outcome.done.append(job.name)
                record = records.read(job)
                clock.note(job, record.seconds if record else 0.0)
        return outcome


def verdicts(plan: Plan) -> Iterator[tuple[Job, Verdict, Path | None]]:
    """Yield every job with what is to be done about it and its input, without running anything."""
    records = Records(plan.root)
    done: set[str] = set()
    for job in plan.jobs:
        source = source_of(plan, job, records) if not job.needs or job.needs in done else None
        verdict = judge(job, records.read(job), source)
        if job.needs and job.needs not in done and verdict.state is not State.RERUN:
            verdict = Verdict(State.RUN)
        if verdict.state is State.DONE:
            done.add(job.name)
        yield job, verdict, source


def dry_run(plan: Plan, say: Say = print) -> None:
    """Print what would be run, why, and the command lines."""
    suite = plan.suite
    counts = f"{_count(len(plan.cells), 'cell')}, {_count(len(plan.jobs), 'step')}"
    say(f"{plan.name}: {counts}; seeds {', '.join(map(str, suite.seeds))}; in {shown(plan.root)}")
    clock = Clock(plan, Records(plan.root))
    waiting = []
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
    say(f"{_count(len(waiting), 'step')} to run, expected time {clock.eta(waiting)}")


def source_of(plan: Plan, job: Job, records: Records) -> Path | None:
    """Return a job's input: the given weights, or the product of what it needs."""
    if job.weights is not None:
        return job.weights if job.weights.is_file() else None
    if not job.needs:
        return None
    needed = plan.job(job.needs)
    return product_of(needed, records.read(needed))


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


def clock_time(seconds: float) -> str:
    """Return seconds as ``2:03`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def log_of(plan: Plan, job: Job) -> Path:
    """Return the log file of a job."""
    return plan.root / "logs" / (job.name.replace("/", "--") + ".log")


def _run_job(
    plan: Plan,
    job: Job,
    source: Path | None,
    verdict: Verdict,
    records: Records,
    say: Say,
    tools: Path,
    held: int,
) -> str:
    """Run one job and keep its record; return "" or what went wrong."""
    old = records.read(job)
    resume = verdict.state is State.RESUME
    if verdict.reason:
        say(f"  {verdict.reason}: " + ("going on" if resume else "running it from the beginning"))
    if not resume:
        kept = make_room(job, old)
        if kept is not None:
            say(f"  what was there is kept as {shown(kept)}")
    job.output.parent.mkdir(parents=True, exist_ok=True)
    words = command(job, str(source), resume, plan.suite.gpus, tools)
    record = Record(
        job.name, "started", job.recipe, sha256_of(source) if source else "", words,
        seconds=old.seconds if old is not None and resume else 0.0,
    )  # fmt: skip
    records.write(job, record)
    log = log_of(plan, job)
    started = time.monotonic()
    try:
        record.status = run_child(words, log, held=[held])
    except KeyboardInterrupt:
        record.seconds += time.monotonic() - started
        records.write(job, record)
        raise
    record.seconds += time.monotonic() - started
    problem = f"exit status {record.status}" if record.status else finished(job, record)
    record.state = "failed" if problem else "done"
    records.write(job, record)
    return f"{problem}; log: {shown(log)}" if problem else ""


def _kind(job: Job) -> str:
    """Return what jobs of about equal length share: initialisation, protocol, or conversion."""
    return f"{job.kind} {job.init if job.kind == 'pretrain' else job.protocol}"


def _still_to_run(plan: Plan, records: Records, current: Job) -> list[Job]:
    """Return the current job and the later ones that are not done (as far as one can know now)."""
    later = plan.jobs[plan.jobs.index(current) :]
    redone = {current.name}
    for job in later[1:]:
        record = records.read(job)
        if job.needs in redone or record is None or record.state != "done":
            redone.add(job.name)
    return [job for job in later if job.name in redone]


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
