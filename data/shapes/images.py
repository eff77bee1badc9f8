"""The embedded default data: seeded scenes, as a classification set and as a COCO set with masks.

Both sets share textures, colours, light and clutter, and no class: the classification set asks for
shape × texture, the detection set (``write_coco``) for silhouettes that the first does not have.
n images of S×S pixels.
"""

import functools

import numpy as np

from core.seeds import Dice, shuffled
from data.shapes import drawing
from data.shapes.drawing import FINE, TEXTURES, TURN, UNIT, Canvas
from data.shapes.scenes import CLASSES as DETECTION_CLASSES
from data.shapes.scenes import CocoFiles as CocoFiles
from data.shapes.scenes import write_coco as write_coco

COUNTS = {"train": 4000, "val": 1000, "test": 1000}
IMAGE_SIZE = 64  # pixels
SEED = 2022  # of the data; a run's seed does not touch it

SILHOUETTES: dict[str, np.ndarray] = {
    "disc": drawing.radial([UNIT] * 32),
    "triangle": drawing.radial([UNIT] * 3),
    "square": np.array([(-800, -800), (800, -800), (800, 800), (-800, 800)]),
    "star": drawing.radial([UNIT, UNIT * 2 // 5] * 5),
    "cross": np.array(
        [(-320, -960), (320, -960), (320, -320), (960, -320), (960, 320), (320, 320),
         (320, 960), (-320, 960), (-320, 320), (-960, 320), (-960, -320), (-320, -320)]
    ),
}  # fmt: skip
assert not set(SILHOUETTES) & set(DETECTION_CLASSES)  # a transfer is to other classes
CLASSES = tuple(f"{texture}_{shape}" for shape in SILHOUETTES for texture in TEXTURES)


def labels(split: str) -> np.ndarray:
    """Return N int64 labels in 0..K-1: every class equally often, in a fixed shuffled order."""
    return shuffled(COUNTS[split], SEED, list(COUNTS).index(split)) % len(CLASSES)


@functools.lru_cache(maxsize=4)
def images(split: str, size: int, indices: tuple[int, ...]) -> np.ndarray:
    """Return the images at ``indices`` of a split, n×S×S×3 uint8 RGB; kept for this process.

    Image i is a function of (split, i, S) only, whichever others are drawn.
    """
    number, label = list(COUNTS).index(split), labels(split)
    pictures = np.empty((len(indices), size, size, 3), np.uint8)
    for row, index in enumerate(indices):
        pictures[row] = scene(int(label[index]), size, Dice(SEED, number, index))
    return pictures


def scene(label: int, size: int, dice: Dice) -> np.ndarray:
    """Draw one object of a class among clutter, S×S×3 uint8 RGB."""
    shape, pattern = list(SILHOUETTES)[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]
    side = size * FINE
    canvas = Canvas(drawing.background(dice, side, side))
    for _ in range(dice.between(2, 6)):
        at = (dice.below(side), dice.below(side))
        drawing.clutter(canvas, dice, at, side * dice.between(5, 14) // 100)
    radius = side * dice.between(20, 40) // 100
    margin = radius * 3 // 4
    centre = (dice.between(margin, side - margin), dice.between(margin, side - margin))
    angle, aspect = dice.between(-TURN // 8, TURN // 8), dice.between(13, 20)
    polygon = drawing.place(SILHOUETTES[shape], centre, radius, aspect, angle)
    drawing.paint(canvas, polygon, pattern, drawing.colour_pair(dice), dice, radius)
    for _ in range(dice.below(3)):  # in front of the object, at its rim
        out, way = radius * dice.between(40, 110) // 100, dice.below(TURN)
        at = (
            centre[0] + (out * drawing.cosine(way) >> 14),
            centre[1] + (out * drawing.sine(way) >> 14),
        )
        drawing.clutter(canvas, dice, at, radius * dice.between(20, 50) // 100)
    return drawing.develop(canvas, dice)
