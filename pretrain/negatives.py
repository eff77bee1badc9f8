"""The negatives of a step: for each image K bank rows of other classes, cut from one random pool.

Shapes: B images, N bank rows, P pool rows, K negatives, C rows of a chunk, W ranks.

Each step draws one uniformly random sequence of P distinct bank rows, the pool. Image i skips the
rows of its own class and takes K others in a row, cyclically, from an offset of its own. The pool
does not depend on the offsets, and permuting its other-class rows leaves its distribution as it
is; so for every single image the K rows are exactly a uniformly random K-subset of the N − N_c
rows of other classes, each of which is in it with probability K / (N − N_c).

Two images of a step are not independent: they take stretches of the same pool. They share K²/P
rows on average, where independent subsets would share about K²/N: more if P < N, and the number
varies more in any case. With ``shared`` all offsets are 0. The loss of an image depends on its own
negatives only, so the expectations of loss and gradient do not change. Steps are independent.

If K exceeds the other-class rows of any class, the pool is P independent draws, and the K rows of
every image are K independent uniform draws from its other-class rows. (The released code decides
that image by image; for classes of equal size it is the same.)

Draws are a function of (seed, step) and of an image's place in the joined batch of all ranks, so
they need no generator state and are the same on any number of ranks with devices of one kind.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from core import dist
from core.errors import InputError
from core.seeds import mixed
from pretrain.recipe import CTCConfig

LARGEST_POOL = 1 << 30  # P at most
POOL_FACTOR = 4  # P = 4 K by default
ON_HOST = ("cpu",)  # device types whose tensors the host reads without waiting


@dataclasses.dataclass(frozen=True)
class Negatives:
    """The negatives of B images: the other-class rows of a stretch of the pool for each.

    Holds R of the P pool rows: all, or those of a rank's shard.
    """

    rows: Tensor  # R int64, where they are in this rank's bank
    classes: Tensor  # R
    position: Tensor  # R, their positions in the pool, ascending; 2P: padding, no row
    own: Tensor  # B, the images' classes
    start: Tensor  # B, where each stretch begins, in 0..P-1
    length: Tensor  # B, positions that it covers, cyclically
    count: Tensor  # B int64, negatives in it over all ranks: K, or all others if there are fewer
    pool: int  # P

    def counted(self, low: int, high: int, images: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return 1 where held rows low … high − 1 are negatives of the images, else 0, B×C."""
        own, start, length = (
            rows_of(x, images)[:, None] for x in (self.own, self.start, self.length)
        )
        covered = self.position[low:high] - start  # B×C
        mask = torch.empty_like(covered)  # CPUs compare floats into floats many times faster
        covered.add_(torch.lt(covered, 0.0, out=mask), alpha=self.pool)  # once around
        counted = torch.lt(covered, length, out=mask)
        return counted.mul_(torch.ne(self.classes[low:high], own, out=covered)).to(dtype)

    def chunks(
        self, size: int, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Yield (rows C, images b or None, counted b×C) that together hold every negative once.

        On a CPU only the images whose stretch meets the chunk are named. On a GPU None means all
        images, so that the host need not know.
        """
        lows = range(0, len(self.rows), size)
        highs = [min(low + size, len(self.rows)) for low in lows]
        meets = None
        if self.rows.device.type in ON_HOST:
            first = self.position[list(lows), None]  # chunks×1
            last = self.position[[high - 1 for high in highs], None]
            end = self.start + self.length
            meets = (self.start <= last) & (end > first) | (end - self.pool > first)
        for number, (low, high) in enumerate(zip(lows, highs, strict=True)):
            images = None if meets is None else meets[number].nonzero()[:, 0]
            if images is None or len(images):
                yield self.rows[low:high], images, self.counted(low, high, images, dtype)

    def listed(self) -> Tensor:
        """Return each image's negatives among the held rows, B×K (each must have K).

        Slow, for tests and reference losses.
        """
        counted = self.counted(0, len(self.rows), None, torch.float32)
        return torch.stack([self.rows[one > 0] for one in counted])


class Drawer:
    """Draws the negatives of each step.

    Args:
        config: read are num_negatives, negatives and pool.
        labels: N, the classes of all training images.

    Attributes:
        pool: P. replace: whether pool rows are drawn with replacement.

    Raises:
        InputError: one class only, or a pool too large to draw.
    """

    def __init__(self, config: CTCConfig, labels: Tensor, seed: int) -> None:
        self.seed, self.images, self.negatives = seed, len(labels), config.num_negatives
        self.shared = config.negatives == "shared" or not self.negatives
        largest = int(torch.bincount(labels).max())
        others = self.images - largest  # of an image of the largest class
        if others == 0:
            raise InputError("CTC's stage 2 needs images of at least two classes (or ctc.beta 0)")
        self.replace = self.negatives > others
        enough = self.negatives + largest  # without replacement it holds K others of any class
        if self.replace:
            # 2K + 64 others on average: fewer than K (which lowers an image's count) never happen
            enough = math.ceil((2 * self.negatives + 64) * self.images / others)
            self.pool = max(config.pool, enough)
        elif not self.negatives:
            self.pool = self.images
        else:
            asked = enough if self.shared else config.pool or POOL_FACTOR * self.negatives
            self.pool = min(self.images, max(asked, enough))
        if self.pool > LARGEST_POOL:
            raise InputError(
                f"ctc.num_negatives {self.negatives} and ctc.pool {config.pool} need "
                f"{self.pool:,} bank rows a step; at most {LARGEST_POOL:,} can be drawn"
            )

    def draw(
        self, step: int, own: Tensor, classes: Tensor, rank: int = 0, world: int = 1
    ) -> Negatives:
        """Draw the negatives of a step. Collective if ``world`` exceeds 1.

        Args:
            step: global step.
            own: the classes of this rank's B images, or of all ranks' if the bank is sharded.
            classes: int32, of the rows that this rank's bank holds: rank, rank + world, ….
            rank, world: of a sharded bank; 0 and 1 for a whole one.

        Returns:
            Negatives of the images of ``own`` among the rows of this rank's bank.
        """
        device, size = classes.device, len(own)
        generator = seeded(device, self.seed, step)
        rows = self._pool(generator, device)
        joined, first = (size, 0) if world > 1 else (size * dist.world_size(), size * dist.rank())
        offset = torch.rand(joined, generator=generator, device=device, dtype=torch.float64)
        offset = offset.mul_(not self.shared)[first : first + size]
        position = torch.arange(self.pool, device=device)
        if world > 1:  # every rank knows the classes of the whole pool, and computes on its part
            held = rows % world == rank
            rows = torch.where(held, rows // world, 0)
            of_rows = dist.all_sum(torch.where(held, classes[rows], 0))
        else:
            of_rows = classes[rows]
        start, length, count = stretches(of_rows, own, offset, self.negatives or self.pool)
        if world > 1:
            part = torch.argsort(held.to(torch.int8), descending=True, stable=True)
            part = part[: self._largest_part(world)]
            position = torch.where(held[part], position[part], 2 * self.pool)
            rows, of_rows = rows[part], of_rows[part]
        of_rows, position, own, start, length = (
            x.to(exact_float(self.pool)) for x in (of_rows, position, own, start, length)
        )
        return Negatives(rows, of_rows, position, own, start, length, count, self.pool)

    def _pool(self, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Return the P rows of a step's pool among all N."""
        images, pool = self.images, self.pool
        if not self.negatives:
            return torch.arange(images, device=device)
        if self.replace:
            return torch.randint(images, (pool,), generator=generator, device=device)
        if images <= 3 * pool:
            return torch.randperm(images, generator=generator, device=device)[:pool]
        # O(P) where N is far larger: the first P different ones of independent draws. Of
        # 1.5 P + 64 draws from N > 3 P rows fewer than P differ with a probability below 1e-30.
        drawn = torch.randint(images, (pool + pool // 2 + 64,), generator=generator, device=device)
        ordered, order = torch.sort(drawn, stable=True)
        again = torch.zeros_like(drawn, dtype=torch.int8)
        again[order[1:]] = (ordered[1:] == ordered[:-1]).to(torch.int8)
        return drawn[torch.argsort(again, stable=True)[:pool]]

    def _largest_part(self, world: int) -> int:
        """Return a size that a rank's part of the pool does not exceed (but with odds of 1e-20)."""
        mean = self.pool / world
        likely = math.ceil(mean + 10 * math.sqrt(mean)) + 16
        return min(self.pool, likely if self.replace else min(likely, -(-self.images // world)))


def stretches(
    classes: Tensor, own: Tensor, offset: Tensor, negatives: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return where each image's stretch of the pool starts, its length, and its negatives, B each.

    Args:
        classes: P, of the pool's rows. own: B, of the images.
        offset: B, in [0, 1): where among an image's other-class rows its stretch starts.
        negatives: K; if there are fewer others, all are taken.
    """
    size = len(classes)
    # The j-th of all rows sorted by class, at position p_j, has p_j − (j − first) others before it,
    # where ``first`` is the j of its class's first row; so the key below rises with j, and a binary
    # search for an image's r-th other row tells how many rows of its own class lie before that.
    by_class, order = torch.sort(classes.long(), stable=True)
    key = by_class * (2 * size) + (order - torch.arange(size, device=order.device)) + size
    own = own.long()
    first = torch.searchsorted(by_class, own)
    others = size - (torch.searchsorted(by_class, own, right=True) - first)

    def position_of(rank: Tensor) -> Tensor:
        wanted = own * (2 * size) + (rank - first) + size
        return rank + torch.searchsorted(key, wanted, right=True) - first

    count = others.clamp(max=negatives)
    rank = torch.minimum((offset * others).long(), others - 1).clamp(min=0)
    last = rank + count - 1
    around = last >= others
    start = position_of(rank)
    end = position_of(torch.where(around, last - others, last)) + 1 + around * size
    return start, end - start, count


def seeded(device: torch.device, *seed: int) -> torch.Generator | None:
    """Return a generator of its own for a device."""
    return torch.Generator(device).manual_seed(mixed(*seed) >> 1)


def exact_float(pool: int) -> torch.dtype:
    """Return a float type that holds all whole numbers up to 2P."""
    return torch.float32 if 2 * pool <= 1 << 24 else torch.float64


def rows_of(x: Tensor, images: Tensor | None) -> Tensor:
    """Return the rows of some images, or of all (None)."""
    return x if images is None else x.index_select(0, images)
