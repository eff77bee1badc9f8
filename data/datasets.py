"""Any data set of the catalogue as (image, label, index): the one way images enter this suite.

N images, S the side that the network sees, K classes. Images stay uint8 until they are on the
device, where ``normalise`` makes them float.
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.config import ROOT
from core.errors import InputError
from core.seeds import mixed_array, torch_seeded
from data.catalogue import DATASETS as DATASETS  # re-exported: one import serves a step
from data.catalogue import DatasetInfo, look_up
from data.loaders import evaluation_loader as evaluation_loader
from data.loaders import to_device as to_device
from data.loaders import training_loader as training_loader
from data.readers import shards
from data.sampler import EpochSampler as EpochSampler
from data.source import Request, Source, balanced_positions
from data.transforms import AUGMENTATIONS, evaluation_view
from data.transforms import normalise as normalise

SPLITS = ("train", "val", "test")
DATA_FOLDER_VARIABLE = "TRANSFER_SUITE_DATA"
Colour = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are seen."""

    name: str = "shapes"  # a key of data.catalogue.DATASETS
    root: str = ""  # folder or file; "": <name> under $TRANSFER_SUITE_DATA or datasets/
    image_size: int = 0  # side of the square that the network sees, pixels; 0: the data set's own
    augmentation: str = ""  # a key of data.transforms.AUGMENTATIONS; training only; "": its own
    shuffle: str = "global"  # order of an epoch; "shards": one after the other, for slow disks
    workers: int = 0  # processes that decode and augment; 0: the training process does
    limit: int = 0  # images per split, equally many of each class; 0: all. For trials
    partial: bool = False  # accept fewer images or classes than the official ones; the name says so
    val_fraction: float = 0.0  # share of train held out as val, where no official val split exists
    resize_ratio: float = -1.0  # evaluation: short side / crop side; 0: no crop; -1: data set's own
    mean: list[float] = dataclasses.field(default_factory=list)  # RGB, 0..1; []: data set's own
    std: list[float] = dataclasses.field(default_factory=list)


class IndexedDataset(Dataset[Any]):
    """Items (image 3×S×S uint8, label, index).

    ``dataset[i]`` is the deterministic evaluation view. ``dataset[epoch, i]`` is augmented: a pure
    function of (seed, epoch, i), whatever the worker, rank or batch; torch's global random state
    is left as it was.

    Attributes:
        labels: N int64; or N×K of 1, 0 and −1 (not evaluated) where an image has several labels.
        classes: K names.
        split: the official split that the images come from ("train" where val is held out of it).
        mean, std: of RGB in 0..1, for ``normalise``.
        blocks: N, the shard of each image where an epoch takes them shard by shard, else None.
        metric: how the field scores this data set: "top1", "mean_per_class", "voc07_map".
    """

    def __init__(
        self, source: Source, cfg: DataConfig, name: str, split: str, train: bool, seed: int
    ) -> None:
        info, seen = look_up(cfg.name), resolved(cfg)
        self.source, self.name, self.split, self.seed = source, name, split, seed
        self.labels, self.classes = source.labels, source.classes
        self.image_size, self.resize_ratio = seen.image_size, seen.resize_ratio
        self.mean, self.std = _statistics(cfg, info)
        self.metric = info.metric
        self.blocks = _blocks(source, cfg)
        self.augmentation = seen.augmentation if train else "none"
        self._augment = AUGMENTATIONS[self.augmentation]
        several = self.labels.dim() > 1
        self._labels: Any = self.labels if several else self.labels.tolist()

    @property
    def digest(self) -> str:
        """A sha256, in hex, of what the images, labels and classes are, not of where they lie."""
        return self.source.digest

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Any, int]:
        epoch, index = key if isinstance(key, tuple) else (None, key)
        if not 0 <= index < len(self.source):
            raise IndexError(f"image {index} of {len(self.source)}")
        image = self.source.decode(index)
        if epoch is None or self._augment is None:
            image = evaluation_view(image, self.image_size, self.resize_ratio)
        else:
            with torch_seeded(self.seed, epoch, index):
                image = self._augment(image, self.image_size, self.mean)
        return image, self._labels[index], index


def open_dataset(cfg: DataConfig, split: str, train: bool = False, seed: int = 0) -> IndexedDataset:
    """Open one split of a data set.

    Args:
        split: "train", "val" or "test". "val" is the official one or, where there is none,
            the part of train that ``cfg.val_fraction`` holds out (then "train" is the rest).
        train: whether (epoch, index) keys are augmented by ``cfg.augmentation``.
        seed: of the augmentation. The data themselves, and what is held out, do not depend on it.

    Raises:
        InputError: unknown data set or augmentation, data not found or not laid out as it should
            be (the sentence says where it looked and what was expected), no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    info = look_up(cfg.name)
    _check(cfg)
    root = locate(cfg)
    available = splits_of(cfg)
    info = _stored(cfg, info, root)
    held_out = cfg.val_fraction > 0 and "val" not in available and split in ("train", "val")
    official = "train" if held_out else split
    if official not in available:
        hint = "; set data.val_fraction to hold out a part of train" if split == "val" else ""
        raise InputError(f"{cfg.name} has {' and '.join(available)}, but no {split} split{hint}")
    size = cfg.image_size or info.image_size
    request = Request(root, official, size, 0 if held_out else cfg.limit)
    try:
        source = info.read(request)
    except InputError as error:
        raise InputError(f"{error}; {_how(info, root)}" if not info.drawn else str(error)) from None
    if info.counts and not info.drawn:
        _check_layout(cfg, info, source, official, root)
    if held_out:
        fit, rest = hold_out(source.labels, cfg.val_fraction)
        source = source.subset(fit if split == "train" else rest)
    if 0 < cfg.limit < len(source):
        source = source.subset(balanced_positions(source.labels, cfg.limit))
    return IndexedDataset(source, cfg, data_name(cfg), split, train, seed)


def places_of(datasets: Iterable[IndexedDataset]) -> list[str]:
    """Return the files and folders that data sets lie in; drawn ones lie nowhere."""
    places = {Path(dataset.source.where).absolute() for dataset in datasets}
    return sorted(str(place) for place in places if place.exists())


def resolved(cfg: DataConfig) -> DataConfig:
    """Return the config with the data set's own values where it leaves them open."""
    info = look_up(cfg.name)
    mean, std = _statistics(cfg, info)
    return dataclasses.replace(
        cfg,
        image_size=cfg.image_size or info.image_size,
        augmentation=cfg.augmentation or info.augmentation,
        resize_ratio=info.resize_ratio if cfg.resize_ratio < 0 else cfg.resize_ratio,
        mean=list(mean),
        std=list(std),
    )


def report_split(cfg: DataConfig) -> str:
    """Return the split that final numbers are given on: test where its labels are public, else val.

    "val" is also what ``cfg.val_fraction`` holds out; where there is nothing but train, it is that.
    Never choose a model or a setting by it: choose on val, or on a part held out of train.
    """
    available = splits_of(cfg)
    held_out = "val" if cfg.val_fraction > 0 else "train"
    return next((split for split in ("test", "val") if split in available), held_out)


def splits_of(cfg: DataConfig) -> list[str]:
    """Return the official splits of a data set, in the order train, val, test."""
    info = look_up(cfg.name)
    if info.find_splits is None:
        return [split for split in SPLITS if split in info.counts]
    root = locate(cfg)
    find = _stored(cfg, info, root).find_splits
    found = find(root) if find else []
    if not found:
        raise InputError(f"{root} holds no data; {_how(info, root)}")
    return found


def hold_out(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split positions 0..N-1 into (kept, held out), both ascending, with equal shares per class.

    Every class of two or more images keeps at least one and gives at least one. A function of the
    labels, the fraction (in 0..1, both excluded) and the seed only. Labels N, or N×K (then the
    share is of all images).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction} is not between 0 and 1")
    n = len(labels)
    noise = torch.from_numpy((mixed_array((seed,), torch.arange(n).numpy()) >> 1).astype("int64"))
    classes = labels if labels.dim() == 1 else torch.zeros(n, dtype=torch.long)
    given = torch.zeros(n, dtype=torch.bool)
    for label in classes.unique().tolist():
        members = (classes == label).nonzero().flatten()
        if len(members) < 2:
            continue
        share = min(max(round(len(members) * fraction), 1), len(members) - 1)
        given[members[noise[members].argsort()[:share]]] = True
    return (~given).nonzero().flatten(), given.nonzero().flatten()


def locate(cfg: DataConfig) -> Path:
    """Return where a data set lies.

    Raises:
        InputError: nowhere; the sentence names the places and how to lay the data set out.
    """
    info = look_up(cfg.name)
    if info.drawn:
        return Path()
    if not cfg.root and info.find_splits is not None:
        raise InputError(f"data.root must say where the {cfg.name} data lie; {_how(info, 'it')}")
    name = Path(cfg.root or info.folder or cfg.name).expanduser()
    places = [ROOT / "datasets" / name]
    if os.environ.get(DATA_FOLDER_VARIABLE):
        places.insert(0, Path(os.environ[DATA_FOLDER_VARIABLE]).expanduser() / name)
    if cfg.root:
        places.insert(0, name)
    for place in places:
        if place.exists():
            return place
    looked = " nor ".join(dict.fromkeys(map(str, places)))
    raise InputError(f"no {cfg.name} data at {looked}; {_how(info, places[-1])}")


def data_name(cfg: DataConfig) -> str:
    """Return the name that result rows carry: for image folders and .npz files, their own."""
    if look_up(cfg.name).find_splits is None:
        return cfg.name + ("_partial" if cfg.partial else "")
    return locate(cfg).resolve().stem


def _stored(cfg: DataConfig, info: DatasetInfo, root: Path) -> DatasetInfo:
    """Return a data set's entry with the reader of shards, where that is how it lies at ``root``.

    Raises:
        InputError: they are another data set's.
    """
    packed = {} if info.drawn or not root.is_dir() else shards.about(root)
    if not packed:
        return info
    named = packed.get("dataset", cfg.name)
    if info.find_splits is None and named != cfg.name:
        raise InputError(f"{root} holds shards of {named}: set data.name {named}, not {cfg.name}")
    shape = DATASETS["shards"]
    find = shape.find_splits if info.find_splits else None
    return dataclasses.replace(info, read=shape.read, how=shape.how, find_splits=find)


def _check_layout(
    cfg: DataConfig, info: DatasetInfo, source: Source, split: str, root: Path
) -> None:
    """Compare counts with the official ones, and decode the first, middle and last image."""
    found = {"images": len(source), "classes": len(source.classes)}
    official = {"images": info.counts.get(split, 0), "classes": info.classes}
    for what, count in official.items():
        if count and found[what] != count and not cfg.partial:
            raise InputError(
                f"{source.where} has {found[what]:,} {what} in {split}, but {cfg.name} has "
                f"{count:,}; {_how(info, root)} (or set data.partial true to take what there is)"
            )
    for position in {0, len(source) // 2, len(source) - 1}:
        source.decode(position)


def _how(info: DatasetInfo, root: Path | str) -> str:
    hint = f" (tools/unpack_data.py ARCHIVE {root} does it safely)" if "unpack" in info.how else ""
    return info.how.format(root=root) + hint


def _check(cfg: DataConfig) -> None:
    if cfg.augmentation and cfg.augmentation not in AUGMENTATIONS:
        known = ", ".join(AUGMENTATIONS)
        raise InputError(f"data.augmentation {cfg.augmentation!r} is not one of {known}")
    if cfg.image_size and cfg.image_size < 8:
        raise InputError(f"data.image_size is {cfg.image_size}; it must be 0 or at least 8 pixels")
    if not 0 <= cfg.val_fraction < 1:
        raise InputError(f"data.val_fraction is {cfg.val_fraction}; it must be in [0, 1)")
    if cfg.workers < 0:
        raise InputError(f"data.workers is {cfg.workers}; it must be 0 or more processes")
    if cfg.resize_ratio not in (-1, 0) and not cfg.resize_ratio >= 1:
        raise InputError(
            f"data.resize_ratio is {cfg.resize_ratio}; it must be at least 1 (short side over crop "
            "side), 0 (no crop) or -1 (the data set's own)"
        )
    if cfg.limit < 0:
        raise InputError(f"data.limit is {cfg.limit}; it must be 0 (all images) or more")


def _blocks(source: Source, cfg: DataConfig) -> np.ndarray | None:
    if cfg.shuffle == "global":
        return None
    if cfg.shuffle != "shards":
        raise InputError(f"data.shuffle {cfg.shuffle!r} is not one of global, shards")
    if isinstance(source.images, Tensor | list):
        raise InputError(f"data.shuffle shards needs shards, but {source.where} has none")
    return source.images.blocks()


def _statistics(cfg: DataConfig, info: DatasetInfo) -> tuple[Colour, Colour]:
    mean, std = cfg.mean or list(info.mean), cfg.std or list(info.std)
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise InputError("data.mean and data.std are three numbers each (RGB), std above 0")
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
