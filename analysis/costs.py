"""How long a timeline will take, told before it starts: short trials, scaled up.

Shapes: ``N`` images of a split, ``D`` embedding, ``n`` pairs of an information estimate.

Where this run's rows already say how long a measurement took, that is taken instead of a trial.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from analysis.features import network_of
from analysis.mutual_information import Settings, estimate
from analysis.quantities import measure_probe, measure_split
from analysis.survey import Epoch
from analysis.timeline import ALL, Timeline, Unit
from core.errors import UnreadableImage
from core.identity import identity
from core.results import ROWS_FILE, read_rows
from models.amp import autocast
from models.checkpoint import load_checkpoint
from models.features import all_unreadable

TRIAL = 2000  # images of a trial, at most
STEPS = 3  # critic steps of a trial


@dataclasses.dataclass(frozen=True)
class Cost:
    """Expected seconds of everything that is to do."""

    features: float
    quantities: dict[str, float]

    @property
    def total(self) -> float:
        return self.features + sum(self.quantities.values())


def expected_cost(timeline: Timeline, todo: Sequence[tuple[Epoch, Unit]]) -> Cost:
    """Return the expected time of ``todo``; takes seconds itself. Features count as not cached."""
    known = _recorded(timeline)
    counts = {unit: sum(u == unit for _, u in todo) for unit in dict.fromkeys(u for _, u in todo)}
    quantities: dict[str, float] = {}
    for unit, count in counts.items():
        seconds = known.get(unit) or _trial(timeline, unit)
        quantities[unit.quantity] = quantities.get(unit.quantity, 0.0) + count * seconds
    return Cost(_features(timeline, todo), quantities)


def _features(timeline: Timeline, todo: Sequence[tuple[Epoch, Unit]]) -> float:
    """Return the expected seconds of reading images and of the network's passes over them."""
    images = collections.Counter[int]()  # by place
    for _, group in itertools.groupby(todo, key=lambda pair: pair[0]):
        for place, split in _splits(timeline, {unit for _, unit in group}):
            images[place] += len(timeline.datasets[place][split])
    return sum(count * _seconds_an_image(timeline, place) for place, count in images.items())


def _splits(timeline: Timeline, units: set[Unit]) -> set[tuple[int, str]]:
    """Return the place and name of every split whose features some unit needs."""
    needed = set()
    for unit in units:
        splits = list(timeline.datasets[unit.place])
        both = unit.split == ALL or unit.quantity == "probe"
        needed |= {(unit.place, split) for split in (splits if both else [unit.split])}
    return needed


def _seconds_an_image(timeline: Timeline, place: int) -> float:
    """Time a batch of a data set: its reading here, and the network on images of its size.

    Workers read while the network runs, and share the reading.
    """
    how = timeline.config.features
    dataset = next(iter(timeline.datasets[place].values()))
    model = network_of(load_checkpoint(timeline.survey.epochs[-1].path))
    model = model.to(timeline.device).eval()
    batch = min(32, how.batch_size, len(dataset))
    images = torch.zeros(batch, 3, dataset.image_size, dataset.image_size, device=timeline.device)
    images = images.contiguous(memory_format=torch.channels_last)

    def forward() -> None:
        with torch.no_grad(), autocast(how.amp, timeline.device):
            model.forward_features(images).sum().item()

    def read() -> None:
        for position in torch.linspace(0, len(dataset) - 1, batch).long().tolist():
            dataset[position]

    forward()
    try:
        reading, network = _seconds(read) / batch, _seconds(forward) / batch
    except UnreadableImage as error:
        raise all_unreadable(error, dataset) from None
    return max(reading / how.workers, network) if how.workers else reading + network


def _recorded(timeline: Timeline) -> dict[Unit, float]:
    """Return the mean seconds of each unit that rows of this protocol tell."""
    path = timeline.run / ROWS_FILE
    rows = read_rows(path) if path.is_file() else []
    found = {}
    for unit in timeline.units:
        like = identity(timeline.wanted(timeline.survey.epochs[-1], unit)[0])
        times = [float(row.details["seconds"]) for row in rows if identity(row) == like]
        if times:
            found[unit] = sum(times) / len(times)
    return found


def _trial(timeline: Timeline, unit: Unit) -> float:
    """Measure a part of a unit on noise of the right shape, and scale it up."""
    splits = timeline.datasets[unit.place]
    labels = timeline.labels(unit.place, unit.split)
    size = network_of(load_checkpoint(timeline.survey.epochs[-1].path)).num_features
    few = min(len(labels), TRIAL)
    noise = torch.randn(few, size, generator=torch.Generator().manual_seed(0))
    part, share = labels[torch.linspace(0, len(labels) - 1, few).long()], len(labels) / few
    device = timeline.device
    if unit.quantity == "retrieval":
        call = lambda: measure_split("retrieval", noise, part, [], device)  # noqa: E731
        return _seconds(call) * share**2
    if unit.quantity == "clustering":
        seeds = timeline.config.clustering_seeds
        one = _seconds(lambda: measure_split("clustering", noise, part, seeds[:1], device))
        return one * share * len(seeds)
    if unit.quantity == "companions":
        return _seconds(lambda: measure_split("companions", noise, part, [], device)) * share
    if unit.quantity == "probe":
        classes, pair = len(next(iter(splits.values())).classes), (noise, part)
        linear = timeline.config.linear
        call = lambda: measure_probe(pair, pair, classes, linear, device)  # noqa: E731
        return _seconds(call) * len(timeline.labels(unit.place, "train")) / few
    return _information_trial(timeline, unit, labels, size)


def _information_trial(timeline: Timeline, unit: Unit, labels: Tensor, size: int) -> float:
    how = timeline.config.information
    pairs = min(len(labels), how.pairs)
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(pairs, size, generator=draw).to(timeline.device)
    sides: dict[str, Callable[[], tuple[Tensor, Settings]]] = {
        "mi_xt": lambda: (torch.randn(pairs, _pixels(timeline, unit), generator=draw), how.xt),
        "mi_ty": lambda: (labels[:pairs], how.ty),
        "h_t": lambda: (torch.randn(pairs, size, generator=draw), how.ht),
    }
    side, settings = sides[unit.quantity]()
    side = side.to(timeline.device)
    estimators = ["infonce"] if unit.quantity == "h_t" else how.estimators
    total = 0.0
    for estimator in estimators:

        def run(steps: int, points: int, estimator: str = estimator) -> float:
            short = dataclasses.replace(settings, iterations=steps, evaluations=points)
            return _seconds(lambda: estimate(side, features, estimator, short))

        run(1, 1)  # the first call pays for set-up
        once, more, read = run(1, 1), run(1 + STEPS, 1), run(1 + STEPS, 1 + STEPS)
        step, reading = max(0.0, more - once) / STEPS, max(0.0, read - more) / STEPS
        evaluations = min(settings.evaluations, settings.iterations)
        total += once + settings.iterations * step + evaluations * reading
    return total * len(how.seeds)


def _pixels(timeline: Timeline, unit: Unit) -> int:
    side = next(iter(timeline.datasets[unit.place].values())).image_size
    wanted = timeline.config.information.side
    return 3 * (min(side, wanted) if wanted else side) ** 2


def _seconds(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started
