"""A suite from its config to its table: planned, run, reported."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from core.config import ROOT, InputError
from report.intervals import read_intervals
from suite.executors import Executor, LocalExecutor
from suite.page import done_runs, suite_page, write_page
from suite.plan import make_plan, select
from suite.runner import Outcome, print_plan, run_plan, shown
from suite.schema import Suite, load_suite
from suite.slurm import SlurmExecutor, check_slurm

EXECUTORS = ("local", "slurm")


def benchmark(
    config: str,
    output: str = "",
    only: str = "",
    seeds: str = "",
    format: str = "markdown",
    jobs: int = 0,
    executor: str = "local",
    dry_run: bool = False,
    overrides: Sequence[str] = (),
    tools: Path = ROOT / "tools",
) -> int:
    """Run what is missing of a suite, print its tables, write its page; return the exit status.

    Args:
        config: the suite, as given or under ``configs/suites``.
        output: folder of the suite; "": ``runs/<its name>``.
        only: comma-separated initialisations, protocols or cells; "": all.
        seeds: comma-separated, in place of the suite's; "": the suite's.
        format: of the printed tables, as in ``report.formats.write``.
        jobs: at once; 0: as many as the executor has room for.
        executor: one of ``EXECUTORS``.
        dry_run: print the plan and the commands, run nothing.
        overrides: KEY VALUE pairs that change the suite.
        tools: folder of the tools.

    Raises:
        InputError: anything wrong with the suite or the arguments, before anything is run.
    """
    replaced = ["seeds", _seeds(seeds)] if seeds else []
    suite = load_suite(config, [*overrides, *replaced])
    name = Path(config).stem
    root = Path(output).expanduser() if output else ROOT / "runs" / name
    whole = make_plan(suite, name, root)
    plan = select(whole, [word for word in only.split(",") if word])
    place = _executor(executor, jobs, suite, whole.root)
    if dry_run:
        print_plan(plan, slots=place.slots)
        return 0
    if executor == "slurm":
        check_slurm()
    try:
        outcome = run_plan(plan, _say, tools, place)
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from here")
        raise
    remarks = _remarks(outcome)
    page = dataclasses.replace(
        suite_page(suite, name),
        intervals=read_intervals([whole.root]),
        remarks=tuple(remarks),
        command=f"tools/make_report.py {shown(whole.root)}",
    )
    print()
    write_page(done_runs(whole), whole.root, page, format)
    for remark in remarks:
        print(f"! {remark}", file=sys.stderr)
    return outcome.status


def _executor(name: str, jobs: int, suite: Suite, root: Path) -> Executor:
    if name == "local":
        return LocalExecutor(jobs, suite.gpus)
    if name == "slurm":
        return SlurmExecutor(suite.slurm, root, jobs)
    raise InputError(f"executor {name!r} is not one of {', '.join(EXECUTORS)}")


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
