"""Figures with matplotlib: loss curves and trial dots, as files and as inline SVG.

Colours are Okabe and Ito's, which colour-blind readers tell apart; every initialisation also has
its own dash and marker. Inline SVG takes ink and grid from the page, so that it fits a dark one.
"""

import dataclasses
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from report.formats import number
from report.runs import Curve
from report.tables import Table, heading

INK, GRID, PAPER = "#1b1c1d", "#d8dadc", "#ffffff"  # exact: replaced by CSS in the inline form
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (3, 1.5), (8, 3))
MARKERS = ("o", "s", "^", "D", "v", "P")
POINTS = 80  # a curve is averaged down to at most so many points


@dataclasses.dataclass(frozen=True)
class Style:
    """How one initialisation is drawn everywhere."""

    colour: str
    dashes: tuple[float, ...]
    marker: str


def styles(inits: Sequence[str]) -> dict[str, Style]:
    """Give each initialisation its colour, dash and marker, by position."""
    return {
        init: Style(
            PALETTE[n % len(PALETTE)],
            DASHES[(n + n // len(PALETTE)) % len(DASHES)],
            MARKERS[n % len(MARKERS)],
        )
        for n, init in enumerate(dict.fromkeys(inits))
    }


def curves_figure(
    curves: Sequence[tuple[str, Curve]], style: dict[str, Style], title: str, x: str = "iteration"
) -> Figure:
    """Draw a line per (initialisation, curve) over ``x``; the seeds of one share a style.

    Args:
        curves: (initialisation, points), each averaged down to 80 points.
    """
    with figure_style():
        figure = Figure(figsize=(3.5, 2.4), layout="constrained")
        axes = figure.add_subplot()
        for init, curve in curves:
            xs, ys = zip(*thinned(curve), strict=True)
            look = style[init]
            axes.plot(
                xs, ys, color=look.colour, dashes=look.dashes or (None, None), linewidth=1.6,
                marker=look.marker, markevery=0.12, markersize=3.6, markeredgewidth=0,
                solid_capstyle="round",
            )  # fmt: skip
        axes.set_title(title, loc="left")
        axes.set_xlabel(x)
        axes.grid(axis="y")
        return figure


def trials_figure(table: Table, metric: str, style: dict[str, Style]) -> Figure:
    """Draw a metric per initialisation: a dot per trial, mean ± std a bar, published a ring."""
    measured = [line for line in table.lines if line.cells[metric].trials]
    rings = {
        line.init: value
        for line in table.published
        if isinstance(value := line.values[metric], float)
    }
    with figure_style():
        figure = Figure(figsize=(3.5, 0.7 + 0.4 * max(1, len(measured))), layout="constrained")
        axes = figure.add_subplot()
        for place, line in enumerate(measured):
            cell, look = line.cells[metric], style[line.init]
            values = [value for _, value in cell.trials]
            if cell.std is not None:
                axes.errorbar(
                    cell.mean or 0.0, place, xerr=cell.std, fmt="|", markersize=13,
                    markeredgewidth=1.6, color=look.colour, capsize=0, elinewidth=1.6,
                )  # fmt: skip
            axes.plot(
                values, [place] * len(values), linestyle="", marker=look.marker, markersize=5.5,
                color=look.colour, alpha=0.9, markeredgewidth=0,
            )  # fmt: skip
            axes.annotate(
                number(cell.mean, table.decimals), (cell.mean or 0.0, place), (0, 8),
                textcoords="offset points", ha="center", fontsize=7.5, color=INK,
            )  # fmt: skip
            if line.init in rings:
                axes.plot(
                    [rings[line.init]], [place], linestyle="", marker="o", markersize=9,
                    markerfacecolor="none", markeredgecolor=INK,
                )  # fmt: skip
        axes.set_yticks(range(len(measured)), [line.label for line in measured])
        axes.set_ylim(len(measured) - 0.4, -0.75)
        axes.margins(x=0.12)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_title(f"{_words(metric)} in {table.unit}", loc="left")
        return figure


def thinned(curve: Curve, points: int = POINTS) -> Curve:
    """Average a curve down to at most ``points`` means over equal runs of neighbours."""
    if len(curve) <= points:
        return curve
    edges = [round(n * len(curve) / points) for n in range(points + 1)]
    parts = [curve[a:b] for a, b in itertools.pairwise(edges)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def save_figure(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write ``name.png`` (200 dpi) and ``name.svg`` on white paper; return both paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    with figure_style():
        figure.savefig(paths[0], dpi=200, facecolor=PAPER, metadata={"Software": None})
        figure.savefig(paths[1], facecolor=PAPER, metadata={"Date": None, "Creator": None})
    return paths


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Return an ``<svg>`` element for HTML: no outside addresses, own ids, the page's ink and grid.

    Args:
        name: unique on the page; stands before every id.
        description: what the figure shows, for those who do not see it.
    """
    buffer = io.StringIO()
    with figure_style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--line)")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _words(metric: str) -> str:
    """Return a metric's heading on one line: ``AP^bbox`` as ``bbox AP``."""
    name, _, family = heading(metric).partition("^")
    return f"{family} {name}".strip()


@contextmanager
def figure_style() -> Iterator[None]:
    """Set fonts, ink and grid for figures made inside; global settings stay as they were."""
    settings: dict[Any, Any] = {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "font.family": "sans-serif",
        "font.size": 8.5,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.edgecolor": GRID,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
    }
    with matplotlib.rc_context(settings):
        yield
