"""The protocols by name: each takes a backbone on a data set and gives one or more numbers.

Shapes: N images, D feature dimensions, K classes.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import dist
from core.errors import InputError
from core.identity import data_digest, recipe_hash
from data.datasets import IndexedDataset
from models.features import CACHE_DIR, DTYPES, Features, cached
from transfer import fewshot, finetune, knn, linear
from transfer.backbone import Backbone
from transfer.config import RELEASED, TransferConfig, recipe_of
from transfer.data import Splits, parts_to_choose_by
from transfer.metrics import METRICS
from transfer.released import released_probe


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One number of one protocol, before it becomes a row."""

    protocol: str
    value: float
    selection: str
    details: dict[str, Any]


class Transfer:
    """What the protocols of one run share: splits, features (computed once), seed."""

    def __init__(
        self,
        config: TransferConfig,
        methods: list[str],
        backbone: Backbone,
        splits: Splits,
        seed: int,
        output: Path,
        resume: bool,
    ) -> None:
        self.config, self.methods = config, methods
        self.backbone, self.splits = backbone, splits
        self.seed, self.output, self.resume = seed, output, resume
        self.device = dist.init(config.loop.device)
        self._features: dict[str, Features] = {}

    @functools.cached_property
    def data(self) -> str:
        """The digest of what is learned from and what is evaluated on."""
        learned = [part.digest for part in (self.splits.train, self.splits.val) if part is not None]
        return data_digest(learned, [self.splits.test.digest])

    def features(self, part: str) -> tuple[Tensor, Tensor]:
        """Return features N×D and labels of "train", "val" or "test", on the device."""
        if part not in self._features:
            self._features[part] = self._extract(getattr(self.splits, part), part)
        found = self._features[part]
        return found.features.float().to(self.device), found.labels.to(self.device)

    def learnable(self) -> tuple[Tensor, Tensor]:
        """Return features and labels of all that may be learnt from: train, and val where it is."""
        features, labels = self.features("train")
        if self.splits.val is None:
            return features, labels
        more, more_labels = self.features("val")
        return torch.cat([features, more]), torch.cat([labels, more_labels])

    def learnable_labels(self, method: str) -> Tensor:
        """Return the labels of all that may be learnt from, N, for a method that needs one each.

        Raises:
            InputError: a data set with several labels an image.
        """
        train, val = self.splits.train, self.splits.val
        if train.labels.ndim == 2:
            raise InputError(f"{method} needs one label an image, and {train.name} has several")
        return train.labels if val is None else torch.cat([train.labels, val.labels])

    def _extract(self, dataset: IndexedDataset, part: str) -> Features:
        how = self.config.features
        folder = None if how.cache == "none" else Path(how.cache or CACHE_DIR).expanduser()
        return cached(
            self.backbone.model,
            dataset,
            self.device,
            how.batch_size,
            how.amp,
            self.config.data.workers,
            dtype=DTYPES[how.dtype],
            inputs=self.backbone.inputs,
            description=f"features of {dataset.name} {part}",
            folder=folder,
        )


def _linear(unit: Transfer) -> list[Outcome]:
    val = None if unit.splits.val is None else unit.features("val")
    probe = linear.linear_probe(
        unit.features("train"),
        unit.features("test"),
        unit.splits.classes,
        unit.config.linear,
        unit.splits.test.metric,
        val,
        unit.device,
    )
    details = {
        "c": probe.c,
        "held_out_score": round(probe.held_out_score, 4),
        "at_grid_edge": probe.at_grid_edge,
        "iterations": probe.fit.iterations,
        "converged": probe.fit.converged,
    }
    return [Outcome(unit.config.protocol or "linear", probe.score, _selection(unit), details)]


def _knn(unit: Transfer) -> list[Outcome]:
    how = unit.config.knn
    reference, labels = unit.learnable()
    queries, targets = unit.features("test")
    scores = knn.knn_scores(
        queries, reference, labels, unit.splits.classes, how.neighbours, how.temperature
    )
    metric = METRICS[unit.splits.test.metric]
    return [
        Outcome(
            f"knn_{k}", metric(s.cpu(), targets.cpu()), "last", {"temperature": how.temperature}
        )
        for k, s in scores.items()
    ]


def _few_shot(unit: Transfer) -> list[Outcome]:
    how = unit.config.few_shot
    metric = METRICS[unit.splits.test.metric]
    train, (test, targets) = unit.learnable(), unit.features("test")
    outcomes = []
    for shots in how.shots:
        found = fewshot.few_shot(
            train, (test, targets), unit.splits.classes,
            lambda scores, labels: metric(scores.cpu(), labels.cpu()),
            shots, how.draws, how.c, unit.seed,
        )  # fmt: skip
        details = {"c": how.c, "draws": found.draws, "interval_95": found.half_width}
        outcomes.append(Outcome(f"few_shot_{shots}", found.mean, "last", details))
    return outcomes


def _released(unit: Transfer) -> list[Outcome]:
    how = unit.config.released
    scores = released_probe(
        unit.backbone.model, unit.splits.train, unit.splits.test, how, unit.backbone.inputs,
        seed=unit.seed, device=unit.device, workers=unit.config.data.workers,
    )  # fmt: skip
    best = max(range(len(scores)), key=scores.__getitem__)
    details = {
        "flag": "as released: BatchNorm in train mode, the best epoch chosen on the test split",
        "best_epoch": best + 1,
        "last_epoch_score": scores[-1],
        **dataclasses.asdict(how),
    }
    name = "linear" if unit.config.protocol in ("", RELEASED) else unit.config.protocol
    return [Outcome(f"{name}_released", scores[best], "best on test", details)]


def _finetune(unit: Transfer) -> list[Outcome]:
    config = unit.config
    recipe = recipe_hash(recipe_of(config, "finetune"))
    job = finetune.Job(
        unit.backbone, config.finetune, config.loop, config.data, unit.seed, unit.device,
        f"{unit.backbone.sha256} {recipe} {unit.data} seed {unit.seed}", unit.resume,
    )  # fmt: skip
    tuned = finetune.finetune(job, unit.splits, unit.output / "finetune")
    details = {
        "lr": tuned.lr,
        "weight_decay": tuned.weight_decay,
        "steps": tuned.steps,
        "batch_size": config.loop.batch_size,
        "amp": config.loop.amp,
        "tried": tuned.tried,
    }
    selection = _selection(unit) if tuned.tried else "last"
    return [Outcome(config.protocol or "finetune", tuned.score, selection, details)]


def _enough_neighbours(unit: Transfer) -> None:
    wanted, there = max(unit.config.knn.neighbours), len(unit.learnable_labels("knn"))
    if wanted > there:
        raise InputError(f"knn.neighbours has {wanted}, but there are {there} images to learn from")


def _enough_shots(unit: Transfer) -> None:
    counts = torch.bincount(unit.learnable_labels("few_shot"), minlength=unit.splits.classes)
    fewest, wanted = int(counts.argmin()), max(unit.config.few_shot.shots)
    if int(counts[fewest]) < wanted:
        train = unit.splits.train
        raise InputError(
            f"few_shot.shots has {wanted}, but class {train.classes[fewest]!r} of {train.name} has "
            f"{int(counts[fewest])} images to learn from"
        )


def _enough_to_choose_on(unit: Transfer) -> None:
    if unit.splits.val is None:
        parts_to_choose_by(unit.splits.train.labels, unit.config.linear.held_out)


def _selection(unit: Transfer) -> str:
    return "best on held-out train" if unit.splits.val is None else "best on val"


METHODS: dict[str, Callable[[Transfer], list[Outcome]]] = {
    "linear": _linear,  # features once, logistic regression
    "knn": _knn,
    "few_shot": _few_shot,
    "released": _released,  # the paper code's probe, for comparison
    "finetune": _finetune,
}

NEEDS: dict[str, Callable[[Transfer], None]] = {  # told before any feature is computed
    "linear": _enough_to_choose_on,
    "knn": _enough_neighbours,
    "few_shot": _enough_shots,
}
