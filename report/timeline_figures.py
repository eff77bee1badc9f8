"""Figures of timelines: the trade-off, the informations, their plane, methods compared.

``report.timeline`` gathers what is drawn from result rows.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from core.results import ResultRow
from report.figures import INK, Style, figure_style, save_figure, styles
from report.timeline import (
    ESTIMATORS,
    MINE,
    NAMES,
    NMI,
    PROBE,
    RECALL,
    TY,
    XT,
    Band,
    Data,
    axis,
    correlation,
    gather,
    information,
    paths,
    scatter,
    series,
)

WIDTH = 3.4  # inches: one column of a paper
PANEL = 1.75  # inches: height of one panel
BOUNDARY = "start of stage 2"


@dataclasses.dataclass(frozen=True)
class NamedFigure:
    """A figure with its file name and caption."""

    name: str
    figure: Figure
    description: str  # for those who do not see it, and as a caption


def timeline_figures(rows: Iterable[ResultRow]) -> list[NamedFigure]:
    """Draw all figures that the rows can fill.

    Raises:
        InputError: no row is of a timeline.
    """
    gathered, drawn = gather(rows), []
    for protocol, data in gathered.items():
        head = f"{protocol}_" if len(gathered) > 1 else ""
        drawn += [dataclasses.replace(d, name=head + d.name) for d in draw(data)]
    return drawn


def save_timeline_figures(rows: Iterable[ResultRow], folder: str | Path) -> list[Path]:
    """Write every figure as PNG and SVG; return the paths."""
    drawn = timeline_figures(rows)
    return [path for one in drawn for path in save_figure(one.figure, folder, one.name)]


def draw(data: Data, looks: Mapping[str, Style] | None = None) -> list[NamedFigure]:
    """Draw all figures of one protocol.

    Args:
        looks: how each initialisation is drawn; None: by position.
    """
    looks = looks or styles(data.inits)
    with figure_style():
        figures = [tradeoff(data, init) for init in data.inits]
        if len(data.inits) > 1:
            figures += [compared(data, name, looks) for name in data.places]
        for kind in data.estimators:
            figures += [informations(data, init, kind) for init in data.inits]
            figures += [plane(data, looks, kind), correlated(data, looks, kind)]
        figures += [companions(data, name, looks) for name in data.places]
    return [one for one in figures if one]


def tradeoff(data: Data, init: str) -> NamedFigure | None:
    """Draw discriminability (left axis) and transferability (right axis) against epochs."""
    left = [("← Recall@1", series(data, init, RECALL, data.source, "train"), 1.0)]
    left.append(("← NMI × 100", series(data, init, NMI, data.source, "train"), 100.0))
    right = [(f"{name} →", series(data, init, PROBE, name), 1.0) for name in data.targets]
    if not _is_course(band for _, band, _ in (*left, *right)):
        return None
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.add_subplot()
    other = axes.twinx()
    looks = iter(styles([label for label, _, _ in (*left, *right)]).values())
    for side, bands in ((axes, left), (other, right)):
        for label, band, factor in bands:
            _line(side, band, label, next(looks), factor)
    axes.set_ylabel("Recall@1 (%), NMI × 100")
    other.set_ylabel(NAMES[PROBE])
    other.spines["right"].set_visible(True)
    _finish(axes, data, [init])
    handles = [line for side in (axes, other) for line in side.get_legend_handles_labels()[0]]
    _legend(figure, handles)
    return NamedFigure(
        f"tradeoff_{init}", figure,
        f"{data.label(init)}: Recall@1 and NMI on the training images of {data.source} (left), and "
        f"top-1 of a linear probe on {_listed(data.targets)} (right), against epochs"
        f"{_seeds(left[0][1])}",
    )  # fmt: skip


def informations(data: Data, init: str, estimator: str = MINE) -> NamedFigure | None:
    """Draw I(X;T) and I(T;Y) against epochs, on source and targets."""
    metrics = [information(quantity, estimator) for quantity in (XT, TY)]
    bands = {(m, name): series(data, init, m, name) for m in metrics for name in data.places}
    if not _is_course(bands.values()):
        return None
    figure = Figure(figsize=(WIDTH, 0.4 + 2 * PANEL), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    looks, first = styles(data.places), bands[metrics[0], data.places[0]]
    for axes, metric in zip(panels, metrics, strict=True):
        for name in data.places:
            _line(axes, bands[metric, name], data.name(name), looks[name])
        axes.set_ylabel(axis(metric))
        _finish(axes, data, [init], last=axes is panels[-1])
    _legend(figure, panels[0].get_legend_handles_labels()[0])
    return NamedFigure(
        f"information_{init}{_tail(estimator)}", figure,
        f"{data.label(init)}: mutual information of images and features, I(X;T), and of features "
        f"and labels, I(T;Y), by {_by(estimator)}, on {data.source} (source) and "
        f"{_listed(data.targets)} (target), against epochs{_seeds(first)}",
    )  # fmt: skip


def plane(data: Data, looks: Mapping[str, Style], estimator: str = MINE) -> NamedFigure | None:
    """Draw the information plane: a panel a data set, a marker a method, a colour an epoch."""
    ways = {(n, init): paths(data, init, n, estimator) for n in data.places for init in data.inits}
    names = [name for name in data.places if any(ways[name, init] for init in data.inits)]
    if not names:
        return None
    last = max(epoch for way in ways.values() for epoch, _, _ in way)
    figure = Figure(figsize=(WIDTH, 0.5 + PANEL * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        for init in data.inits:
            way = ways[name, init]
            if not way:
                continue
            epochs, xs, ys = zip(*way, strict=True)
            axes.plot(xs, ys, color=INK, linewidth=0.5, alpha=0.4)
            dots = axes.scatter(
                xs, ys, c=epochs, cmap="viridis", vmin=0, vmax=last, s=22, edgecolors=INK,
                marker=looks[init].marker, label=data.label(init), linewidths=0.4,
            )  # fmt: skip
        axes.set_title(data.name(name), loc="left")
        axes.set_ylabel(axis(information(TY, estimator)))
        axes.grid()
    panels[-1].set_xlabel(axis(information(XT, estimator)))
    figure.colorbar(dots, ax=list(panels), label="epoch", shrink=0.8)
    _legend(figure, panels[0].get_legend_handles_labels()[0])
    return NamedFigure(
        f"plane{_tail(estimator)}", figure,
        f"Information plane: I(X;T) against I(T;Y), by {_by(estimator)}, on {_listed(names)}, "
        f"coloured by epoch, a marker for each of {_listed(list(map(data.label, data.inits)))}; "
        "means over seeds",
    )  # fmt: skip


def compared(data: Data, name: str, looks: Mapping[str, Style]) -> NamedFigure | None:
    """Draw the methods over each other on a data set, mean ± std over seeds."""
    wanted = [(RECALL, "train"), (NMI, "train")] if name == data.source else [(PROBE, "")]
    for estimator in data.estimators[:1]:
        wanted += [(information(quantity, estimator), "") for quantity in (XT, TY)]
    return _panels(data, name, looks, wanted, "compared")


def companions(data: Data, name: str, looks: Mapping[str, Style]) -> NamedFigure | None:
    """Draw the bound on H(T), rank and norm, and further estimators."""
    metrics = [
        *(information(quantity, kind) for kind in data.estimators[1:] for quantity in (XT, TY)),
        "h_t_bound", "effective_rank", "feature_norm",
    ]  # fmt: skip
    return _panels(data, name, looks, [(metric, "") for metric in metrics], "companions")


def _panels(
    data: Data,
    name: str,
    looks: Mapping[str, Style],
    wanted: Sequence[tuple[str, str]],
    head: str,
) -> NamedFigure | None:
    """Draw (metric, split) against epochs on one data set, a panel each, the methods together."""
    bands = {
        metric: {init: series(data, init, metric, name, split) for init in data.inits}
        for metric, split in wanted
    }
    bands = {metric: found for metric, found in bands.items() if _is_course(found.values())}
    if not bands:
        return None
    figure = Figure(figsize=(WIDTH, 0.6 + PANEL * len(bands)), layout="constrained")
    panels = figure.subplots(len(bands), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (metric, found) in zip(panels, bands.items(), strict=True):
        for init, band in found.items():
            _line(axes, band, data.label(init), looks[init])
        axes.set_ylabel(axis(metric))
        _finish(axes, data, data.inits, last=axes is panels[-1])
    panels[0].set_title(data.name(name), loc="left")
    _legend(figure, panels[0].get_legend_handles_labels()[0])
    counts = [f"{data.label(i)} {len(band.seeds)}" for i, band in found.items() if band.seeds]
    return NamedFigure(
        f"{head}_{name}", figure,
        f"{_listed(list(map(data.label, data.inits)))} on {name} against epochs: mean and, as a "
        f"band, ± one standard deviation over seeds (their number: {', '.join(counts)})",
    )  # fmt: skip


def correlated(data: Data, looks: Mapping[str, Style], estimator: str = MINE) -> NamedFigure | None:
    """Draw transfer accuracy against I(X;T) on each target, a point a checkpoint."""
    points = {(n, i): scatter(data, i, n, estimator) for n in data.targets for i in data.inits}
    names = [n for n in data.targets if any(points[n, i] for i in data.inits)]
    if not names:
        return None
    figure = Figure(figsize=(WIDTH, 0.5 + PANEL * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    said = []
    for axes, name in zip(panels, names, strict=True):
        together = [point for init in data.inits for point in points[name, init]]
        inits = [init for init in data.inits if points[name, init]]
        title = f"{name}: r = {_r(together)} (n = {len(together)})"
        alone = [f"{data.label(init)} {_r(points[name, init])}" for init in inits]
        said.append(f"{title}, within {', '.join(alone)}" if len(alone) > 1 else title)
        for init in inits:
            xs, ys = zip(*points[name, init], strict=True)
            axes.scatter(
                xs, ys, s=16, marker=looks[init].marker, color=looks[init].colour,
                label=data.label(init), alpha=0.8, linewidths=0,
            )  # fmt: skip
        axes.set_title(title, loc="left")
        axes.set_ylabel(NAMES[PROBE])
        axes.grid()
    panels[-1].set_xlabel(f"{axis(information(XT, estimator))} on the target")
    _legend(figure, panels[0].get_legend_handles_labels()[0])
    return NamedFigure(
        f"correlation{_tail(estimator)}", figure,
        f"Transfer accuracy against I(X;T) on the target, by {_by(estimator)}, a point for each "
        f"checkpoint after epoch 0; Pearson's r: {'; '.join(said)}",
    )  # fmt: skip


def _line(axes: Any, band: Band, label: str, style: Style, factor: float = 1.0) -> None:
    if not band.epochs:
        return
    mean = [factor * value for value in band.mean]
    axes.plot(
        band.epochs, mean, color=style.colour, dashes=style.dashes or (None, None), linewidth=1.5,
        marker=style.marker, markersize=3, markeredgewidth=0, label=label,
    )  # fmt: skip
    if any(value > 0 for value in band.std):
        low = [m - factor * s for m, s in zip(mean, band.std, strict=True)]
        high = [m + factor * s for m, s in zip(mean, band.std, strict=True)]
        axes.fill_between(band.epochs, low, high, color=style.colour, alpha=0.18, linewidth=0)


def _finish(axes: Any, data: Data, inits: Sequence[str], last: bool = True) -> None:
    for epoch in {data.boundaries[init] for init in inits if init in data.boundaries}:
        axes.axvline(epoch, color=INK, linewidth=0.9, linestyle=":", label=BOUNDARY)
    axes.grid(axis="y")
    if last:
        axes.set_xlabel("epoch")


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    columns = 2 if len(handles) > 1 and longest <= 19 else 1  # what fits one column of a paper
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)


def _is_course(bands: Iterable[Band]) -> bool:
    """Whether there is a quantity of more than one epoch."""
    return any(len(band.epochs) > 1 for band in bands)


def _r(points: Sequence[tuple[float, float]]) -> str:
    """Return Pearson's r in words."""
    r = correlation(points)
    return "–" if r is None else f"{r:.2f}".replace("-", "−")


def _by(estimator: str) -> str:
    return ESTIMATORS.get(estimator, estimator.upper())


def _tail(estimator: str) -> str:
    """Return what the names of figures end with, where it is not MINE's."""
    return "" if estimator == MINE else f"_{estimator}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"


def _seeds(band: Band) -> str:
    return f"; mean ± std over {len(band.seeds)} seeds" if len(band.seeds) > 1 else ""
