"""Training batches as a pure function of (seed, iteration): a resumed run sees what it would have.

The records of the data are kept once on a machine: its first rank loads and serialises them into a
file that all ranks, and their loading processes, map into memory.

detectron2's samplers and mapper are used as they are. Around them, each draw is numbered: position
p of the shuffled stream is augmented with random numbers seeded by (seed, p), and batches are
grouped by aspect ratio from the recorded sizes, before any image is read. So the stream can be
entered at any iteration, whatever the number of worker processes.
"""

import contextlib
import copy
import functools
import os
import pickle
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
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


class Records(Sequence[Record]):
    """Records of detectron2 in a file that is mapped into memory; each look-up makes a new one.

    Args:
        path: as ``write`` returns it; it may be deleted once it is mapped.
    """

    def __init__(self, path: Path) -> None:
        self._bytes = np.memmap(path, np.uint8, mode="r")
        count = int(self._bytes[-8:].view(np.int64)[0])
        table = self._bytes[-8 - 9 * count : -8]
        self._ends = np.frombuffer(table[: 8 * count].tobytes(), np.int64)
        self.wide = table[8 * count :].astype(bool)  # per record: it is wider than high

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Records":
        """Return records that this process alone needs."""
        path = cls.write(records)
        found = cls(path)
        path.unlink()
        return found

    @staticmethod
    def write(records: Iterable[Record]) -> Path:
        """Write a temporary file: the pickled records, where each ends, their forms, the count."""
        ends, wide, end = [], [], 0
        with tempfile.NamedTemporaryFile(prefix="records-", delete=False) as file:
            path = Path(file.name)
            try:
                for record in records:
                    end += file.write(pickle.dumps(record, pickle.HIGHEST_PROTOCOL))
                    ends.append(end)
                    wide.append(record["width"] > record["height"])
                for table in (np.array(ends), np.array(wide), np.array([len(ends)])):
                    file.write(table.tobytes())
            except BaseException:
                path.unlink()
                raise
        return path

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return pickle.loads(self._bytes[start : self._ends[index]].data)


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

    def __init__(self, records: Sequence[Record], mapper: DatasetMapper, seed: int) -> None:
        self.records, self.mapper, self.seed = records, mapper, seed

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

    def __init__(self, cfg: CfgNode, records: Records) -> None:
        self.start, self.workers, self.seed = 0, cfg.DATALOADER.NUM_WORKERS, cfg.SEED
        self.per_rank = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        self.dataset = NumberedDataset(records, Mapper(cfg, True), cfg.SEED)
        self.sampler = _sampler(cfg, records)
        self.wide = records.wide.tolist() if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None

    def again(self, start: int = 0, workers: int | None = None) -> "EndlessBatches":
        """Return the same batches from batch ``start`` on, over the same data."""
        other = copy.copy(self)
        other.start, other.workers = start, self.workers if workers is None else workers
        return other

    def __iter__(self) -> Iterator[list[Record]]:
        batches = GroupedBatches(self.sampler, self.wide, self.per_rank, self.start)
        generator = torch.Generator().manual_seed(self.seed)  # leaves the global one alone
        return start(
            DataLoader(
                self.dataset,
                batch_sampler=batches,
                num_workers=self.workers,
                collate_fn=_as_list,
                generator=generator,
                worker_init_fn=functools.partial(begin_worker, os.getpid()),
            )
        )


def training_records(cfg: CfgNode) -> Records:
    """Return detectron2's records of ``DATASETS.TRAIN``, filtered as the config says.

    Every rank calls it. The first rank of a machine loads them, and all of them share its memory.
    """
    path = None
    if comm.get_local_rank() == 0:
        least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
        path = Records.write(
            get_detection_dataset_dicts(
                cfg.DATASETS.TRAIN,
                filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
                min_keypoints=least,
            )
        )
    first = comm.get_rank() - comm.get_local_rank()
    records = Records(comm.all_gather(path)[first])
    comm.synchronize()
    if path is not None:
        path.unlink()
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
    evaluated = cfg.clone()
    evaluated.defrost()
    evaluated.DATASETS.TRAIN = (catalog_name,)  # where detectron2's mapper looks keypoints up
    return SplitBatches(
        build_detection_test_loader(evaluated, catalog_name, mapper=Mapper(evaluated, False))
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


def _sampler(cfg: CfgNode, records: Sequence[Record]) -> Sampler[int]:
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
