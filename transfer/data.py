"""Parts of a data set, two splits as one, and epochs of a given number of steps.

N images, B images of a global batch.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.errors import InputError
from core.seeds import shuffled
from data.datasets import (
    DataConfig,
    IndexedDataset,
    hold_out,
    open_dataset,
    report_split,
    splits_of,
)
from models.features import InputSpec


@dataclasses.dataclass(frozen=True)
class Splits:
    """The data of a transfer; everything is chosen on ``val``, and ``test`` is used once."""

    train: IndexedDataset  # the whole training split, without the official val split
    val: IndexedDataset | None  # the official val split, where it is not what is reported on
    test: IndexedDataset  # the split that the field reports on

    @property
    def classes(self) -> int:
        """K."""
        return len(self.test.classes)


def open_splits(cfg: DataConfig, seed: int) -> Splits:
    """Open the official splits of a data set, in evaluation view or augmented on request.

    Raises:
        InputError: no data, no split to report on, classes that differ between splits or have no
            image to learn from or, where it is needed, to be evaluated on.
    """
    cfg = dataclasses.replace(cfg, val_fraction=0.0)  # a transfer holds out by its own rule
    reported, available = report_split(cfg), splits_of(cfg)
    if "train" not in available or reported == "train":
        raise InputError(
            f"{cfg.name} has only {' and '.join(available)}: a transfer needs a train split and a "
            "test or val split"
        )
    val = "val" if "val" in available and reported != "val" else None
    splits = Splits(
        open_dataset(cfg, "train", train=True, seed=seed),
        open_dataset(cfg, val, train=True, seed=seed) if val else None,
        open_dataset(cfg, reported),
    )
    _check_classes(splits, cfg.partial)
    return splits


def subset(dataset: IndexedDataset, positions: Tensor, cfg: DataConfig) -> IndexedDataset:
    """Return the images at ``positions`` as a data set with their own indices 0..n-1."""
    source = dataset.source.subset(positions)
    train = dataset.augmentation != "none"
    return IndexedDataset(source, cfg, dataset.name, dataset.split, train, dataset.seed)


def joined(first: IndexedDataset, second: IndexedDataset, cfg: DataConfig) -> IndexedDataset:
    """Return the images of both data sets, those of ``first`` first."""
    source = first.source.joined(second.source)
    name = f"{first.split}+{second.split}"
    train = first.augmentation != "none"
    return IndexedDataset(source, cfg, first.name, name, train, first.seed)


def fit_and_held_out(
    splits: Splits, fraction: float, cfg: DataConfig
) -> tuple[IndexedDataset, IndexedDataset]:
    """Return what a choice may learn from and what it is made on: never the test split.

    Raises:
        InputError: there is no val split, and no class has an image to spare for one.
    """
    if splits.val is not None:
        return splits.train, splits.val
    kept, held = parts_to_choose_by(splits.train.labels, fraction)
    return subset(splits.train, kept, cfg), subset(splits.train, held, cfg)


def parts_to_choose_by(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Return the positions of training images to learn from and of those to choose by.

    Raises:
        InputError: no class has an image to spare.
    """
    kept, held = hold_out(labels, fraction)
    if not len(held):
        raise InputError(
            "no class has 2 images in train, so that none can be held out to choose by: it needs "
            "more images, or a val split"
        )
    return kept, held


class SteppedDataset(Dataset[Any]):
    """A data set whose epochs have exactly ``steps`` batches of B images, however large it is.

    The stream of images runs through the data set again and again, each time in another order;
    epoch e is its e-th stretch of steps × B. So a recipe of 5,000 steps is 20 epochs of 250, each
    saved at its end. Augmentation is a function of (seed, pass through the data set, index), as
    always.
    """

    blocks: None = None  # a stretch of the stream, not shards, is what is shuffled

    def __init__(
        self, dataset: IndexedDataset, steps: int, batch_size: int, inputs: InputSpec | None = None
    ) -> None:
        self.dataset, self.batch_size, self.length = dataset, batch_size, steps * batch_size
        self.mean = dataset.mean if inputs is None else inputs.mean
        self.std = dataset.std if inputs is None else inputs.std
        self.orders: dict[int, np.ndarray] = {}  # of the last two passes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Any, int]:
        epoch, position = key
        passes, place = divmod(epoch * self.length + position, len(self.dataset))
        return self.dataset[passes, int(self.order(passes)[place])]

    def order(self, passes: int) -> np.ndarray:
        """Return a pass's permutation of 0..N-1.

        Without it a stretch of a data set that is sorted by class would show few of the classes.
        """
        if passes not in self.orders:
            kept = list(self.orders.items())[-1:]  # a stretch may straddle two passes
            order = shuffled(len(self.dataset), self.dataset.seed, passes)
            self.orders = {**dict(kept), passes: order}
        return self.orders[passes]


def _check_classes(splits: Splits, partial: bool) -> None:
    train, test = splits.train, splits.test
    if list(train.classes) != list(test.classes):
        raise InputError(
            f"{train.name}: train has {len(train.classes)} classes and {test.split} has "
            f"{len(test.classes)}, or their names differ; both must list the same classes"
        )
    if len(train.classes) < 2:
        raise InputError(f"{train.name} has {len(train.classes)} class; a probe needs at least 2")
    empty = _classes_without_images(train)
    if empty:
        raise InputError(
            f"class {empty[0]!r} of {train.name} has no image in train ({len(empty)} such "
            "classes): it cannot be learnt"
        )
    empty = _classes_without_images(test)
    if empty and not (partial and test.metric == "top1"):
        hint = "; data.partial true accepts that" if test.metric == "top1" else ""
        raise InputError(
            f"class {empty[0]!r} of {test.name} has no image in {test.split} ({len(empty)} such "
            f"classes): {test.metric} over all classes is not defined{hint}"
        )


def _classes_without_images(dataset: IndexedDataset) -> list[str]:
    labels = dataset.labels
    if labels.ndim == 2:
        counts = (labels == 1).sum(0)
    else:
        counts = torch.bincount(labels, minlength=len(dataset.classes))
    return [name for name, count in zip(dataset.classes, counts.tolist()) if count == 0]
