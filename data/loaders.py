"""Batches of an ``IndexedDataset``, with or without worker processes, in one shape.

B images of a batch, S pixels: (images B×3×S×S uint8, labels B or B×K, index B).
"""

import functools
import os
from collections.abc import Iterator
from typing import Any, Protocol

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from core import signals
from core.errors import InputError
from data.sampler import EpochSampler, RankShare

Batch = tuple[Tensor, Tensor, Tensor]
PREFETCHED = 4  # batches that each worker keeps ready


class Indexed(Protocol):
    """What is loaded: ``IndexedDataset``, or anything that answers the same keys."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> tuple[Any, ...]: ...


class Loader:
    """Iterate it for batches; ``InputError`` comes out of a worker as the one sentence that it is.

    Workers live as long as the loader, or as this process. Each uses one thread, and CUDA tensors
    get pinned memory.
    """

    def __init__(self, dataset: Indexed, workers: int, **how: Any) -> None:
        if workers < 0:
            raise InputError(f"data.workers is {workers}; it must be 0 or more processes")
        if workers:
            how |= {"prefetch_factor": PREFETCHED, "persistent_workers": True}
        self.batches: DataLoader[Any] = DataLoader(
            _Careful(dataset),
            num_workers=workers,
            worker_init_fn=functools.partial(begin_worker, os.getpid()),
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each epoch, and each resume, draws from torch's own
            **how,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in start(self.batches):
            if isinstance(batch, InputError):
                self.batches._iterator = None  # else workers would live on in the traceback
                raise type(batch)(str(batch))
            yield batch[0], batch[1], batch[2]


def start(batches: DataLoader[Any]) -> Iterator[Any]:
    """Return ``iter(batches)``, whose workers no stop signal ends: the main process ends them."""
    with signals.held_back():
        return iter(batches)


def training_loader(dataset: Indexed, sampler: EpochSampler, workers: int = 0) -> Loader:
    """Return the augmented batches of the epoch (and from the step) that the sampler is set to.

    Call ``sampler.set_epoch(epoch, start)`` before each iteration; workers persist over epochs.
    """
    return Loader(dataset, workers, batch_sampler=sampler)


def evaluation_loader(
    dataset: Indexed, batch_size: int, workers: int = 0, rank: int = 0, world: int = 1
) -> Loader:
    """Return un-augmented batches of this rank's share: over all ranks, every image exactly once.

    Rank r has the indices r, r + W, …; the last batch may be smaller, and ranks may differ by one
    image. ``batch_size`` is per rank.
    """
    sampler: Sampler[int] = RankShare(len(dataset), rank, world)
    return Loader(dataset, workers, batch_size=batch_size, sampler=sampler)


def to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Copy a batch to the device; from pinned memory that goes on while the device computes.

    Images travel as uint8, a quarter of the bytes, and are normalised there.
    """
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


class _Careful(Dataset[Any]):
    """Return an ``InputError`` instead of raising it: a worker would bury it in a traceback."""

    def __init__(self, dataset: Indexed) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except InputError as error:
            return error


def _collate(items: list[Any]) -> Any:
    for item in items:
        if isinstance(item, InputError):
            return item
    return default_collate(items)


def begin_worker(parent: int, _: int) -> None:
    """Have a loading process end with the main one (as ``worker_init_fn``); use one thread."""
    signals.end_with_parent(parent)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
