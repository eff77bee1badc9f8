"""One self-contained page (and the files beside it) from run folders alone."""

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from core.results import ResultRow
from report import formats
from report.figures import Style, curves_figure, inline_svg, save_figure, styles, trials_figure
from report.gallery import draw_gallery
from report.intervals import with_intervals
from report.overview import overviews
from report.runs import Run
from report.sections import (
    CurveGroup,
    class_tables,
    curve_groups,
    evaluated_groups,
    precision_groups,
    provenance,
    published_elsewhere,
)
from report.tables import Options, Table, build_tables, heading, short_code
from report.timeline import CurveSummary, axis, gather, is_timeline, summaries, to_csv
from report.timeline_figures import draw

HEADINGS = {"time": "seconds per iteration", "data_time": "of these waiting for data, seconds"}


@dataclasses.dataclass(frozen=True)
class Page:
    """The settings and texts of a page, beside its rows."""

    title: str = "Transfer report"
    description: str = ""
    options: Options = dataclasses.field(default_factory=Options)
    images: int = 6  # validation images to draw
    score: float = 0.5  # predictions below it are not drawn
    intervals: tuple[ResultRow, ...] = ()  # as report.intervals.read_intervals gives them
    remarks: tuple[str, ...] = ()  # e.g. cells that failed, with their logs
    command: str = ""  # how to make this page again


def write_report(runs: Sequence[Run], folder: str | Path, page: Page) -> list[Table]:
    """Write table.{md,tex,csv}, report.html and figures/ into ``folder``; return the tables.

    Overviews, where there are several tables to join, come first and have CSV files of their own.
    Timelines have figures and timeline.csv in place of tables.

    Args:
        runs: as ``report.runs.find_runs`` gives them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for run in runs for row in run.rows]
    moments = [row for row in rows if not is_timeline(row)]
    tables = [with_intervals(t, page.intervals) for t in build_tables(moments, page.options)]
    tables = [*overviews(tables, page.options), *tables]
    write_tables(tables, folder)
    if len(moments) < len(rows):
        (folder / "timeline.csv").write_text(to_csv(gather(rows)), encoding="utf-8")
    (folder / "report.html").write_text(render(runs, tables, folder, page), encoding="utf-8")
    return tables


def write_tables(tables: Sequence[Table], folder: Path) -> None:
    """Write table.md, table.tex and table.csv; overviews, which repeat, have a CSV of their own."""
    markdown = "\n".join(map(formats.to_markdown, tables))
    (folder / "table.md").write_text(markdown, encoding="utf-8")
    (folder / "table.tex").write_text("\n".join(map(formats.to_latex, tables)), encoding="utf-8")
    single = [table for table in tables if not table.name]
    (folder / "table.csv").write_text(formats.to_csv(single), encoding="utf-8")
    joined = [table for table in tables if table.name]
    for number, table in enumerate(joined, 1):
        name = "overview.csv" if number == 1 else f"overview{number}.csv"
        (folder / name).write_text(formats.to_wide_csv(table), encoding="utf-8")


def render(runs: Sequence[Run], tables: Sequence[Table], folder: Path, page: Page) -> str:
    """Return the page; its figures are also saved under ``folder/figures``."""
    rows = [row for run in runs for row in run.rows]
    inits = [*page.options.order, *(run.init for run in runs), *(row.init for row in rows)]
    style = styles(inits)
    labels = {init: page.options.labels.get(init) or init for init in dict.fromkeys(inits)}
    keep = _FigureKeeper(folder / "figures")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(formats=formats, heading=html_heading, short_code=short_code)
    single = [table for table in tables if not table.name]
    now = datetime.datetime.now(datetime.UTC)
    evaluated = evaluated_groups(runs, single)
    codes = sorted({row.code for row in rows})
    return environment.get_template("report.html.j2").render(
        page=page,
        made=now.strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
        codes=[short_code(code) for code in codes],
        tables=[_view(n, table, style, page, keep) for n, table in enumerate(tables)],
        gallery=draw_gallery(runs, labels, page.images, page.score),
        labels=labels,
        timelines=_timelines(rows, style, labels, keep),
        curves=_drawn(curve_groups(runs), style, labels, keep),
        provenance=provenance(runs, labels),
        configs=[(f"{r.path.parent.name}/{r.path.name}", r.config) for r in runs if r.config],
        classes=class_tables(evaluated, labels),
        precision=_drawn(precision_groups(evaluated), style, labels, keep),
        published=published_elsewhere(single, page.options.references),
    )


@dataclasses.dataclass
class _FigureKeeper:
    """Saves each figure beside the page and returns it for the page."""

    folder: Path

    def keep(self, figure: Figure, name: str, description: str) -> Markup:
        save_figure(figure, self.folder, name)
        return Markup(inline_svg(figure, name, description))  # escaped by matplotlib


def _view(
    number: int, table: Table, style: dict[str, Style], page: Page, keep: _FigureKeeper
) -> dict[str, Any]:
    """Return what the template needs of a table."""
    figures = []
    for metric in table.delta_columns[:2]:
        if any(line.cells[metric].trials for line in table.lines):
            name = f"trials-{number}-{metric.replace('/', '-').replace('@', '-')}"
            figure = trials_figure(table, metric, style)
            words = f"{heading(metric)} of every initialisation, a dot per trial"
            figures.append(keep.keep(figure, name, words))
    colours = {line.init: style[line.init].colour for line in table.lines if line.init in style}
    return {
        "table": table,
        "figures": figures,
        "colours": colours,
        "summary": _summary(table),
        "best": {metric: _best(table, metric) for metric in table.columns},
        "baseline": page.options.labels.get(table.baseline) or table.baseline,
        "code_note": formats.code_note(table),
        "sources": sorted({line.source for line in table.published}),
    }


def _summary(table: Table) -> list[dict[str, Any]]:
    """Return, per initialisation with a Δ, its words and (Δ, heading, interval) of each."""
    base = next((line for line in table.lines if line.init == table.baseline), None)
    if base is None:
        return []
    sentences = []
    for line in table.lines:
        parts = [
            (
                formats.signed(line.cells[m].delta, table.decimals),
                html_heading(m),
                formats.interval(line.cells[m], table.decimals),
            )
            for m in table.delta_columns
            if line.cells[m].delta is not None
        ]
        if parts:
            sentences.append({"words": f"{line.label} against {base.label}", "parts": parts})
    return sentences


def _best(table: Table, metric: str) -> str:
    """Return the best mean as it is printed; "" where all are printed alike."""
    means = [line.cells[metric].mean for line in table.lines]
    known = [mean for mean in means if mean is not None]
    printed = {formats.number(mean, table.decimals) for mean in known}
    return formats.number(max(known), table.decimals) if len(printed) > 1 else ""


def html_heading(metric: str, columns: Sequence[str] = ()) -> Markup:
    """Return a heading with raised family and lowered threshold: AP⁽ᵇᵇᵒˣ⁾, AP₅₀."""
    name, _, family = heading(metric, columns).partition("^")
    if not name.startswith("AP"):
        return Markup("{}").format(heading(metric, columns))
    lower = Markup("<sub>{}</sub>").format(name[2:]) if name[2:] else Markup("")
    upper = Markup("<sup>{}</sup>").format(family) if family else Markup("")
    return Markup("AP") + upper + lower


def _drawn(
    groups: Sequence[CurveGroup],
    style: dict[str, Style],
    labels: dict[str, str],
    keep: _FigureKeeper,
) -> list[dict[str, Any]]:
    """Return the groups of curves with their figures and legends."""
    views = []
    for group in groups:
        figures = []
        for key, curves in group.curves.items():
            words = f"{group.title}: {key} over {group.x}"
            name = "curve-" + "".join(c if c.isalnum() else "-" for c in f"{group.title} {key}")
            figure = curves_figure(curves, style, HEADINGS.get(key, key), group.x)
            figures.append(keep.keep(figure, name.lower(), words))
        inits = {init for curves in group.curves.values() for init, _ in curves}
        legend = [(labels[init], style[init]) for init in style if init in inits]
        views.append({"title": group.title, "figures": figures, "legend": legend})
    return views


def _timelines(
    rows: Sequence[ResultRow],
    style: dict[str, Style],
    labels: dict[str, str],
    keep: _FigureKeeper,
) -> list[dict[str, Any]]:
    """Return, per protocol of a timeline, its figures with their captions, and its summaries."""
    if not any(map(is_timeline, rows)):
        return []
    views = []
    for protocol, data in gather(rows, list(style), labels).items():
        figures = []
        for one in draw(data, style):
            name = "".join(c if c.isalnum() else "-" for c in f"timeline-{protocol}-{one.name}")
            figures.append((keep.keep(one.figure, name.lower(), one.description), one.description))
        lines = [_summary_line(course, data.name(course.dataset)) for course in summaries(data)]
        view = {"title": protocol, "figures": figures, "summaries": lines, "notes": data.notes}
        views.append(view)
    return views


def _summary_line(course: CurveSummary, place: str) -> dict[str, Any]:
    """Return a course as words and numbers; three decimals below 10, else two."""
    decimals = 3 if max(abs(course.highest[1]), abs(course.last[1])) < 10 else 2
    several = len(course.seeds) > 1

    def spread(mean: float, std: float, sign: bool = False) -> str:
        value = (formats.signed if sign else formats.number)(mean, decimals)
        return f"{value} ± {formats.number(std, decimals)}" if several else value

    return {
        "quantity": axis(course.metric),
        "place": f"{place}, {course.split}",
        "init": course.init,
        "highest": (course.highest[0], course.highest[1], spread(*course.highest[1:])),
        "last": (course.last[0], course.last[1], spread(*course.last[1:])),
        "change": (course.change[0], spread(*course.change, sign=True)),
        "seeds": len(course.seeds),
    }
