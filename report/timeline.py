"""Timelines as numbers: the series that figures draw, and each one's highest and last value.

Everything is read from result rows of step "analysis", and nothing here draws, so that a figure can
be checked without looking. A curve is of one experiment (``core.identity``): rows of other settings
or data are left out and counted.
"""

import csv
import dataclasses
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from core.config import InputError
from core.identity import UNKNOWN, Identity, identity
from core.results import ResultRow, latest

XT, TY, PROBE, RECALL, NMI = "mi_xt", "mi_ty", "linear/top1", "recall@1", "nmi"
MINE = "mine"  # whose informations have the plain names; other estimators' end in "/theirs"
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
ESTIMATORS = {"infonce": "InfoNCE", "smile": "SMILE"}

COLUMNS = (
    "protocol", "dataset", "role", "split", "metric", "init", "epoch", "mean", "std", "seeds",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Band:
    """A quantity over epochs: mean and std over the seeds that measured every one of them."""

    epochs: list[int]
    mean: list[float]
    std: list[float]  # n − 1 in the denominator; 0 for one seed
    seeds: list[int]


@dataclasses.dataclass(frozen=True)
class Data:
    """The rows of one protocol, and what they are of."""

    rows: list[ResultRow]
    source: str
    targets: list[str]
    inits: list[str]
    boundaries: dict[str, int]  # last epoch of stage 1, of the initialisations that have a stage 2
    labels: Mapping[str, str]  # initialisation → label, where it has one
    estimators: list[str]  # of the informations, MINE first
    notes: list[str]  # what was left out, what the fits say; in sentences

    def label(self, init: str) -> str:
        """Return an initialisation's label, else its name."""
        return self.labels.get(init) or init

    def name(self, dataset: str) -> str:
        """Return a data set with its role."""
        return f"{dataset} ({'source' if dataset == self.source else 'target'})"

    @property
    def places(self) -> list[str]:
        """Return the source, where there is one, and the targets."""
        return [name for name in (self.source, *self.targets) if name]


@dataclasses.dataclass(frozen=True)
class CurveSummary:
    """The highest and the last mean of a quantity over epochs, and the change between them."""

    metric: str
    dataset: str
    split: str
    init: str
    seeds: list[int]
    highest: tuple[int, float, float]  # epoch, mean, std
    last: tuple[int, float, float]
    change: tuple[float, float]  # last − highest, paired by seed: mean, std


def gather(
    rows: Iterable[ResultRow], order: Sequence[str] = (), labels: Mapping[str, str] | None = None
) -> dict[str, Data]:
    """Return the analysis rows by protocol, of each quantity those of one experiment.

    Of several it is the one with the most points, of equals the newest: a quick look with other
    settings, at some of the epochs, does not replace what was measured at all of them.

    Args:
        order: initialisations first to last; others follow by name, CTC at the end.
        labels: initialisation → label.

    Raises:
        InputError: there are none.
    """
    found: dict[str, list[ResultRow]] = {}
    for row in latest(rows):
        if is_timeline(row) and row.value is not None:
            found.setdefault(row.protocol, []).append(row)
    if not found:
        raise InputError("no rows of step analysis: run tools/run_analysis.py --run … first")
    return {protocol: _data(many, order, labels or {}) for protocol, many in found.items()}


def is_timeline(row: ResultRow) -> bool:
    """Whether a row is a point of a timeline."""
    return row.step == "analysis" and row.epoch is not None


def _data(rows: list[ResultRow], order: Sequence[str], labels: Mapping[str, str]) -> Data:
    rows, notes = _one_experiment(rows)
    roles = {row.dataset: row.details.get("role", "target") for row in rows}
    sources = [name for name, role in roles.items() if role == "source"]
    boundaries = {row.init: row.details.get("boundary") for row in rows}
    rank = {init: place for place, init in enumerate(order)}
    found = {row.metric.partition("/")[2] or MINE for row in rows if row.metric[:5] in (XT, TY)}
    return Data(
        rows,
        sources[0] if sources else "",
        [name for name, role in roles.items() if role != "source"],
        sorted(boundaries, key=lambda init: (rank.get(init, len(rank)), init == "ctc", init)),
        {init: int(epoch) for init, epoch in boundaries.items() if epoch},
        labels,
        sorted(found, key=lambda name: (name != MINE, name)),
        [*notes, *_of_fits(rows)],
    )


def _one_experiment(rows: list[ResultRow]) -> tuple[list[ResultRow], list[str]]:
    """Return the rows of one experiment per quantity, in their order, and what was left out."""
    found: dict[tuple[str, str, str], dict[Identity, list[ResultRow]]] = {}
    for row in rows:
        quantity = (row.metric, row.dataset, row.split)
        found.setdefault(quantity, {}).setdefault(_experiment(row), []).append(row)
    chosen, notes = set(), []
    for (metric, dataset, split), experiments in found.items():
        best = max(experiments, key=lambda one: _points_and_time(experiments[one]))
        chosen.add(best)
        left_out = sum(len(many) for one, many in experiments.items() if one != best)
        if left_out:
            notes.append(
                f"{axis(metric)} on {dataset}, {split}: {left_out} rows of other settings, data or "
                "versions are left out."
            )
    if not all(experiment.known for experiment in chosen):
        notes.append(f"{UNKNOWN[0].upper()}{UNKNOWN[1:]}.")
    return [row for row in rows if _experiment(row) in chosen], notes


def _experiment(row: ResultRow) -> Identity:
    return identity(row)._replace(code="")


def _points_and_time(rows: Sequence[ResultRow]) -> tuple[int, str]:
    points = {(row.init, row.seed, row.epoch) for row in rows}
    return len(points), max(row.time for row in rows)


def _of_fits(rows: Sequence[ResultRow]) -> list[str]:
    """Return how many linear probes chose C at the edge of their grid or did not converge."""
    probes = {
        (row.dataset, row.init, row.seed, row.epoch): row.details
        for row in rows
        if "at_grid_edge" in row.details
    }
    fits = probes.values()
    edge = sum(bool(details["at_grid_edge"]) for details in fits)
    cut = sum(details.get("converged") is False for details in fits)
    said = []
    if edge:
        said.append(
            f"{edge} of {len(fits)} linear probes chose C at the edge of its grid: widen "
            "linear.log10_c_min or linear.log10_c_max."
        )
    if cut:
        said.append(f"{cut} of {len(fits)} linear probes ended before they converged.")
    return said


def information(quantity: str, estimator: str) -> str:
    """Return the metric of I(X;T) or I(T;Y) as an estimator's rows name it."""
    return quantity if estimator == MINE else f"{quantity}/{estimator}"


def axis(metric: str) -> str:
    """Return a metric with its unit, and its estimator where that is not MINE."""
    quantity, _, estimator = metric.partition("/")
    if metric in NAMES or quantity not in NAMES:
        return NAMES.get(metric, metric)
    name, _, unit = NAMES[quantity].partition(" ")
    return f"{name} {ESTIMATORS.get(estimator, estimator)} {unit}"


def series(data: Data, init: str, metric: str, dataset: str, split: str = "") -> Band:
    """Return a quantity over the epochs that all seeds of an initialisation have.

    Args:
        split: "": the one that the metric was read on; Recall@1 and NMI of the source on train.
    """
    values = _by_seed(select(data, init, metric, dataset, split))
    if not values:
        return Band([], [], [], [])
    epochs = sorted(set.intersection(*(set(one) for one in values.values())))
    columns = [[one[epoch] for one in values.values()] for epoch in epochs]
    std = [_std(column) for column in columns]
    return Band(epochs, [statistics.fmean(column) for column in columns], std, sorted(values))


def paths(
    data: Data, init: str, dataset: str, estimator: str = MINE
) -> list[tuple[int, float, float]]:
    """Return (epoch, I(X;T), I(T;Y)) in order: an initialisation's way through the plane."""
    x, y = (series(data, init, information(name, estimator), dataset) for name in (XT, TY))
    right = dict(zip(y.epochs, y.mean, strict=True))
    pairs = zip(x.epochs, x.mean, strict=True)
    return [(epoch, value, right[epoch]) for epoch, value in pairs if epoch in right]


def scatter(
    data: Data, init: str, dataset: str, estimator: str = MINE
) -> list[tuple[float, float]]:
    """Return (I(X;T), probe) on a target for each seed and epoch but the untrained epoch 0."""
    found: dict[tuple[int, Any], list[float | None]] = {}
    for place, metric in enumerate((information(XT, estimator), PROBE)):
        for row in select(data, init, metric, dataset):
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


def summaries(data: Data) -> list[CurveSummary]:
    """Return a summary of every quantity that has several epochs, initialisations together."""
    result = []
    for metric, dataset, split, init in _measured(data):
        band = series(data, init, metric, dataset, split)
        if len(band.epochs) < 2:
            continue
        top = max(range(len(band.epochs)), key=band.mean.__getitem__)
        highest, last = ((band.epochs[n], band.mean[n], band.std[n]) for n in (top, -1))
        values = _by_seed(select(data, init, metric, dataset, split)).values()
        steps = [one[last[0]] - one[highest[0]] for one in values]
        change = statistics.fmean(steps), _std(steps)
        result.append(CurveSummary(metric, dataset, split, init, band.seeds, highest, last, change))
    return result


def to_csv(gathered: Mapping[str, Data]) -> str:
    """Return every quantity at every epoch, mean and std over seeds: what the figures show."""
    buffer = io.StringIO()
    out = csv.writer(buffer, lineterminator="\n")
    out.writerow(COLUMNS)
    for protocol, data in gathered.items():
        for metric, dataset, split, init in _measured(data):
            band = series(data, init, metric, dataset, split)
            place = (dataset, "source" if dataset == data.source else "target", split)
            seeds = " ".join(map(str, band.seeds))
            for epoch, mean, std in zip(band.epochs, band.mean, band.std, strict=True):
                out.writerow([protocol, *place, metric, init, epoch, mean, std, seeds])
    return buffer.getvalue()


def _measured(data: Data) -> list[tuple[str, str, str, str]]:
    """Return every (metric, data set, split, initialisation), the source first."""
    places = {name: position for position, name in enumerate(data.places)}
    found = dict.fromkeys((row.metric, row.dataset, row.split) for row in data.rows)
    order = sorted(found, key=lambda key: (places[key[1]], _rank(key[0]), key[0], key[2]))
    return [(*key, init) for key in order for init in data.inits]


def select(data: Data, init: str, metric: str, dataset: str, split: str = "") -> list[ResultRow]:
    """Return the rows of a quantity; split "" takes what is not the fit's own (probe) train row."""
    found = [r for r in data.rows if (r.init, r.metric, r.dataset) == (init, metric, dataset)]
    splits = {row.split for row in found}
    if not split and len(splits) > 1:
        splits -= {"train"}
        split = sorted(splits)[-1]
    return [row for row in found if not split or row.split == split]


def _by_seed(rows: Iterable[ResultRow]) -> dict[int, dict[int, float]]:
    """Return seed → epoch → value."""
    values: dict[int, dict[int, float]] = {}
    for row in rows:
        assert row.epoch is not None
        assert row.value is not None
        values.setdefault(row.seed, {})[row.epoch] = row.value
    return values


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _rank(metric: str) -> int:
    """Return the place of a metric, or of the quantity that it estimates, among the names."""
    names = list(NAMES)
    known = metric if metric in names else metric.partition("/")[0]
    return names.index(known) if known in names else len(names)
