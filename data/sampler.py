"""The order of images in an epoch: a function of (seed, epoch), cut into global batches.

N images, B global batch size, W ranks.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from core.errors import InputError
from core.seeds import shuffled, shuffled_in_blocks


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """This rank's part of every global batch, as lists of (epoch, index), each of B / W pairs.

    The order depends on (seed, epoch) only. Global batch b holds the same images on any number of
    ranks; rank r has its r-th contiguous slice, so that gathering in rank order restores the
    order of one process. The last N mod B images of an epoch's order are left out of that epoch.

    With ``blocks``, the block (shard) of each image, an epoch reads one block after the other.

    Use it as ``batch_sampler``; call ``set_epoch`` before each epoch's iteration.

    Raises:
        InputError: B is not divisible by the ranks, or larger than N.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        blocks: np.ndarray | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise InputError(
                f"batch size {batch_size} does not divide over {world} processes; "
                f"take a positive multiple of {world}"
            )
        if n < batch_size:
            raise InputError(
                f"batch size {batch_size} exceeds the {n} training images; take at most {n}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not in 0..{world - 1}")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world, self.blocks = rank, world, blocks
        self.epoch, self.start = 0, 0
        self.steps_per_epoch = n // batch_size

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration yields, from its step ``start`` on."""
        if not 0 <= start <= self.steps_per_epoch:
            raise ValueError(f"step {start} is not in 0..{self.steps_per_epoch}")
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Return the steps that the next iteration yields."""
        return self.steps_per_epoch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seed = (self.seed, self.epoch)
        if self.blocks is None:
            order = shuffled(self.n, *seed)
        else:
            order = shuffled_in_blocks(self.blocks, *seed)
        share = self.batch_size // self.world
        for step in range(self.start, self.steps_per_epoch):
            first = step * self.batch_size + self.rank * share
            yield [(self.epoch, int(index)) for index in order[first : first + share]]


class RankShare(Sampler[int]):
    """Every W-th index from ``rank`` on: together the ranks cover 0..N-1, each index once."""

    def __init__(self, n: int, rank: int = 0, world: int = 1) -> None:
        self.indices = range(rank, n, world)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
