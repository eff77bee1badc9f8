"""A run over time, drawn: the trade-off, the informations, their plane, methods compared.

Everything is read from result rows of step "analysis". What is drawn is first gathered as plain
numbers (``series``, ``paths``, ``correlation``), so that it can be checked without looking.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from core.config import InputError
from core.results import ResultRow, latest
from report.figures import INK, Style, save_figure, styles
from report.figures import _look as figure_style

WIDTH = 3.4  # inches: one column of a paper
PANEL = 1.75  # inches: height of one panel
BOUNDARY = "start of stage 2"
XT, TY, PROBE, RECALL, NMI = "mi_xt", "mi_ty", "linear/top1", "recall@1", "nmi"
NAMES = {
    RECALL: "Recall@1 (%)",
    NMI: "NMI (0…1)",
    PROBE: "linear probe, top-1 (%)",
    XT: "I(X;T) (nat)",
    TY: "I(T;Y) (nat)",
    "h_t_bound": "bound on H(T) (nat)",
    "effective_rank": "effective rank (1)",
    "feature_norm": "feature norm (1)",
}


@dataclasses.dataclass(frozen=True)
class Band:
    """A quantity over epochs: mean and std over the seeds that measured every one of them."""

    epochs: list[int]
    mean: list[float]
    std: list[float]  # n − 1 in the denominator; 0 for one seed
    seeds: list[int]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A finished figure."""

    name: str
    figure: Figure
    description: str  # for those who do not see it, and as a caption


@dataclasses.dataclass(frozen=True)
class Data:
    """The rows of one protocol, and what they are of."""

    rows: list[ResultRow]
    source: str
    targets: list[str]
    inits: list[str]
    boundaries: dict[str, int]  # last epoch of stage 1, of the initialisations that have a stage 2


def gather(rows: Iterable[ResultRow]) -> dict[str, Data]:
    """Return the analysis rows by protocol, the newest of each measurement.

    Raises:
        InputError: there are none.
    """
    found: dict[str, list[ResultRow]] = {}
    for row in latest(rows):
        if row.step == "analysis" and row.value is not None and row.epoch is not None:
            found.setdefault(row.protocol, []).append(row)
    if not found:
        raise InputError("no rows of step analysis: run tools/run_analysis.py --run … first")
    return {protocol: _data(many) for protocol, many in found.items()}


def _data(rows: list[ResultRow]) -> Data:
    roles = {row.dataset: row.details.get("role", "target") for row in rows}
    sources = [name for name, role in roles.items() if role == "source"]
    boundaries = {row.init: row.details.get("boundary") for row in rows}
    inits = sorted({row.init for row in rows}, key=lambda init: (init == "ctc", init))
    return Data(
        rows,
        sources[0] if sources else "",
        [name for name, role in roles.items() if role != "source"],
        inits,
        {init: int(epoch) for init, epoch in boundaries.items() if epoch},
    )


def series(data: Data, init: str, metric: str, dataset: str, split: str = "") -> Band:
    """Return a quantity over the epochs that all seeds of an initialisation have.

    Args:
        split: "": the one that the metric was read on; Recall@1 and NMI of the source on train.
    """
    values: dict[int, dict[int, float]] = {}
    for row in _select(data, init, metric, dataset, split):
        assert row.epoch is not None
        assert row.value is not None
        values.setdefault(row.seed, {})[row.epoch] = row.value
    if not values:
        return Band([], [], [], [])
    epochs = sorted(set.intersection(*(set(one) for one in values.values())))
    columns = [[one[epoch] for one in values.values()] for epoch in epochs]
    std = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    return Band(epochs, [statistics.fmean(column) for column in columns], std, sorted(values))


def paths(data: Data, init: str, dataset: str) -> list[tuple[int, float, float]]:
    """Return (epoch, I(X;T), I(T;Y)) in order: an initialisation's way through the plane."""
    x, y = series(data, init, XT, dataset), series(data, init, TY, dataset)
    right = dict(zip(y.epochs, y.mean, strict=True))
    pairs = zip(x.epochs, x.mean, strict=True)
    return [(epoch, value, right[epoch]) for epoch, value in pairs if epoch in right]


def scatter(data: Data, init: str, dataset: str) -> list[tuple[float, float]]:
    """Return (I(X;T), probe) on a target for each seed and epoch but the untrained epoch 0."""
    found: dict[tuple[int, Any], list[float | None]] = {}
    for place, metric in enumerate((XT, PROBE)):
        for row in _select(data, init, metric, dataset, ""):
            if row.epoch:
                found.setdefault((row.seed, row.epoch), [None, None])[place] = row.value
    return [(a, b) for a, b in found.values() if a is not None and b is not None]


def correlation(points: Sequence[tuple[float, float]]) -> float | None:
    """Return Pearson's r, or None where it is not defined (under 3 points, or one is constant)."""
    if len(points) < 3:
        return None
    xs, ys = zip(*points, strict=True)
    if len(set(xs)) == 1 or len(set(ys)) == 1:
        return None
    return statistics.correlation(xs, ys)


def timeline_figures(rows: Iterable[ResultRow]) -> list[Drawn]:
    """Draw all figures that the rows can fill."""
    gathered, drawn = gather(rows), []
    for protocol, data in gathered.items():
        head = f"{protocol}_" if len(gathered) > 1 else ""
        with figure_style():
            figures = [
                *(tradeoff(data, init) for init in data.inits),
                *(informations(data, init) for init in data.inits),
                plane(data),
                *(compared(data) if len(data.inits) > 1 else []),
                correlated(data),
            ]
        drawn += [dataclasses.replace(one, name=head + one.name) for one in figures if one]
    return drawn


def save_timeline_figures(rows: Iterable[ResultRow], folder: str | Path) -> list[Path]:
    """Write every figure as PNG and SVG; return the paths."""
    drawn = timeline_figures(rows)
    return [path for one in drawn for path in save_figure(one.figure, folder, one.name)]


def tradeoff(data: Data, init: str) -> Drawn | None:
    """Draw discriminability (left axis) and transferability (right axis) against epochs."""
    left = [("← Recall@1", series(data, init, RECALL, data.source, "train"), 1.0)]
    left.append(("← NMI × 100", series(data, init, NMI, data.source, "train"), 100.0))
    right = [(f"{name} →", series(data, init, PROBE, name), 1.0) for name in data.targets]
    if not any(band.epochs for _, band, _ in (*left, *right)):
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
    return Drawn(
        f"tradeoff_{init}", figure,
        f"{init}: Recall@1 and NMI on the training images of {data.source} (left), and top-1 of "
        f"a linear probe on {_listed(data.targets)} (right), against epochs{_seeds(left[0][1])}",
    )  # fmt: skip


def informations(data: Data, init: str) -> Drawn | None:
    """Draw I(X;T) and I(T;Y) against epochs, on source and targets."""
    places = [data.source, *data.targets]
    bands = {(m, name): series(data, init, m, name) for m in (XT, TY) for name in places}
    if not any(band.epochs for band in bands.values()):
        return None
    figure = Figure(figsize=(WIDTH, 0.4 + 2 * PANEL), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    looks = styles(places)
    for axes, metric in zip(panels, (XT, TY), strict=True):
        for name in places:
            label = f"{name} ({'source' if name == data.source else 'target'})"
            _line(axes, bands[metric, name], label, looks[name])
        axes.set_ylabel(NAMES[metric])
        _finish(axes, data, [init], last=metric == TY)
    _legend(figure, panels[0].get_legend_handles_labels()[0])
    return Drawn(
        f"information_{init}", figure,
        f"{init}: mutual information of images and features, I(X;T), and of features and labels, "
        f"I(T;Y), on {data.source} (source) and {_listed(data.targets)} (target), against epochs",
    )  # fmt: skip


def plane(data: Data) -> Drawn | None:
    """Draw the information plane: a panel a data set, a marker a method, a colour an epoch."""
    ways = {
        (name, init): paths(data, init, name)
        for name in (data.source, *data.targets)
        for init in data.inits
    }
    names = [n for n in (data.source, *data.targets) if any(ways[n, i] for i in data.inits)]
    if not names:
        return None
    last = max(epoch for way in ways.values() for epoch, _, _ in way)
    figure = Figure(figsize=(WIDTH, 0.5 + PANEL * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    looks = styles(data.inits)
    for axes, name in zip(panels, names, strict=True):
        for init in data.inits:
            way = ways[name, init]
            if not way:
                continue
            epochs, xs, ys = zip(*way, strict=True)
            axes.plot(xs, ys, color=INK, linewidth=0.5, alpha=0.4)
            dots = axes.scatter(
                xs, ys, c=epochs, cmap="viridis", vmin=0, vmax=last, s=22,
                marker=looks[init].marker, label=init, edgecolors=INK, linewidths=0.4,
            )  # fmt: skip
        axes.set_title(f"{name} ({'source' if name == data.source else 'target'})", loc="left")
        axes.set_ylabel(NAMES[TY])
        axes.grid()
    panels[-1].set_xlabel(NAMES[XT])
    figure.colorbar(dots, ax=list(panels), label="epoch", shrink=0.8)
    _legend(figure, panels[0].get_legend_handles_labels()[0])
    return Drawn(
        "plane", figure,
        f"Information plane: I(X;T) against I(T;Y) on {_listed(names)}, coloured by epoch, "
        f"a marker for each of {_listed(data.inits)}; means over seeds",
    )  # fmt: skip


def compared(data: Data) -> list[Drawn]:
    """Draw the methods over each other, mean ± std over seeds; a figure a data set."""
    figures = []
    for name in (data.source, *data.targets):
        is_source = name == data.source
        wanted = [(RECALL, "train"), (NMI, "train")] if is_source else [(PROBE, "")]
        wanted += [(XT, ""), (TY, "")]
        bands = {
            metric: {init: series(data, init, metric, name, split) for init in data.inits}
            for metric, split in wanted
        }
        bands = {m: found for m, found in bands.items() if any(b.epochs for b in found.values())}
        if not bands:
            continue
        figure = Figure(figsize=(WIDTH, 0.6 + PANEL * len(bands)), layout="constrained")
        panels = figure.subplots(len(bands), 1, squeeze=False, sharex=True)[:, 0]
        looks = styles(data.inits)
        for axes, (metric, found) in zip(panels, bands.items(), strict=True):
            for init, band in found.items():
                _line(axes, band, init, looks[init])
            axes.set_ylabel(NAMES[metric])
            _finish(axes, data, data.inits, last=axes is panels[-1])
        panels[0].set_title(f"{name} ({'source' if is_source else 'target'})", loc="left")
        _legend(figure, panels[0].get_legend_handles_labels()[0])
        counts = [f"{init} {len(band.seeds)}" for init, band in found.items()]
        figures.append(
            Drawn(
                f"compared_{name}", figure,
                f"{_listed(data.inits)} on {name} against epochs: mean and, as a band, ± one "
                f"standard deviation over seeds (their number: {', '.join(counts)})",
            )
        )  # fmt: skip
    return figures


def correlated(data: Data) -> Drawn | None:
    """Draw transfer accuracy against I(X;T) on each target, a point a checkpoint."""
    points = {(n, i): scatter(data, i, n) for n in data.targets for i in data.inits}
    names = [n for n in data.targets if any(points[n, i] for i in data.inits)]
    if not names:
        return None
    figure = Figure(figsize=(WIDTH, 0.5 + PANEL * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    looks, said = styles(data.inits), []
    for axes, name in zip(panels, names, strict=True):
        together = [point for init in data.inits for point in points[name, init]]
        r = correlation(together)
        said.append(f"{name}: r = {'–' if r is None else f'{r:.2f}'} (n = {len(together)})")
        for init in data.inits:
            xs, ys = [p[0] for p in points[name, init]], [p[1] for p in points[name, init]]
            axes.scatter(
                xs, ys, s=16, marker=looks[init].marker, color=looks[init].colour, label=init,
                alpha=0.8, linewidths=0,
            )  # fmt: skip
        axes.set_title(said[-1], loc="left")
        axes.set_ylabel(NAMES[PROBE])
        axes.grid()
    panels[-1].set_xlabel(f"{NAMES[XT]} on the target")
    _legend(figure, panels[0].get_legend_handles_labels()[0])
    return Drawn(
        "correlation", figure,
        "Transfer accuracy against I(X;T) on the target, a point for each checkpoint after epoch "
        f"0; Pearson's r: {'; '.join(said)}",
    )  # fmt: skip


def _select(data: Data, init: str, metric: str, dataset: str, split: str) -> list[ResultRow]:
    """Return the rows of a quantity; split "" takes what is not the fit's own (probe) train row."""
    found = [r for r in data.rows if (r.init, r.metric, r.dataset) == (init, metric, dataset)]
    splits = {row.split for row in found}
    if not split and len(splits) > 1:
        splits -= {"train"}
        split = sorted(splits)[-1]
    return [row for row in found if not split or row.split == split]


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


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"


def _seeds(band: Band) -> str:
    return f"; mean ± std over {len(band.seeds)} seeds" if len(band.seeds) > 1 else ""
