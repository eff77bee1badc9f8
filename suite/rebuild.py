"""Tables and page again, from run folders alone."""

import dataclasses
import shlex
from pathlib import Path

from core.config import InputError, load_config
from report import formats
from report.html import Page, write_report
from report.intervals import read_intervals
from report.runs import Run, find_runs
from report.tables import Options, Table
from report.timeline import is_timeline
from suite.benchmark import done_runs
from suite.plan import make_plan
from suite.schema import Suite, table_options


@dataclasses.dataclass(frozen=True)
class Request:
    """The command line of ``tools/make_report.py``; what is empty or None is the suite's own."""

    runs: list[str]
    output: str = ""
    title: str = ""
    baseline: str = ""
    columns: str = ""  # comma-separated
    images: int | None = None
    score: float | None = None
    format: str = "markdown"


def rebuild(request: Request) -> list[Table]:
    """Write and print the tables, write the page; return the tables.

    Raises:
        InputError: no such folder, no runs in it, or runs without any result row.
    """
    runs = _runs(request.runs)
    if not any(run.rows for run in runs):
        raise InputError(f"no result rows in or below {', '.join(request.runs)}: nothing to report")
    page = _page(request)
    output = Path(request.output or request.runs[0])
    tables = write_report(runs, output, page)
    print(formats.write(tables, request.format))
    more = ", timeline.csv" if any(is_timeline(row) for run in runs for row in run.rows) else ""
    print(f"wrote {output}/report.html, table.md, table.tex, table.csv{more}")
    return tables


def _runs(folders: list[str]) -> list[Run]:
    """Return all runs; of a suite's folder those that its plan calls done, if any."""
    runs: dict[Path, Run] = {}
    for folder in folders:
        path = Path(folder)
        found = find_runs([path])
        if (path / "suite.yaml").is_file():
            found = _of_suite(path) or found
        for run in found:
            runs.setdefault(run.path.resolve(), run)
    return list(runs.values())


def _of_suite(folder: Path) -> list[Run]:
    """Return the runs that a suite's own plan calls done; none where its configs are not here."""
    try:
        return done_runs(make_plan(_suite(folder), folder.name, folder))
    except InputError:
        return []


def _suite(folder: Path) -> Suite:
    return load_config(Suite, folder / "suite.yaml")


def _page(request: Request) -> Page:
    """Return the page's settings: the first suite's, changed by the request."""
    page = Page(
        command=shlex.join(["tools/make_report.py", *request.runs]),
        intervals=read_intervals(request.runs),
    )
    saved = [Path(f) for f in request.runs if (Path(f) / "suite.yaml").is_file()]
    if saved:
        suite = _suite(saved[0])
        page = dataclasses.replace(
            page,
            title=suite.title or saved[0].name,
            description=suite.description,
            options=table_options(suite),
            images=suite.images,
            score=suite.score,
        )
    changes: dict[str, object] = {
        "baseline": request.baseline or page.options.baseline,
        "columns": tuple(c for c in request.columns.split(",") if c) or page.options.columns,
    }
    options: Options = dataclasses.replace(page.options, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(
        page,
        title=request.title or page.title,
        options=options,
        images=page.images if request.images is None else request.images,
        score=page.score if request.score is None else request.score,
    )
