"""Seeds and orders from integer arithmetic alone: the same on every machine, worker and version."""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15  # splitmix64's increment: 2^64 / golden ratio
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # and its two multipliers


def mixed(*numbers: int) -> int:
    """Return a 64-bit hash of integers in which every input bit moves every output bit.

    The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), folded over the numbers.
    """
    state = 0
    for number in numbers:
        state = (state + number + _STEP) & _MASK
        state = ((state ^ (state >> 30)) * _FIRST) & _MASK
        state = ((state ^ (state >> 27)) * _SECOND) & _MASK
        state ^= state >> 31
    return state


def mixed_array(numbers: tuple[int, ...], last: np.ndarray) -> np.ndarray:
    """Return ``mixed(*numbers, last[i])`` for every i, as uint64 of last's shape."""
    state = np.uint64((mixed(*numbers) + _STEP) & _MASK) + last.astype(np.uint64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_FIRST)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_SECOND)
    return state ^ (state >> np.uint64(31))


def shuffled(n: int, *seed: int) -> np.ndarray:
    """Return a permutation of 0..n-1 that depends on the seed numbers only (not on numpy's)."""
    return np.argsort(mixed_array(seed, np.arange(n)), kind="stable")


def shuffled_in_blocks(blocks: np.ndarray, *seed: int) -> np.ndarray:
    """Return such a permutation in which a block's members stay together, itself in random order.

    Args:
        blocks: N, the block of each position.
    """
    order = shuffled(len(blocks), *seed)
    return order[np.argsort(mixed_array((*seed, 1), blocks)[order], kind="stable")]


@contextlib.contextmanager
def torch_seeded(*numbers: int) -> Iterator[None]:
    """Run a block under torch's CPU generator seeded with ``numbers``; its state then returns.

    Only the CPU generator is touched: ``torch.manual_seed`` would queue a call for every GPU.
    """
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(mixed(*numbers) >> 1)
    try:
        yield
    finally:
        generator.set_state(before)


class Dice:
    """Random integers from (seed, …): the same on every machine and every numpy."""

    def __init__(self, *seed: int) -> None:
        self.seed, self.block, self.left = seed, 0, list[int]()

    def below(self, n: int) -> int:
        """Return an integer in 0..n-1."""
        if not self.left:
            words = mixed_array((*self.seed, self.block), np.arange(128))
            self.left = (words >> np.uint64(32)).tolist()
            self.block += 1
        return (self.left.pop() * n) >> 32

    def between(self, low: int, high: int) -> int:
        """Return an integer in low..high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """Return true so many times in a hundred."""
        return self.below(100) < percent

    def noise(self, *shape: int) -> np.ndarray:
        """Return uint8 noise of a shape, uniform in 0..255."""
        count = math.prod(shape)
        words = mixed_array((*self.seed, -1), np.arange((count + 7) // 8))
        return words.astype("<u8").view(np.uint8)[:count].reshape(shape)
