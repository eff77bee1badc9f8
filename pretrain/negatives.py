"""Which bank rows each image is contrasted with: windows over one random order per step.

Shapes: B images, N bank rows, P pool rows, K negatives, C rows of a chunk, S strata.

Each step draws one uniformly random order of bank rows, the pool. Image i walks along it from a
position s_i of its own, cyclically, skips rows of its own group (its class, or only itself), and
takes the first K others. The order knows nothing of s_i, and permuting the other-group rows among
themselves leaves its distribution as it is; so for every single image

* the K rows are exactly a uniformly random K-subset of the other-group rows, or, where they are
  drawn with replacement, exactly K independent uniform draws from them.

What is not as if drawn independently is the choice of two images of the same step: their windows
overlap in a stretch of the same order. On average they share as many rows as two independent
subsets of the pool would, but the number varies more; with ``shared`` all images walk from the
same position. An image's loss depends on its own negatives alone, so the expectations of loss and
gradient are the same in all cases. Steps are independent of each other.

With S strata the same is done S times, each on the rows that leave one remainder by S, with its
share of K: a sharded bank draws from each rank's rows, and a bank that is whole can be told to
draw as one that is sharded.

Draws are functions of (seed, step) and, for s_i, of the image's own number: a resumed run needs
no generator state, and an image meets the same negatives on any number of ranks.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from core.seeds import mixed

_STEP = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


LONGEST_ORDER = (1 << 31) - 1  # P at most: positions are int32
BLOCK = 512  # pool positions that are counted together
BLOCKS_AT_A_TIME = 8  # on a CPU, so that they stay in its cache


@dataclasses.dataclass(frozen=True)
class Windows:
    """The negatives of B images in one stratum, as stretches of one order of its rows."""

    rows: Tensor  # P, rows in the order of the walk, as they are counted within this rank's bank
    row_groups: Tensor  # P int32, the group of each
    groups: Tensor  # B int32, the images' own groups, which they skip
    start: Tensor  # B int32, where each walk begins, in 0..P-1
    length: Tensor  # B int32, positions that it passes
    count: Tensor  # B, negatives among them: K, or all others where there are fewer
    inside: bool = False  # every position that will be asked for lies in every window

    @property
    def is_on_host(self) -> bool:
        """Whether reading a value costs nothing, because no device has to be waited for."""
        return self.rows.device.type == "cpu"

    def counted(self, low: int, high: int, dtype: torch.dtype) -> Tensor:
        """Return 1 where pool positions low … high are negatives of the images, else 0, B×C."""
        counted = torch.empty(len(self.start), high - low, dtype=dtype, device=self.rows.device)
        # comparisons straight into a float tensor: several times faster on CPUs than into bool
        torch.ne(self.row_groups[low:high], self.groups[:, None], out=counted)
        if self.inside:
            return counted
        position = torch.arange(low, high, dtype=torch.int32, device=self.rows.device)
        passed = position - self.start[:, None]
        passed += (passed >> 31) & len(self.rows)  # where negative, once round
        is_before_end = torch.empty_like(counted)
        return counted.mul_(torch.lt(passed, self.length[:, None], out=is_before_end))

    def chunks(
        self, size: int, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Yield (rows C, images b or None, counted b×C) that together hold every negative once.

        On a CPU the images with a window there are named; on a GPU there is None, and all of them
        are meant, so that the host need not know.
        """
        for low, images, inside in self._spans(size):
            some = self.of(images) if images is not None else self
            if inside:
                some = dataclasses.replace(some, inside=True)
            high = min(low + size, len(self.rows))
            yield self.rows[low:high], images, some.counted(low, high, dtype)

    def of(self, images: Tensor) -> "Windows":
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
        counted = self.counted(0, len(self.rows), torch.float32)
        return torch.stack([self.rows[own > 0] for own in counted])

    def _spans(self, size: int) -> list[tuple[int, Tensor | None, bool]]:
        """Return, for each chunk of ``size`` positions, where it begins and whose windows it meets.

        And whether all of it lies in all those windows.
        """
        pool = len(self.rows)
        starts = range(0, pool, size)
        if not self.is_on_host:
            return [(low, None, False) for low in starts]
        low = torch.tensor(starts)[:, None]  # chunks×1
        high = (low + size).clamp(max=pool)
        end = self.start.long() + self.length
        meets = (self.start < high) & (end > low) | (end - pool > low)  # chunks×B
        covers = (self.start <= low) & (end >= high) | (end - pool >= high)
        inside = (covers | ~meets).all(dim=1).tolist()
        return [
            (first, own.nonzero()[:, 0], sure)
            for first, own, sure in zip(starts, meets, inside, strict=True)
            if own.any()
        ]


@dataclasses.dataclass(frozen=True)
class Stratum:
    """A part of the rows, from which a part of the negatives is drawn."""

    number: int  # among all S strata
    rows: slice  # of this rank's bank
    negatives: int  # its share of K; 0: every other-group row
    pool: int  # P, rows to draw; see pool_rows
    replace: bool = False


@dataclasses.dataclass(frozen=True)
class Drawer:
    """How negatives are drawn; ``draw`` is a function of (seed, step, index)."""

    seed: int
    strata: Sequence[Stratum]  # those whose rows this rank holds
    shared: bool = False  # all images of a step walk from the same position

    def draw(self, step: int, index: Tensor, groups: Tensor, row_groups: Tensor) -> list[Windows]:
        """Draw the negatives of B images, stratum by stratum.

        Args:
            step: global step. index: B, the images' numbers. groups: B, their groups.
            row_groups: the groups of the rows of this rank's bank, int32.
        """
        groups = groups.to(torch.int32)
        fraction = hashed(index, self.seed, step) >> 31  # of 2^32
        drawn = []
        for stratum in self.strata:
            rows = self._pool(step, stratum, row_groups)
            of_rows = row_groups.index_select(0, rows)
            start = ((fraction * len(rows)) >> 32).to(torch.int32)
            if self.shared or not stratum.negatives:
                start = torch.zeros_like(start)
            length, count = walk(of_rows, groups, start, stratum.negatives)
            drawn.append(Windows(rows, of_rows, groups, start, length, count))
        return drawn

    def _pool(self, step: int, stratum: Stratum, row_groups: Tensor) -> Tensor:
        device = row_groups.device
        first, end, stride = stratum.rows.indices(len(row_groups))
        if not stratum.negatives:
            return torch.arange(first, end, stride, device=device)
        held = len(range(first, end, stride))
        generator = torch.Generator(device)
        generator.manual_seed(mixed(self.seed, step, stratum.number) >> 1)
        if stratum.replace:
            drawn = torch.randint(held, (stratum.pool,), generator=generator, device=device)
        else:
            drawn = torch.randperm(held, generator=generator, device=device)[: stratum.pool]
        return drawn if (first, stride) == (0, 1) else drawn * stride + first


def make_drawer(
    seed: int,
    negatives: int,
    row_groups: Tensor,
    *,
    shared: bool = False,
    replacement: str = "auto",
    pool: int = 0,
    strata: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Drawer:
    """Return how this rank draws its part of every image's K negatives.

    Args:
        negatives: K; 0 means every other-group row.
        row_groups: the groups of the rows that this rank holds: rank, rank + W, …; int32.
        replacement: "auto" (in strata with fewer others than their share of K), "always", "never".
        pool: P over all strata; 0 means all rows.
        strata: S, a multiple of the world; 0 means one for each rank.
        rank, world: 0 and 1 for a bank that is whole.

    Raises:
        ValueError: S is not a multiple of the world.
    """
    strata = strata or world
    if strata % world:
        raise ValueError(f"{strata} strata do not divide over {world} ranks")
    parts = []
    for number in range(rank, strata, world):
        rows = slice(number // world, None, strata // world)
        own = row_groups[rows]
        largest = int(torch.unique(own, return_counts=True)[1].max()) if len(own) else 0
        share = share_of(number, strata, negatives)
        replace = replacement == "always"
        replace = replace or (replacement == "auto" and share > len(own) - largest)
        size = pool_rows(
            len(own), largest, share, shared=shared, replace=replace, asked=-(-pool // strata)
        )
        parts.append(Stratum(number, rows, share, size, replace))
    return Drawer(seed, parts, shared)


def share_of(number: int, strata: int, negatives: int) -> int:
    """Return how many of K negatives come from one of S strata; they add up to K."""
    return negatives * (number + 1) // strata - negatives * number // strata


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
        row_groups: P, groups along the order. groups, start: B. All int32. negatives: K; 0: all.
    """
    size = len(row_groups)
    up_to = _others_before_blocks(row_groups, groups)  # B×(blocks + 1)
    total = up_to[:, -1]
    if not negatives:
        return torch.full_like(start, size), total
    block = start.long() // BLOCK
    inside = _others_in_block(row_groups, groups, block).cumsum(dim=1)  # B×BLOCK
    of_block = up_to.gather(1, block[:, None])[:, 0]
    offset = start.long() - block * BLOCK
    skipped = inside.gather(1, (offset - 1).clamp(min=0)[:, None])[:, 0]
    target = of_block + torch.where(offset > 0, skipped, 0) + negatives
    around = target > total
    wanted = torch.where(around, target - total, target)
    # the block in which the count of others reaches ``wanted``, and where in it
    block = (torch.searchsorted(up_to, wanted[:, None])[:, 0] - 1).clamp(min=0)
    block = block.clamp(max=up_to.shape[1] - 2)
    inside = _others_in_block(row_groups, groups, block).cumsum(dim=1)
    rest = wanted - up_to.gather(1, block[:, None])[:, 0]
    end = block * BLOCK + torch.searchsorted(inside, rest[:, None])[:, 0] + 1
    length = torch.where(around, end + size, end) - start
    enough = total >= negatives
    length = torch.where(enough, length, size).to(torch.int32)
    return length, torch.where(enough, negatives, total)


def _others_before_blocks(row_groups: Tensor, groups: Tensor) -> Tensor:
    """Return how many rows of other groups lie before each block of BLOCK positions, and in all.

    B×(blocks + 1), int64, without a B×P tensor.
    """
    counts = [torch.zeros(len(groups), 1, dtype=torch.int64, device=groups.device)]
    blocks = BLOCKS_AT_A_TIME * (1 if groups.device.type == "cpu" else 16)
    for part in row_groups.split(BLOCK * blocks):
        others = torch.empty(len(groups), len(part), device=groups.device)
        torch.ne(part, groups[:, None], out=others)
        whole = len(part) // BLOCK * BLOCK
        counts.append(others[:, :whole].view(len(groups), -1, BLOCK).sum(dim=2).long())
        if whole < len(part):
            counts.append(others[:, whole:].sum(dim=1, keepdim=True).long())
    return torch.cat(counts, dim=1).cumsum(dim=1)


def _others_in_block(row_groups: Tensor, groups: Tensor, block: Tensor) -> Tensor:
    """Return whether each position of one block an image is of another group, B×BLOCK int64."""
    position = block[:, None] * BLOCK + torch.arange(BLOCK, device=groups.device)
    others = row_groups[position.clamp(max=len(row_groups) - 1)] != groups[:, None]
    return (others & (position < len(row_groups))).long()


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
