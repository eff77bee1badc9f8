"""A suite from its config to its page: plan, run, report."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from core.config import ROOT, InputError
from report.intervals import read_intervals
from suite.estimates import Clock, expected_disk
from suite.local import Executor, LocalExecutor
from suite.page import done_runs, suite_page, write_page
from suite.plan import Plan, command, make_plan, select
from suite.records import Records, State, assessments
from suite.runner import run_plan, say, shown
from suite.schema import Suite, load_suite
from suite.slurm import SlurmExecutor, check_slurm

EXECUTORS = ("local", "slurm")


def benchmark(
    config: str,
    output: str | Path | None = None,
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
        output: folder of the suite; None: ``runs/<its name>``.
        only: comma-separated initialisations, protocols or cells; "": all.
        seeds: comma-separated, in place of the suite's; "": the suite's.
        format: of the printed tables, as in ``report.formats.write``.
        jobs: at once; 0: as many as the executor has room for.
        executor: one of ``EXECUTORS``.
        dry_run: print the plan and the commands, run nothing.
        overrides: KEY VALUE pairs that change the suite.
        tools: folder of the tools.

    Returns:
        0: all is done, 1: a job failed.

    Raises:
        InputError: anything wrong with the suite or the arguments, before anything is run.
        Stopped, KeyboardInterrupt: as ``run_plan``.
    """
    replaced = ["seeds", _seeds(seeds)] if seeds else []
    suite = load_suite(config, [*overrides, *replaced])
    name = Path(config).stem
    root = Path(output).expanduser() if output else ROOT / "runs" / name
    whole = make_plan(suite, name, root)
    plan = select(whole, [word for word in only.split(",") if word])
    place = _executor(executor, jobs, suite, whole.root)
    if dry_run:
        print_plan(plan, place.slots)
        return 0
    if executor == "slurm":
        check_slurm()
    outcome = run_plan(plan, tools, place)
    page = dataclasses.replace(
        suite_page(suite, name),
        intervals=read_intervals([whole.root]),
        remarks=tuple(outcome.remarks),
        command=f"tools/make_report.py {shown(whole.root)}",
    )
    say("")
    write_page(done_runs(whole), whole.root, page, format)
    for remark in outcome.remarks:
        print(f"! {remark}", file=sys.stderr)
    return int(bool(outcome.remarks))


def print_plan(plan: Plan, slots: int = 1) -> None:
    """Print what would be run, why, and the command lines; ``slots`` jobs would run at once."""
    counts = f"{_count(len(plan.cells), 'cell')}, {_count(len(plan.jobs), 'step')}"
    seeds = ", ".join(map(str, plan.suite.seeds))
    say(f"{plan.name}: {counts}; seeds {seeds}; in {shown(plan.root)}")
    waiting = []
    for place, (job, assessment, source) in enumerate(assessments(plan), 1):
        why = f" ({assessment.reason})" if assessment.reason else ""
        say(f"[{place}/{len(plan.jobs)}] {assessment.state.value:7}{job}{why}")
        if assessment.state in (State.DONE, State.CHECK):
            continue
        waiting.append(job)
        given = source or job.weights or f"<{job.needs}>"
        words = command(job, given, resume=assessment.state is State.RESUME)
        say("        " + shlex.join([shown(word) for word in words]))
    records = Records(plan.root)
    time = Clock(plan, records).eta(waiting, slots)
    disk = expected_disk(plan, waiting, records)
    say(f"{_count(len(waiting), 'step')} to run, expected time {time}, disk {disk}")


def _executor(name: str, jobs: int, suite: Suite, root: Path) -> Executor:
    if name == "local":
        return LocalExecutor(jobs, suite.gpus)
    if name == "slurm":
        return SlurmExecutor(suite.slurm, root, jobs)
    raise InputError(f"executor {name!r} is not one of {', '.join(EXECUTORS)}")


def _seeds(text: str) -> str:
    try:
        return str([int(word) for word in text.split(",")])
    except ValueError:
        raise InputError(f"--seeds {text}: write numbers with commas, such as 1,2,3") from None


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
