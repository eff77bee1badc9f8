"""The methods by name: each evaluates a backbone on a data set and returns its numbers.

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
from core.results import Measured
from data.datasets import IndexedDataset
from models.features import CACHE_DIR, DTYPES, Features, cached
from transfer import fewshot, finetune, knn, linear
from transfer.backbone import Backbone
from transfer.config import TransferConfig, recipe_of, stored_dtype
from transfer.data import Splits, parts_to_choose_by
from transfer.metrics import METRICS
from transfer.released import released_probe


class Transfer:
    """What the methods of one run share: splits, features (computed once), seed."""

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

    def learnable_labels(self) -> Tensor:
        """Return the labels of all that may be learnt from."""
        train, val = self.splits.train, self.splits.val
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
            dtype=DTYPES[stored_dtype(how, len(self.splits.train))],
            inputs=self.backbone.inputs,
            description=f"features of {dataset.name} {part}",
            folder=folder,
        )


def _linear(task: Transfer) -> list[Measured]:
    val = None if task.splits.val is None else task.features("val")
    probe = linear.linear_probe(
        task.features("train"),
        task.features("test"),
        task.splits.classes,
        task.config.linear,
        task.splits.test.metric,
        val,
        task.device,
    )
    details = {
        "c": probe.c,
        "held_out_score": round(probe.held_out_score, 4),
        "at_grid_edge": probe.at_grid_edge,
        "iterations": probe.fit.iterations,
        "converged": probe.fit.converged,
    }
    name = task.config.protocol or "linear"
    return [_measured(task, probe.score, name, _selection(task), details)]


def _knn(task: Transfer) -> list[Measured]:
    how = task.config.knn
    reference, labels = task.learnable()
    queries, targets = task.features("test")
    scores = knn.knn_scores(
        queries, reference, labels, task.splits.classes, how.neighbours, how.temperature
    )
    metric, details = METRICS[task.splits.test.metric], {"temperature": how.temperature}
    return [
        _measured(task, metric(s.cpu(), targets.cpu()), f"knn_{k}", "last", details)
        for k, s in scores.items()
    ]


def _few_shot(task: Transfer) -> list[Measured]:
    how = task.config.few_shot
    metric = METRICS[task.splits.test.metric]
    train, (test, targets) = task.learnable(), task.features("test")
    measured = []
    for shots in how.shots:
        found = fewshot.few_shot(
            train, (test, targets), task.splits.classes,
            lambda scores, labels: metric(scores.cpu(), labels.cpu()),
            shots, how.draws, how.c, task.seed,
        )  # fmt: skip
        details = {"c": how.c, "draws": found.draws, "interval_95": found.half_width}
        measured.append(_measured(task, found.mean, f"few_shot_{shots}", "last", details))
    return measured


def _released(task: Transfer) -> list[Measured]:
    how = task.config.released
    scores = released_probe(
        task.backbone.model, task.splits.train, task.splits.test, how, task.backbone.inputs,
        seed=task.seed, device=task.device, workers=task.config.data.workers,
    )  # fmt: skip
    best = max(range(len(scores)), key=scores.__getitem__)
    details = {
        "flag": "as released: BatchNorm in train mode, the best epoch chosen on the test split",
        "best_epoch": best + 1,
        "last_epoch_score": scores[-1],
        **dataclasses.asdict(how),
    }
    return [_measured(task, scores[best], "linear_released", "best on test", details)]


def _finetune(task: Transfer) -> list[Measured]:
    config = task.config
    recipe = recipe_hash(recipe_of(config, "finetune"))
    job = finetune.Job(
        task.backbone, config.finetune, config.loop, config.data, task.seed, task.device,
        f"{task.backbone.sha256} {recipe} {task.data} seed {task.seed}", task.resume,
    )  # fmt: skip
    tuned = finetune.finetune(job, task.splits, task.output / "finetune")
    details = {
        "lr": tuned.lr,
        "weight_decay": tuned.weight_decay,
        "steps": tuned.steps,
        "batch_size": config.loop.batch_size,
        "amp": config.loop.amp,
        "tried": tuned.tried,
    }
    selection = _selection(task) if tuned.tried else "last"
    name = config.protocol or "finetune"
    return [_measured(task, tuned.score, name, selection, details)]


def _measured(
    task: Transfer, value: float, protocol: str, selection: str, details: dict[str, Any]
) -> Measured:
    metric = task.splits.test.metric
    return Measured(value, metric, "%", protocol, task.splits.test.split, selection, details)


def _enough_neighbours(task: Transfer) -> None:
    wanted, there = max(task.config.knn.neighbours), len(task.learnable_labels())
    if wanted > there:
        raise InputError(f"knn.neighbours has {wanted}, but there are {there} images to learn from")


def _enough_shots(task: Transfer) -> None:
    counts = torch.bincount(task.learnable_labels(), minlength=task.splits.classes)
    fewest, wanted = int(counts.argmin()), max(task.config.few_shot.shots)
    if int(counts[fewest]) < wanted:
        train = task.splits.train
        raise InputError(
            f"few_shot.shots has {wanted}, but class {train.classes[fewest]!r} of {train.name} has "
            f"{int(counts[fewest])} images to learn from"
        )


def _enough_to_choose_on(task: Transfer) -> None:
    if task.splits.val is None:
        parts_to_choose_by(task.splits.train.labels, task.config.linear.held_out)


def _selection(task: Transfer) -> str:
    return "best on held-out train" if task.splits.val is None else "best on val"


ONE_LABEL = ("knn", "few_shot")  # methods for data sets with one label an image
METHODS: dict[str, Callable[[Transfer], list[Measured]]] = {
    "linear": _linear,  # features once, logistic regression
    "knn": _knn,
    "few_shot": _few_shot,
    "released": _released,  # the paper code's probe, for comparison
    "finetune": _finetune,
}

NEEDS: dict[str, Callable[[Transfer], None]] = {  # checks before any feature is computed
    "linear": _enough_to_choose_on,
    "knn": _enough_neighbours,
    "few_shot": _enough_shots,
}
