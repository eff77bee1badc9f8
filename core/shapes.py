"""The embedded default data, drawn from a seed."""

import functools

import cv2
import numpy as np

from core.seeds import mixed, shuffled

CLASSES = tuple(f"{s}_{t}" for s in ("disc", "star", "cross", "moon") for t in ("plain", "striped"))
COUNTS = {"train": 4000, "val": 1000, "test": 1000}
IMAGE_SIZE = 64
SEED = 2022


def labels(split: str) -> np.ndarray:
    """N int64, equally many of each class, in a fixed shuffled order."""
    n = COUNTS[split]
    return shuffled(n, SEED, list(COUNTS).index(split)) % len(CLASSES)


@functools.lru_cache(maxsize=8)
def images(split: str, size: int, indices: tuple[int, ...]) -> np.ndarray:
    """n×S×S×3 uint8 RGB: the images at ``indices`` of a split."""
    all_labels = labels(split)
    out = np.zeros((len(indices), size, size, 3), np.uint8)
    for row, index in enumerate(indices):
        rng = np.random.Generator(np.random.PCG64(mixed(SEED, list(COUNTS).index(split), index)))
        out[row] = rng.integers(0, 256, 3)
        centre = tuple(int(v) for v in rng.integers(size // 3, 2 * size // 3, 2))
        cv2.circle(out[row], centre, size // (4 + int(all_labels[index]) % 4), (255, 255, 255), -1)
    return out
