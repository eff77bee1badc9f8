"""A suite from its config to its table: planned, run, reported."""

import dataclasses
import sys
from pathlib import Path

from core.config import ROOT, InputError
from report import formats
from report.html import Page, write_report
from report.intervals import read_intervals
from report.runs import Run, read_run
from report.tables import Table
from suite.executors import Executor, LocalExecutor
from suite.plan import Plan, make_plan, select
from suite.records import State
from suite.runner import Outcome, dry_run, run_plan, shown, verdicts
from suite.schema import Suite, load_suite, table_options
from suite.slurm import SlurmExecutor, check_slurm

EXECUTORS = ("local", "slurm")


@dataclasses.dataclass(frozen=True)
class Request:
    """The command line of ``tools/benchmark.py``."""

    config: str
    output: str = ""
    only: str = ""  # comma-separated
    seeds: str = ""  # comma-separated
    format: str = "markdown"
    dry_run: bool = False
    jobs: int = 0  # at once; 0: as many as the executor has room for
    executor: str = "local"  # one of EXECUTORS
    overrides: list[str] = dataclasses.field(default_factory=list)


def benchmark(request: Request, tools: Path = ROOT / "tools") -> int:
    """Run what is missing, print the table, write the report; return the exit status.

    Raises:
        InputError: anything wrong with the suite or the command line, before anything is run.
    """
    overrides = list(request.overrides)
    if request.seeds:
        overrides += ["seeds", _seeds(request.seeds)]
    suite = load_suite(request.config, overrides)
    name = Path(request.config).stem
    root = Path(request.output).expanduser() if request.output else ROOT / "runs" / name
    whole = make_plan(suite, name, root)
    plan = select(whole, [word for word in request.only.split(",") if word])
    executor = _executor(request, suite, whole.root)
    if request.dry_run:
        dry_run(plan, slots=executor.slots)
        return 0
    if request.executor == "slurm":
        check_slurm()
    try:
        outcome = run_plan(plan, _say, tools, executor)
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from here")
        raise
    remarks = _remarks(outcome)
    tables = report_plan(whole, remarks, f"tools/make_report.py {shown(whole.root)}")
    print()
    print(formats.write(tables, request.format))
    for remark in remarks:
        print(f"! {remark}", file=sys.stderr)
    _say(f"tables: {shown(whole.root)}/table.md, .tex, .csv; page: {shown(whole.root)}/report.html")
    return outcome.status


def report_plan(plan: Plan, remarks: list[str], command: str) -> list[Table]:
    """Write tables and page of all that is done of a plan; return the tables.

    Runs whose recipe or weights are no longer those of the plan do not count.
    """
    suite = plan.suite
    page = Page(
        title=suite.title or plan.name,
        description=suite.description,
        options=table_options(suite),
        images=suite.images,
        score=suite.score,
        intervals=read_intervals([plan.root]),
        remarks=tuple(remarks),
        command=command,
    )
    return write_report(done_runs(plan), plan.root, page)


def done_runs(plan: Plan) -> list[Run]:
    """Return the run folders of the jobs that are done, pretraining first."""
    done = [job for job, verdict, _ in verdicts(plan) if verdict.state is State.DONE]
    folders = [job.output for job in done if job.kind == "pretrain"]
    folders += [job.output for job in done if job.protocol]
    return [read_run(folder) for folder in folders]


def _executor(request: Request, suite: Suite, root: Path) -> Executor:
    if request.executor == "local":
        return LocalExecutor(request.jobs, suite.gpus)
    if request.executor == "slurm":
        return SlurmExecutor(suite.slurm, root, request.jobs)
    raise InputError(f"executor {request.executor!r} is not one of {', '.join(EXECUTORS)}")


def _remarks(outcome: Outcome) -> list[str]:
    failed = [f"{job} has failed: {why}" for job, why in outcome.failed.items()]
    return failed + [f"{job} was not run: {why}" for job, why in outcome.blocked.items()]


def _seeds(text: str) -> str:
    try:
        return str([int(word) for word in text.split(",")])
    except ValueError:
        raise InputError(f"--seeds {text}: write numbers with commas, such as 1,2,3") from None


def _say(line: str) -> None:
    print(line, flush=True)
