"""A timeline: every quantity for every saved epoch of a run, on source and targets, as rows.

Shapes: ``N`` images of a split, ``D`` embedding, ``n`` pairs of an information estimate.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.features import Extraction, features_of, open_as, pixels_of
from analysis.quantities import (
    HELD_OUT,
    INFORMATION,
    PER_SPLIT,
    QUANTITIES,
    Information,
    check,
    measure_information,
    measure_probe,
    measure_split,
    metrics_of,
)
from analysis.survey import Epoch, Survey, survey
from core import dist
from core.config import to_dict
from core.errors import InputError
from core.identity import (
    Identity,
    changed_keys,
    check_version,
    data_digest,
    done,
    identity,
    protocol_name,
    recipe_hash,
)
from core.progress import format_seconds
from core.results import ROWS_FILE, Measured, ResultRow, append_rows, read_rows
from data.datasets import DataConfig, IndexedDataset, report_split, resolved
from models.checkpoint import Checkpoint, load_checkpoint
from transfer.linear import LinearConfig

ALL = "all"  # the split that is train and test together


@dataclasses.dataclass(frozen=True)
class TimelineConfig:
    """Quantities and data of a timeline."""

    version: int = 1  # of the protocol: raised when what it computes changes
    source: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(name=""))  # "": run's
    targets: list[DataConfig] = dataclasses.field(default_factory=list)
    quantities: list[str] = dataclasses.field(default_factory=lambda: list(QUANTITIES))
    every: int = 1  # of the saved epochs those it divides, the first, the boundary and the last
    clustering_seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2])
    information: Information = dataclasses.field(default_factory=Information)
    linear: LinearConfig = dataclasses.field(default_factory=LinearConfig)
    features: Extraction = dataclasses.field(default_factory=Extraction)
    device: str = "auto"  # auto, cpu, cuda, cuda:N


@dataclasses.dataclass(frozen=True)
class Unit:
    """A quantity on a split, to be measured for each epoch."""

    quantity: str
    place: int  # 0: the source; from 1 on: the targets
    split: str


class Timeline:
    """A run, its data sets, and its measurements.

    Args:
        protocol: how rows name the recipe.
        init: how rows name the run; "": its method.
        recipe: the config that ``protocol`` names; rows of a unit that depends on a key that
            differs from it have a protocol's name of their own.

    Raises:
        InputError: a config, run or data set that cannot be used; nothing has been written then.
    """

    def __init__(
        self,
        run: Path,
        config: TimelineConfig,
        protocol: str,
        init: str = "",
        recipe: TimelineConfig | None = None,
    ) -> None:
        check_version(config.version)
        check(config.information)
        unknown = [name for name in config.quantities if name not in QUANTITIES]
        if unknown or not config.quantities:
            known = ", ".join(QUANTITIES)
            raise InputError(f"quantities names {unknown or 'nothing'}; known are {known}")
        self.run, self.config, self.protocol = run, config, protocol
        self.survey: Survey = survey(run, config.every)
        self.facts = self.survey.facts
        self.init = init or self.facts.method
        self.device = dist.pick_device(config.device)
        newest = load_checkpoint(self.survey.epochs[-1].path)
        data = [_source(config, newest), *config.targets]
        self.datasets = [_open(one, newest) for one in data]
        self.data = [
            dataclasses.replace(resolved(one), image_size=next(iter(splits.values())).image_size)
            for one, splits in zip(data, self.datasets, strict=True)
        ]
        for splits in self.datasets if "probe" in config.quantities else ():
            if len(splits) < 2:
                raise InputError(
                    f"{next(iter(splits.values())).name} has a train split only, on which a probe "
                    "cannot be evaluated: leave probe out of quantities, or hold a part out with "
                    "data.val_fraction"
                )
        self.names = [next(iter(splits.values())).name for splits in self.datasets]
        if len(set(self.names)) < len(self.names):
            raise InputError(f"data sets must differ, but the config names {', '.join(self.names)}")
        self.units = list(self._units())
        self.recipes = {  # hash, and the keys that differ from the named recipe
            unit: (
                recipe_hash(own := self._recipe(config, unit)),
                changed_keys(own, self._recipe(recipe or config, unit)),
            )
            for unit in self.units
        }
        self._sides: dict[Any, Tensor] = {}  # X and T1, which all epochs share

    def todo(self) -> list[tuple[Epoch, Unit]]:
        """Return the measurements without a row, epoch by epoch."""
        rows: dict[str, list[ResultRow]] = {}
        for row in self._rows():
            rows.setdefault(row.weights, []).append(row)
        return [
            (epoch, unit)
            for epoch in self.survey.epochs
            for unit in self.units
            if not (unit.quantity == "h_t" and self.reference() is None)
            and not done(rows.get(epoch.sha256, ()), self.wanted(epoch, unit))
        ]

    def expected_seconds(self, todo: Sequence[tuple[Epoch, Unit]]) -> float | None:
        """Return how long ``todo`` takes by the rows of other epochs; None until all are timed."""
        timed: dict[Identity, list[float]] = {}
        for row in self._rows():
            if "seconds" in row.details:
                timed.setdefault(identity(row), []).append(float(row.details["seconds"]))
        units = [identity(self.wanted(epoch, unit)[0]) for epoch, unit in todo]
        if not all(unit in timed for unit in units):
            return None
        return sum(statistics.fmean(timed[unit]) for unit in units)

    def _rows(self) -> list[ResultRow]:
        path = self.run / ROWS_FILE
        return read_rows(path) if path.is_file() else []

    def reference(self) -> Epoch | None:
        """Return the epoch whose features are T1, or None where it is not there (yet)."""
        wanted = self.config.information.reference_epoch
        if wanted < 0:
            schedule = self.survey.schedule
            wanted = schedule.boundary or schedule.total or self.survey.epochs[-1].number
        return next((epoch for epoch in self.survey.epochs if epoch.number == wanted), None)

    def work(self) -> Iterator[list[ResultRow]]:
        """Measure what ``todo`` lists; after each measurement append its rows, then yield them."""
        todo = self.todo()
        together = self.config.information.epochs_at_once if self.device.type == "cuda" else 1
        order = list(dict.fromkeys(epoch for epoch, _ in todo))
        wanted = set(todo)
        for first in range(0, len(order), together):
            group = order[first : first + together]
            held: dict[Any, Tensor] = {}
            for unit in sorted(self.units, key=lambda unit: unit.place):
                epochs = [epoch for epoch in group if (epoch, unit) in wanted]
                if unit.quantity in INFORMATION and epochs:
                    yield self._measured(epochs, unit, held)
                else:
                    for epoch in epochs:
                        yield self._measured([epoch], unit, held)

    def _measured(
        self, epochs: list[Epoch], unit: Unit, held: dict[Any, Tensor]
    ) -> list[ResultRow]:
        started = time.monotonic()
        try:
            found = self._measure(epochs, unit, held)
        except InputError:
            raise
        except ValueError as error:  # a NaN, a diverged critic: never passed over
            where = f"{self.names[unit.place]}/{unit.split}"
            numbers = ", ".join(str(epoch.number) for epoch in epochs)
            raise InputError(f"{unit.quantity} of epoch {numbers} on {where}: {error}") from error
        seconds = (time.monotonic() - started) / len(epochs)
        pairs = zip(epochs, found, strict=True)
        rows = [self._row(epoch, unit, one, seconds) for epoch, many in pairs for one in many]
        append_rows(self.run / ROWS_FILE, rows)
        return rows

    def _measure(
        self, epochs: list[Epoch], unit: Unit, held: dict[Any, Tensor]
    ) -> list[list[Measured]]:
        features = [self._features(epoch, unit.place, unit.split, held) for epoch in epochs]
        labels = self.labels(unit.place, unit.split)
        if unit.quantity in PER_SPLIT:
            seeds = self.config.clustering_seeds
            return [measure_split(unit.quantity, features[0], labels, seeds, self.device)]
        if unit.quantity == "probe":
            train = self._features(epochs[0], unit.place, "train", held)
            classes = len(self.datasets[unit.place]["train"].classes)
            pair = (train, self.labels(unit.place, "train")), (features[0], labels)
            return [measure_probe(*pair, classes, self.config.linear, self.device)]
        rows = self._pairs(len(labels))
        taken = [part[rows].to(self.device) for part in features]
        side = self._side(unit, rows).to(self.device)
        return measure_information(unit.quantity, side, taken, self.config.information)

    def _features(self, epoch: Epoch, place: int, split: str, held: dict[Any, Tensor]) -> Tensor:
        if split == ALL:
            parts = [self._features(epoch, place, s, held) for s in self.datasets[place]]
            return torch.cat(parts)
        key = (epoch.number, place, split)
        if key not in held:
            for other in [k for k in held if k[1] != place]:
                del held[other]  # data sets are worked through one after the other
            checkpoint = load_checkpoint(epoch.path)
            dataset = self.datasets[place][split]
            held[key] = features_of(checkpoint, dataset, self.device, self.config.features)
        return held[key]

    def labels(self, place: int, split: str) -> Tensor:
        splits = self.datasets[place]
        chosen = splits.values() if split == ALL else [splits[split]]
        return torch.cat([dataset.labels for dataset in chosen])

    def _side(self, unit: Unit, rows: Tensor) -> Tensor:
        """Return what the features are paired with: images, labels, or the reference's features."""
        if unit.quantity == "mi_ty":
            return self.labels(unit.place, unit.split)[rows]
        key = (unit.quantity, unit.place)
        if key not in self._sides:
            if unit.quantity == "h_t":
                reference = self.reference()
                assert reference is not None  # todo() names no such unit otherwise
                self._sides[key] = self._features(reference, unit.place, unit.split, {})[rows]
            else:
                self._sides[key] = self._pixels(unit.place, unit.split, rows)
        return self._sides[key]

    def _pixels(self, place: int, split: str, rows: Tensor) -> Tensor:
        how, parts, first = self.config.information, [], 0
        for name, dataset in self.datasets[place].items():
            if split in (name, ALL):
                inside = rows[(rows >= first) & (rows < first + len(dataset))] - first
                workers = self.config.features.workers
                parts.append(pixels_of(dataset, inside, how.side, workers))
                first += len(dataset)
        return torch.cat(parts)

    def _pairs(self, count: int) -> Tensor:
        """Return the positions of at most ``information.pairs`` images, evenly spread."""
        limit = self.config.information.pairs
        if count <= limit:
            return torch.arange(count)
        return torch.linspace(0, count - 1, limit, dtype=torch.float64).round().long()

    def _units(self) -> Iterator[Unit]:
        for place, splits in enumerate(self.datasets):
            reported = list(splits)[-1]
            wanted = {"train": "train", "test": reported, ALL: ALL}[self.config.information.split]
            for quantity in self.config.quantities:
                if quantity in PER_SPLIT:
                    for split in splits if place == 0 else [reported]:
                        yield Unit(quantity, place, split)
                else:
                    yield Unit(quantity, place, wanted if quantity in INFORMATION else reported)

    def wanted(self, epoch: Epoch, unit: Unit) -> list[ResultRow]:
        """Return a unit's rows on the split that was asked for, without values."""
        names = metrics_of(unit.quantity, self.config.information)
        selection = HELD_OUT if unit.quantity == "probe" else "last"
        return [
            self._unmeasured(epoch, unit, unit.split, metric, "", selection) for metric in names
        ]

    def _unmeasured(
        self, epoch: Epoch, unit: Unit, split: str, metric: str, of_unit: str, selection: str
    ) -> ResultRow:
        """Return a row with its identity and without a value."""
        splits = self.datasets[unit.place]
        evaluated = splits.values() if split == ALL else [splits[split]]
        learned = [splits["train"]] if unit.quantity == "probe" else []
        recipe, changed = self.recipes[unit]
        return ResultRow(
            step="analysis",
            protocol=protocol_name(self.protocol, changed),
            dataset=self.names[unit.place],
            split=split,
            metric=metric,
            value=None,
            unit=of_unit,
            init=self.init,
            seed=self.facts.seed,
            epoch=epoch.number,
            selection=selection,
            weights=epoch.sha256,
            weights_path=str(epoch.path),
            config=recipe,
            data=data_digest([s.digest for s in learned], [s.digest for s in evaluated]),
            version=self.config.version,
            run=str(self.run),
            details={"overrides": changed} if changed else {},
        )

    def _recipe(self, config: TimelineConfig, unit: Unit) -> dict[str, Any]:
        """Return the part of a config that the unit's values depend on."""
        content = to_dict(config)
        recipe: dict[str, Any] = {
            "quantity": unit.quantity,
            "data": to_dict(self.data[unit.place]),
            "amp": content["features"]["amp"],
        }
        if unit.quantity == "clustering":
            recipe["clustering_seeds"] = content["clustering_seeds"]
        if unit.quantity == "probe":
            recipe["linear"] = content["linear"]
        if unit.quantity in INFORMATION:
            settings = {"mi_xt": "xt", "mi_ty": "ty", "h_t": "ht"}[unit.quantity]
            read = ("estimators", "seeds", "pairs", "side", settings)
            recipe["information"] = {key: content["information"][key] for key in read}
        if unit.quantity == "h_t":
            reference = self.reference()
            recipe["reference_epoch"] = reference.number if reference else None
        return recipe

    def _row(self, epoch: Epoch, unit: Unit, found: Measured, seconds: float) -> ResultRow:
        split = found.split or unit.split
        schedule = self.survey.schedule
        details = {
            "role": "target" if unit.place else "source",
            "images": len(self.labels(unit.place, split)),
            "image_size": next(iter(self.datasets[unit.place].values())).image_size,
            "arch": self.facts.arch,
            "pretrained_on": self.facts.dataset,
            "boundary": schedule.boundary,
            "epochs": schedule.total,
            "seconds": round(seconds, 3),
        }
        if unit.quantity == "h_t":
            reference = self.reference()
            details["reference_epoch"] = reference.number if reference else None
        row = self._unmeasured(epoch, unit, split, found.metric, found.unit, found.selection)
        details |= row.details | found.details
        return dataclasses.replace(row, value=found.value, details=details)


def summary(timeline: Timeline, todo: Sequence[tuple[Epoch, Unit]]) -> list[str]:
    """Return sentences on the run's epochs and on the measurements to do."""
    epochs = timeline.survey.epochs
    pairs = len(epochs) * len(timeline.units)
    said = [
        f"{timeline.run}: {timeline.init}, {timeline.facts.arch}, seed {timeline.facts.seed}; "
        f"{len(epochs)} epochs ({epochs[0].number}…{epochs[-1].number}) on "
        f"{', '.join(timeline.names)}: {len(todo)} measurements to do of {pairs}",
        *timeline.survey.sentences(),
    ]
    if todo:
        seconds = timeline.expected_seconds(todo)
        known = "known after the first epoch" if seconds is None else format_seconds(seconds)
        said.append(f"expected time: {known}")
    if "h_t" in timeline.config.quantities and timeline.reference() is None:
        said.append("H(T) waits: the epoch that information.reference_epoch means is not there yet")
    return said


def _open(config: DataConfig, checkpoint: Checkpoint) -> dict[str, IndexedDataset]:
    """Open train and the split that final numbers are given on, in this order."""
    return {
        s: open_as(config, checkpoint, s) for s in dict.fromkeys(("train", report_split(config)))
    }


def _source(config: TimelineConfig, checkpoint: Checkpoint) -> DataConfig:
    """Return the source data: as configured, or those that the run was trained on."""
    if config.source.name:
        return config.source
    known = {field.name for field in dataclasses.fields(DataConfig)}
    content = checkpoint.facts.config.get("data")
    if not isinstance(content, dict):
        raise InputError(f"{checkpoint.path} does not record its training data: set source.name")
    return DataConfig(**{key: value for key, value in content.items() if key in known})
