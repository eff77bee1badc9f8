"""Which bank rows each image is contrasted with: windows over one random order per step.

Shapes: B images, N bank rows, P pool rows, K negatives, C rows of a chunk, W ranks.

Each step draws one uniformly random order of bank rows, the pool. Image i walks along it from a
position s_i of its own, cyclically, skips rows of its own group (its class, or only itself), and
takes the first K others. The order knows nothing of s_i, and permuting the other-group rows among
themselves leaves its distribution as it is; so for every single image

* the K rows are exactly a uniformly random K-subset of the other-group rows (``replace`` off), or
  exactly K independent uniform draws from them (``replace`` on).

What is not as if drawn independently is the choice of two images of the same step: their windows
overlap in a stretch of the same order. The overlap has the mean K²/P that independent subsets
of the pool have, but it varies more; with ``shared`` all images walk from the same position. The
gradient's expectation is the same in all cases. Steps are independent of each other.

Draws are functions of (seed, step) and, for s_i, of the image's own index: a resumed run needs no
generator state, and an image meets the same negatives on any number of ranks.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from core.seeds import mixed

_STEP = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclasses.dataclass(frozen=True)
class Windows:
    """The negatives of B images as stretches of one order of bank rows."""

    rows: Tensor  # P, bank rows in the order of the walk (of a shard: counted within it)
    row_groups: Tensor  # P, the group of each
    groups: Tensor  # B, the images' own groups, which they skip
    start: Tensor  # B, where each walk begins, in 0..P-1
    length: Tensor  # B, positions that it passes
    count: Tensor  # B, negatives among them: K, or all others where there are fewer

    def allowed(self, low: int, high: int, images: slice = slice(None)) -> Tensor:
        """Return whether pool positions low … high are negatives of the images, b×C."""
        position = torch.arange(low, high, device=self.rows.device, dtype=self.start.dtype)
        passed = position - self.start[images, None]
        passed = torch.where(passed < 0, passed + len(self.rows), passed)
        inside = passed < self.length[images, None]
        return inside & (self.row_groups[low:high] != self.groups[images, None])

    def chunks(self, size: int) -> Iterator[tuple[Tensor, slice, Tensor]]:
        """Yield (bank rows C, images, allowed b×C) that together hold every negative once.

        On a CPU the images must be in the order of their starts, and only those with a window
        there are named; on a GPU all of them always are, so that the host need not know.
        """
        spans = self._spans(size)
        for number, low in enumerate(range(0, len(self.rows), size)):
            high = min(low + size, len(self.rows))
            for images in spans[number]:
                yield self.rows[low:high], images, self.allowed(low, high, images)

    def ordered(self) -> tuple["Windows", Tensor]:
        """Return the same windows with the images in the order of their starts, and that order."""
        order = torch.argsort(self.start, stable=True)
        return self.of(order), order

    def of(self, images: Tensor | slice) -> "Windows":
        """Return the windows of some of the images."""
        return dataclasses.replace(
            self,
            groups=self.groups[images],
            start=self.start[images],
            length=self.length[images],
            count=self.count[images],
        )

    def listed(self) -> Tensor:
        """Return the bank rows of each image's negatives, B×K (every count must be K).

        Slow, for tests and reference losses.
        """
        allowed = self.allowed(0, len(self.rows))
        return torch.stack([self.rows[own] for own in allowed])

    def _spans(self, size: int) -> list[list[slice]]:
        """Return, for each chunk of ``size`` positions, the runs of images with a window there."""
        pool = len(self.rows)
        chunks = range(0, pool, size)
        if self.start.device.type != "cpu":
            return [[slice(0, len(self.start))] for _ in chunks]
        edges = [(s, s + n) for s, n in zip(self.start.tolist(), self.length.tolist(), strict=True)]
        spans = []
        for low in chunks:
            begun = [i for i, (s, end) in enumerate(edges) if s < low + size and end > low]
            around = [i for i, (_, end) in enumerate(edges) if end - pool > low]
            runs = [slice(r[0], r[-1] + 1) for r in (begun, around) if r]
            if len(runs) == 2 and runs[0].stop >= runs[1].start:
                first, last = min(r.start for r in runs), max(r.stop for r in runs)
                runs = [slice(first, last)]
            spans.append(runs)
        return spans


@dataclasses.dataclass(frozen=True)
class Drawer:
    """How negatives are drawn; ``draw`` is a function of (seed, step, index)."""

    seed: int
    negatives: int  # K; 0: every other-group row
    shared: bool = False  # all images of a step walk from the same position
    pool: int = 0  # P, drawn rows that a step's windows lie in (pool_rows); 0: all N
    replace: bool = False

    def draw(
        self, step: int, index: Tensor, groups: Tensor, row_groups: Tensor, stratum: int = 0
    ) -> Windows:
        """Draw the negatives of B images.

        Args:
            step: global step. index: B, the images' numbers. groups: B, their groups.
            row_groups: N, the groups of the bank's rows, or of one shard's.
            stratum: the shard's number; shards draw independently.
        """
        rows = self._pool(step, row_groups, stratum)
        of_rows = row_groups if rows is None else row_groups[rows]
        if rows is None:
            rows = torch.arange(len(row_groups), device=row_groups.device)
        start = torch.zeros_like(index)
        if not self.shared and self.negatives:
            start = hashed(index, self.seed, step, stratum) % len(rows)
        length, count = walk(of_rows, groups, start, self.negatives)
        return Windows(rows, of_rows, groups, start, length, count)

    def _pool(self, step: int, row_groups: Tensor, stratum: int) -> Tensor | None:
        if not self.negatives:
            return None
        device, n = row_groups.device, len(row_groups)
        generator = torch.Generator(device).manual_seed(mixed(self.seed, step, stratum) >> 1)
        size = self.pool or n
        if self.replace:
            return torch.randint(n, (size,), generator=generator, device=device)
        return torch.randperm(n, generator=generator, device=device)[:size]


def pool_rows(
    rows: int, largest_group: int, negatives: int, *, shared: bool, replace: bool, asked: int = 0
) -> int:
    """Return P, how many rows to draw so that every image meets its K negatives in them.

    Without replacement K + the largest group always suffice. Independent draws are as many as hold
    2K + 64 others on average, so that fewer than K never happens (if it did, the image would take
    those there are, and its noise share c would say so).

    Args:
        rows: N. negatives: K; 0 means all. asked: P where it is free to choose; 0 means N.
    """
    if not negatives:
        return rows
    if replace:
        others = max(rows - largest_group, 1)
        return max(asked, math.ceil((2 * negatives + 64) * rows / others))
    needed = min(rows, negatives + largest_group)
    return needed if shared else min(rows, max(asked or rows, needed))


def walk(
    row_groups: Tensor, groups: Tensor, start: Tensor, negatives: int
) -> tuple[Tensor, Tensor]:
    """Return how far each image walks to meet its negatives, and how many they are, B and B.

    Args:
        row_groups: P, groups along the order. groups, start: B. negatives: K; 0 means all.
    """
    size = len(row_groups)
    others = (row_groups != groups[:, None]).cumsum(dim=1, dtype=torch.int32)  # B×P
    total = others[:, -1]
    if not negatives:
        return torch.full_like(start, size), total
    before = torch.where(start > 0, others.gather(1, (start - 1).clamp(min=0)[:, None])[:, 0], 0)
    target = before + negatives
    around = target > total
    wanted = torch.where(around, target - total, target)
    end = torch.searchsorted(others, wanted[:, None].to(others.dtype))[:, 0] + 1
    length = torch.where(around, end + size, end) - start
    enough = total >= negatives
    length = torch.where(enough, length, size)
    return length, torch.where(enough, negatives, total)


def hashed(values: Tensor, *numbers: int) -> Tensor:
    """Return ``core.seeds.mixed(*numbers, value) >> 1`` for each int64 value, on its device."""
    state = values + _signed(mixed(*numbers) + _STEP)
    state = (state ^ _shifted(state, 30)) * _signed(_FIRST)
    state = (state ^ _shifted(state, 27)) * _signed(_SECOND)
    return _shifted(state ^ _shifted(state, 31), 1)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shift 64-bit patterns right, filling with zeros."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number
