"""Runs the jobs of a plan that are not done, as commands.

A job starts when the job that it needs is done and the executor has room. A failed job does not
stop the others; the next call resumes an interrupted one. The runner writes records and logs only,
the tools write everything else.
"""

import contextlib
import dataclasses
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core.config import ROOT, InputError, save_config
from core.errors import STOPPED_STATUS, Stopped
from core.files import check_not_locked, locked
from core.identity import announced
from core.progress import format_seconds
from core.signals import StopRequests
from suite.estimates import Clock
from suite.local import (
    Attempt,
    End,
    Executor,
    LocalExecutor,
    Task,
    holder_of,
    is_held,
    last_error,
    write_out,
)
from suite.plan import SUITE_FILE, Job, Plan, check_weights, command
from suite.records import (
    Assessment,
    Record,
    Records,
    State,
    assess,
    file_name,
    made_by,
    make_room,
    rows_of,
    sha256_of_file,
    source_of,
)

OTHER = {"config": "another recipe", "data": "other data", "version": "another version"}
LAST_BYTES = 20_000  # of a log, among which the reason of a failure is looked for


@dataclasses.dataclass
class Outcome:
    """How the jobs of a plan ended, by name."""

    done: set[str] = dataclasses.field(default_factory=set)
    remarks: list[str] = dataclasses.field(default_factory=list)  # on those that failed or wait


def run_plan(plan: Plan, tools: Path = ROOT / "tools", executor: Executor | None = None) -> Outcome:
    """Run what is missing of a plan.

    Args:
        tools: folder of the tools.
        executor: where jobs run; None: on this machine, one after another.

    Raises:
        InputError: a given checkpoint does not exist, another runner is at work in the suite's
            folder, or a job that is not in the plan. Nothing has been run.
        Stopped, KeyboardInterrupt: after a signal or Ctrl-C; the running jobs have saved and ended.
    """
    check_weights(plan)
    with locked(plan.root, by="another benchmark"):
        names = {file_name(job) for job in plan.jobs}
        for file in sorted((plan.root / "jobs").glob("*.lock")):
            if file.stem not in names and is_held(file):
                raise InputError(
                    f"{file.stem} still runs ({holder_of(file)}), left by an earlier call and not "
                    "among these cells: include it, wait for it, or end it"
                )
        save_config(plan.suite, plan.root / SUITE_FILE)
        return _Runner(plan, tools, executor or LocalExecutor(jobs=1)).run()


@dataclasses.dataclass
class _Running:
    """A job under way."""

    job: Job
    attempt: Attempt
    record: Record
    started: float


class _Runner:
    """Starts the jobs that are ready and records those that have ended, until none is left."""

    def __init__(self, plan: Plan, tools: Path, executor: Executor) -> None:
        self.plan, self.tools, self.executor = plan, tools, executor
        self.records = Records(plan.root)
        self.clock = Clock(plan, self.records)
        self.outcome = Outcome()
        self.waiting = list(plan.jobs)
        self.running: dict[str, _Running] = {}
        self.identities: dict[tuple[str, int], dict[str, Any]] = {}
        self.stopped: Callable[[], bool] = bool  # whether a stop signal has come
        self.stops = False  # whether what runs has been asked to end
        self.began = time.monotonic()

    def run(self) -> Outcome:
        """Run all.

        Raises:
            Stopped, KeyboardInterrupt: after a signal, once what runs has saved and ended.
        """
        with StopRequests() as requests, counted_interrupts() as interrupts:
            self.stopped = lambda: bool(requests.requested or interrupts)
            try:
                self._take_up()
                while (self.waiting or self.running) and not self.stopped():
                    self._start_next()
                    if self.running:
                        self.executor.wait()
                    self._record_ended()
            finally:  # after a signal, and after an error
                self.stops = True
                note = self.executor.stop(lambda: len(interrupts)) if self.running else ""
                self._record_ended()
                say(note) if note else None
            if requests.requested:
                name = requests.requested.name
                raise Stopped(f"stopped by {name}; the same command resumes from here")
            if interrupts:
                say("stopped; the same command resumes from here")
                raise KeyboardInterrupt
        return self.outcome

    def _take_up(self) -> None:
        """Find the jobs that an earlier call left running."""
        for job in self.plan.jobs:
            record = self.records.read(job)
            ticket = record.ticket if record and record.state == "started" else ""
            try:
                attempt = self.executor.again(self._task(job, []), ticket)
            except InputError as error:
                self._fail(job, str(error))
                continue
            if attempt is None:
                continue
            assessment = assess(job, self.records, source_of(self.plan, job, self.records))
            if assessment.state is State.RERUN:
                self._fail(job, f"{attempt.ticket} runs it, but {assessment.reason}: end that")
                continue
            self.waiting.remove(job)
            known = record or Record("started", {}, "")  # else damaged
            self.running[job.name] = _Running(job, attempt, known, time.monotonic())
            say(f"{self._head(job)}: {attempt.ticket} runs it already")

    def _start_next(self) -> None:
        """Start the first jobs that are ready, as many as there is room for."""
        for job in list(self.waiting):
            if len(self.running) >= self.executor.slots or self.stopped():
                return
            if job.needs in {*self.running, *(other.name for other in self.waiting)}:
                continue
            if job.needs and job.needs not in self.outcome.done:
                self.waiting.remove(job)
                self.outcome.remarks.append(f"{job.name} was not run: {job.needs} has failed")
                say(f"{self._head(job)}: not run, {job.needs} has failed")
                continue
            try:
                self._start(job)
            except InputError as error:  # SLURM or the tool's check refuses it
                self._fail(job, str(error))

    def _start(self, job: Job) -> None:
        """Start a job, unless it is done."""
        source = source_of(self.plan, job, self.records)
        assessment = assess(job, self.records, source)
        if assessment.state is State.CHECK:
            assessment = self._checked(job, source, assessment.reason)
        record = self.records.read(job)
        if assessment.state is State.DONE:
            if record is not None and record.state != "done":
                self._complete(job, record)
            self.waiting.remove(job)
            self.outcome.done.add(job.name)
            say(f"{self._head(job)}: done already")
            return
        if job.output.is_dir():
            check_not_locked(job.output)
        resume = assessment.state is State.RESUME
        alone = self.executor.slots == 1
        if alone:
            say(f"{self._head(job)}: {self._times(job)}")
        if assessment.reason:
            how = "resuming it" if resume else "running it from the beginning"
            say(f"  {job.name}: {assessment.reason}: {how}")
        known = record is not None or self.records.is_damaged(job)
        kept = None if resume else make_room(job.output, ours=known)
        if kept is not None:
            say(f"  what was there is kept as {shown(kept)}")
        job.output.parent.mkdir(parents=True, exist_ok=True)
        words = command(job, source or job.weights, resume, tools=self.tools)
        weights = sha256_of_file(source) if source else ""
        new = Record("started", job.recipe, weights, began=time.time())
        if resume and record is not None:
            new.seconds, new.began = record.seconds, record.began
        self.records.write(job, new)

        def note(ticket: str) -> None:
            new.ticket = ticket
            self.records.write(job, new)

        attempt = self.executor.start(self._task(job, words), note)
        self.waiting.remove(job)
        self.running[job.name] = _Running(job, attempt, new, time.monotonic())
        if not alone:
            log = shown(self._log(job))
            say(f"{self._head(job)}: started as {attempt.ticket}, {self._times()}; log: {log}")

    def _checked(self, job: Job, source: Path | None, reason: str) -> Assessment:
        """Return DONE if a job's rows have the identity that the tool would give them today."""
        weights = sha256_of_file(source) if source else ""
        began, rows = time.time(), rows_of(job, weights if job.protocol else "")
        if rows:  # random weights have none: they depend on their recipe alone
            today = self._identity(job, source)
            there = {key: sorted({getattr(row, key) for row in rows}) for key in today}
            other = [OTHER[key] for key, values in there.items() if values != today[key]]
            if other:
                return Assessment(State.RERUN, f"{reason}; its rows are of {' and '.join(other)}")
        record = self.records.read(job) or Record("done", {}, "")
        record.recipe, record.source, record.began = job.recipe, weights, began
        self._complete(job, record)
        return Assessment(State.DONE)

    def _identity(self, job: Job, source: Path | None) -> dict[str, Any]:
        """Return the identity of the rows that a job's tool would write; no input changes it."""
        key = (job.protocol or job.name, job.seed)
        if key not in self.identities:
            words = command(job, source or job.weights, rehearse=True, tools=self.tools)
            answer = subprocess.run(words, capture_output=True, text=True, start_new_session=True)
            found = announced(answer.stdout)
            if answer.returncode or found is None:
                why = last_error(answer.stderr) or "--dry-run gives no identity"
                raise InputError(f"its rows cannot be checked: {why}")
            self.identities[key] = {name: sorted(set(values)) for name, values in found.items()}
        return self.identities[key]

    def _complete(self, job: Job, record: Record) -> str:
        """Record that a job is done; return what it lacks for that, or ""."""
        record.state = "done"
        record.made = made_by(job, record.source, record)
        if not record.made:
            record.state = "failed"
        self.records.note_data(job, record, record.began)
        self.records.write(job, record)
        what = "result rows" if job.protocol else "checkpoint"
        return "" if record.made else f"it left no {what} in {job.output}"

    def _record_ended(self) -> None:
        for work in list(self.running.values()):
            end = work.attempt.ended()
            if end is not None:
                self._end(work, end)

    def _end(self, work: _Running, end: End) -> None:
        """Record how an attempt has ended."""
        job, record = work.job, work.record
        del self.running[job.name]
        record.seconds += end.seconds
        if end.status is None:  # what it has made decides
            if not self.records.is_damaged(job):
                self.records.write(job, record)
            self.waiting.insert(0, job)
            return
        problem = ""
        if end.status == 0 and not end.why:
            problem = self._complete(job, record)
        elif self.stops or end.status == STOPPED_STATUS:
            self.records.write(job, record)  # as "started"
            problem = "stopped by a signal, with everything saved: the same command resumes it"
        else:
            record.state = "failed"
            self.records.write(job, record)
            problem = end.why or self._reason(job, end.status)
        if self.stops and problem:
            say(f"{self._head(job)}: interrupted")
            return
        if problem:
            self._fail(job, f"{problem}; log: {shown(self._log(job))}")
            return
        self.outcome.done.add(job.name)
        self.clock.note(job, record.seconds)
        if self.executor.slots > 1:
            took = format_seconds(record.seconds)
            say(f"{self._head(job)}: done in {took}, {self._times()}")

    def _reason(self, job: Job, status: int) -> str:
        """Return why a job has failed: its status, and the error that its log ends with."""
        text = ""
        with contextlib.suppress(OSError), self._log(job).open("rb") as log:
            log.seek(max(log.seek(0, 2) - LAST_BYTES, 0))
            text = "\n" + log.read().decode(errors="replace")
        said = last_error(text.rpartition("\n$ ")[2].partition("\n")[2])  # after its command
        how = f"exit status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"
        return f"{how}: {said}" if said else how

    def _fail(self, job: Job, problem: str) -> None:
        if job in self.waiting:
            self.waiting.remove(job)
        self.outcome.remarks.append(f"{job.name} has failed: {problem}")
        say(f"{self._head(job)}: FAILED, {problem}")

    def _head(self, job: Job) -> str:
        return f"[{self.plan.jobs.index(job) + 1}/{len(self.plan.jobs)}] {job}"

    def _times(self, next_job: Job | None = None) -> str:
        """Return the time since the beginning and the expected time to the end."""
        passed = {name: time.monotonic() - work.started for name, work in self.running.items()}
        open_jobs = {*self.running, *([next_job.name] if next_job else [])}
        for job in self.waiting:
            record = self.records.read(job)
            if job.needs in open_jobs or record is None or record.state != "done":
                open_jobs.add(job.name)
        rest = [job for job in self.plan.jobs if job.name in open_jobs]
        eta = self.clock.eta(rest, self.executor.slots, passed)
        return f"elapsed {format_seconds(time.monotonic() - self.began)}, ETA {eta}"

    def _task(self, job: Job, words: list[str]) -> Task:
        lock = self.records.path(job).with_suffix(".lock")
        log = self._log(job)
        return Task(job.name, words, job.output, log, lock, job.gpus, job.kind != "convert")

    def _log(self, job: Job) -> Path:
        return self.plan.root / "logs" / f"{file_name(job)}.log"


@contextlib.contextmanager
def counted_interrupts() -> Iterator[list[int]]:
    """Within the block Ctrl-C only adds to the list; if it is ignored, it stays ignored."""
    seen: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if before is signal.SIG_IGN or not main:
        yield seen
        return
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def say(line: str) -> None:
    """Print a line at once."""
    write_out(f"{line}\n".encode())


def shown(word: str | Path) -> str:
    """Return a path as short as it can be from here, and Python as ``python``."""
    word = str(word)
    if word == sys.executable:
        return "python"
    return word.removeprefix(f"{Path.cwd()}/")
