"""Tables and page of a suite, or of any run folders, from the files in them alone."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.config import InputError, load_config
from report import formats
from report.html import Page, write_report
from report.intervals import read_intervals
from report.runs import Run, find_runs, read_run
from report.timeline import is_timeline
from suite.plan import SUITE_FILE, Plan, make_plan
from suite.records import State, assessments
from suite.schema import Suite, table_options


def rebuild(
    runs: Sequence[str],
    output: str | Path | None = None,
    title: str = "",
    baseline: str = "",
    columns: str = "",
    images: int | None = None,
    score: float | None = None,
    format: str = "markdown",
) -> None:
    """Write the tables and the page of run folders, and print the tables.

    Args:
        runs: run folders, or folders of them, such as a suite's.
        output: folder to write to; None: the first of ``runs``.
        title, baseline, columns, images, score: in place of the first suite's settings; columns
            are comma-separated.
        format: of the printed tables, as in ``report.formats.write``.

    Raises:
        InputError: no such folder, no runs in it, or runs without any result row.
    """
    folders = [Path(folder) for folder in runs]
    found = {run.path.resolve(): run for folder in folders for run in runs_below(folder)}
    if not any(run.rows for run in found.values()):
        raise InputError(f"no result rows in or below {', '.join(runs)}: nothing to report")
    of_suite = next((folder for folder in folders if (folder / SUITE_FILE).is_file()), None)
    page = suite_page(read_suite(of_suite), of_suite.name) if of_suite else Page()
    options: dict[str, Any] = {
        "baseline": baseline or page.options.baseline,
        "columns": tuple(c for c in columns.split(",") if c) or page.options.columns,
    }
    given: dict[str, Any] = {"title": title or None, "images": images, "score": score}
    page = dataclasses.replace(
        page,
        options=dataclasses.replace(page.options, **options),
        intervals=read_intervals(folders),
        command=shlex.join(["tools/make_report.py", *runs]),
        **{key: value for key, value in given.items() if value is not None},
    )
    write_page(list(found.values()), Path(output or runs[0]), page, format)


def write_page(runs: list[Run], folder: Path, page: Page, format: str) -> None:
    """Write table.{md,tex,csv}, report.html and figures/ into a folder, and print the tables."""
    tables = write_report(runs, folder, page)
    print(formats.write(tables, format))
    more = ", timeline.csv" if any(is_timeline(row) for run in runs for row in run.rows) else ""
    print(f"wrote {folder}/report.html, table.md, table.tex, table.csv{more}", flush=True)


def suite_page(suite: Suite, name: str) -> Page:
    """Return the settings of a suite's page."""
    return Page(
        title=suite.title or name,
        description=suite.description,
        options=table_options(suite),
        images=suite.images,
        score=suite.score,
    )


def done_runs(plan: Plan) -> list[Run]:
    """Return the run folders of the jobs that are done, pretraining first.

    Runs whose recipe or weights are no longer those of the plan are left out.
    """
    counts = (State.DONE, State.CHECK)
    done = [job for job, assessment, _ in assessments(plan) if assessment.state in counts]
    jobs = [job for job in done if job.kind == "pretrain"] + [job for job in done if job.protocol]
    return [read_run(job.output) for job in jobs]


def runs_below(folder: Path) -> list[Run]:
    """Return the runs in or below a folder; of a suite's those that its plan calls done, if any."""
    if (folder / SUITE_FILE).is_file():
        try:
            done = done_runs(make_plan(read_suite(folder), folder.name, folder))
        except InputError:  # its configs are not here
            done = []
        if done:
            return done
    return find_runs([folder])


def read_suite(folder: Path) -> Suite:
    """Return the suite that a folder was made by."""
    return load_config(Suite, folder / SUITE_FILE)
