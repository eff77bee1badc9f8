"""Training batches as a pure function of (seed, iteration): a resumed run sees what it would have.

detectron2's samplers and mapper are used as they are. Around them, each draw is numbered: position
p of the shuffled stream is augmented with random numbers seeded by (seed, p), and batches are
grouped by aspect ratio from the recorded sizes, before any image is read. So the stream can be
entered at any iteration, whatever the number of worker processes.
"""

import contextlib
import functools
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.common import DatasetFromList
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from core.errors import InputError
from data.loaders import begin_worker, start

Record = dict[str, Any]


class Mapper(DatasetMapper):
    """detectron2's mapper; an image that cannot be read becomes a sentence that names it."""

    def __call__(self, dataset_dict: Record) -> Record:
        try:
            return super().__call__(dataset_dict)
        except SizeMismatchError as error:
            raise InputError(" ".join(str(error).split())) from None
        except (OSError, SyntaxError) as error:
            raise InputError(
                f"image {dataset_dict['file_name']} does not decode: {error}"
            ) from None


class NumberedDataset(Dataset[Record]):
    """Item (position, index): record ``index``, augmented by what ``position`` draws."""

    def __init__(self, records: list[Record], mapper: DatasetMapper, seed: int) -> None:
        self.records = DatasetFromList(records, copy=False)
        self.mapper, self.seed = mapper, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: tuple[int, int]) -> Record:
        position, index = item
        with seeded(self.seed, position):
            mapped: Record = self.mapper(self.records[index])
        return mapped


class GroupedBatches(Sampler[list[tuple[int, int]]]):
    """This rank's endless batches of (position, index), from batch ``start`` on.

    Args:
        sampler: detectron2's, yields this rank's share of the endless index stream.
        wide: per record, whether it is wider than high; None: no grouping by aspect ratio.
        size: images in a batch of this rank.
        start: batches to pass over.
    """

    def __init__(
        self, sampler: Sampler[int], wide: list[bool] | None, size: int, start: int = 0
    ) -> None:
        self.sampler, self.wide, self.size, self.start = sampler, wide, size, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        buckets: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        rank, world = comm.get_rank(), comm.get_world_size()
        made = 0
        for step, index in enumerate(self.sampler):
            bucket = buckets[self.wide[index]] if self.wide is not None else buckets[0]
            bucket.append((step * world + rank, index))
            if len(bucket) == self.size:
                batch = bucket[:]
                bucket.clear()
                made += 1
                if made > self.start:
                    yield batch


class EndlessBatches:
    """An iterable of training batches; each ``iter()`` begins at batch ``start`` again."""

    def __init__(self, cfg: CfgNode, records: list[Record], start: int = 0) -> None:
        self.cfg, self.records, self.start = cfg, records, start
        self.per_rank = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        self.dataset = NumberedDataset(records, Mapper(cfg, True), cfg.SEED)
        self.sampler = _sampler(cfg, records)
        self.wide = None
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            self.wide = [record["width"] > record["height"] for record in records]

    def __iter__(self) -> Iterator[list[Record]]:
        workers = self.cfg.DATALOADER.NUM_WORKERS
        batches = GroupedBatches(self.sampler, self.wide, self.per_rank, self.start)
        generator = torch.Generator().manual_seed(self.cfg.SEED)  # leaves the global one alone
        return start(
            DataLoader(
                self.dataset,
                batch_sampler=batches,
                num_workers=workers,
                collate_fn=_as_list,
                generator=generator,
                worker_init_fn=functools.partial(begin_worker, os.getpid()),
            )
        )


def training_records(cfg: CfgNode) -> list[Record]:
    """Return detectron2's records of ``DATASETS.TRAIN``, filtered as the config says."""
    least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    records: list[Record] = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=least,
    )
    return records


class SplitBatches:
    """An iterable of a whole split, each image once over all ranks; see ``test_loader``."""

    def __init__(self, loader: DataLoader[Record]) -> None:
        loader.worker_init_fn = functools.partial(begin_worker, os.getpid())
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Record]]:
        return start(self.loader)


def test_loader(cfg: CfgNode, catalog_name: str) -> SplitBatches:
    """Return the loader of a whole split, each image once over all ranks."""
    judged = cfg.clone()
    judged.defrost()
    judged.DATASETS.TRAIN = (catalog_name,)  # where detectron2's mapper looks keypoints up
    return SplitBatches(
        build_detection_test_loader(judged, catalog_name, mapper=Mapper(judged, False))
    )


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed numpy's and Python's global generators from ``numbers``; put them back at the end."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    words = np.random.SeedSequence(numbers).generate_state(4)
    np.random.seed(words)  # noqa: NPY002  detectron2's augmentations draw from it
    random.seed(int(words[0]))
    try:
        yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def _sampler(cfg: CfgNode, records: list[Record]) -> Sampler[int]:
    name, seed = cfg.DATALOADER.SAMPLER_TRAIN, cfg.SEED
    if name == "TrainingSampler":
        return TrainingSampler(len(records), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(factors, seed=seed)
    if name == "RandomSubsetTrainingSampler":
        ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
        return RandomSubsetTrainingSampler(len(records), ratio, seed_shuffle=seed, seed_subset=0)
    raise InputError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; it can be TrainingSampler, "
        "RepeatFactorTrainingSampler or RandomSubsetTrainingSampler"
    )


def _as_list(batch: list[Record]) -> list[Record]:
    return batch
