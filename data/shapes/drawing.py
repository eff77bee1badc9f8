"""Pictures from integers: silhouettes, textures, light and clutter, the same on every machine.

All geometry is fixed-point and all randomness ``core.seeds``; of OpenCV only what it computes
bit-exactly is used (test_shapes.py holds a digest). A scene is drawn on a canvas of FINE pixels
per pixel and side, and reduced at the end, which smooths its edges. H×W are fine pixels.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from core.seeds import Dice

FINE = 2  # fine pixels per pixel and side
UNIT = 1024  # silhouettes lie within ±UNIT
SUB = 4  # polygons are given in 2^-SUB fine pixels
TURN = 256  # directions in a full turn
LEVELS = 64  # steps of light over an object
_ONE = 14  # sines are scaled by 2^14
SINE = np.array([round((1 << _ONE) * math.sin(2 * math.pi * k / TURN)) for k in range(TURN)])

TEXTURES = ("plain", "striped", "dotted", "checked")
PALETTE = (  # RGB; bright, dark, warm and cold in turn
        (230, 57, 70), (29, 53, 87), (244, 162, 97), (42, 157, 143), (233, 196, 106),
        (94, 84, 142), (241, 250, 238), (69, 123, 157), (188, 108, 37), (96, 108, 56),
        (255, 175, 204), (53, 80, 112), (181, 23, 158), (76, 201, 240), (33, 37, 41),
        (144, 190, 109), (249, 65, 68), (205, 180, 219), (255, 183, 3), (0, 95, 115),
        (224, 225, 221), (120, 0, 0), (2, 48, 71), (202, 210, 197),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Canvas:
    """What is seen, and whose each fine pixel is."""

    pixels: np.ndarray  # H×W×3 uint8 RGB
    owner: np.ndarray | None = None  # H×W int16: the number of the object seen there, 0 for none

    def fill(self, patch: "Patch", ink: Sequence[int] | np.ndarray, number: int = 0) -> None:
        """Colour a patch with one RGB colour or h×w×3 of them; ``number`` then owns its pixels."""
        mask, rows, columns = patch
        _copy_masked(np.asarray(ink, np.uint8), self.pixels[rows, columns], mask)
        if self.owner is not None:
            self.owner[rows, columns][mask] = number

    def patch(self, polygon: np.ndarray) -> "Patch":
        """Return the part of the canvas inside a polygon."""
        return filled(polygon, *self.pixels.shape[:2])

    def border(self, patch: "Patch", width: int) -> "Patch":
        """Return a patch's pixels within ``width`` of its outside, beyond the canvas apart."""
        (height, length), (inner, rows, columns) = self.pixels.shape[:2], patch
        for _ in range(width if inner.size else 0):
            framed = np.zeros((inner.shape[0] + 2, inner.shape[1] + 2), bool)
            framed[1:-1, 1:-1] = inner
            for edges, first, last in (
                (framed, rows.start == 0, rows.stop == height),
                (framed.T, columns.start == 0, columns.stop == length),
            ):
                edges[0], edges[-1] = edges[1] & first, edges[-2] & last
            inner = inner & framed[:-2, 1:-1] & framed[2:, 1:-1]
            inner &= framed[1:-1, :-2] & framed[1:-1, 2:]
        return patch._replace(mask=patch.mask & ~inner)


class Patch(NamedTuple):
    """Some fine pixels of a canvas: a mask within a window."""

    mask: np.ndarray  # h×w bool
    rows: slice
    columns: slice


def sine(angle: int) -> int:
    """Return sin(angle / TURN of a full turn) × 2^14."""
    return int(SINE[angle % TURN])


def cosine(angle: int) -> int:
    """Return cos(angle / TURN of a full turn) × 2^14."""
    return sine(angle + TURN // 4)


def radial(radii: Sequence[int]) -> np.ndarray:
    """Return the polygon with these radii at equal angles, n×2, the first one upwards."""
    angles = [TURN * k // len(radii) for k in range(len(radii))]
    points = [(r * sine(a) >> _ONE, -r * cosine(a) >> _ONE) for r, a in zip(radii, angles)]
    return np.array(points)


def place(
    silhouette: np.ndarray, centre: tuple[int, int], radius: int, aspect: int, angle: int
) -> np.ndarray:
    """Return a silhouette on the canvas: n×2 int32 in 2^-SUB fine pixels.

    Args:
        silhouette: n×2 within ±UNIT.
        centre, radius: fine pixels.
        aspect: width in 1/16 of the height, times 16 (16 is undistorted).
        angle: of TURN, clockwise.
    """
    scale = (radius << SUB) * np.array([aspect, 256 // aspect])
    stretched = (silhouette * scale) // (16 * UNIT)
    c, s = cosine(angle), sine(angle)
    turned = stretched @ np.array([[c, s], [-s, c]]) >> _ONE
    return (turned + (np.array(centre) << SUB)).astype(np.int32)


def filled(polygon: np.ndarray, height: int, width: int) -> Patch:
    """Return the fine pixels whose centres lie in a polygon, by the even-odd rule.

    Not ``cv2.fillPoly``: its rounding changed between OpenCV 4.9 and 5.0.

    Args:
        polygon: n×2 integers, 2^-SUB fine pixels; pixel (x, y) has its centre at (x, y).
        height, width: of the canvas, fine pixels.
    """
    corners = polygon.tolist()
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    left, top = max(min(xs) >> SUB, 0), max(min(ys) >> SUB, 0)
    w = max(min((max(xs) >> SUB) + 1, width) - left, 0)
    h = max(min((max(ys) >> SUB) + 1, height) - top, 0)
    crossings = []  # in each row, the first pixel right of each edge
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
        if y0 > y1:
            x0, y0, x1, y1 = x1, y1, x0, y0
        rise, run = (y1 - y0) << SUB, x1 - x0
        for row in range(max(-(-y0 >> SUB), top), min(-(-y1 >> SUB), top + h)):
            column = -(-(x0 * (y1 - y0) + ((row << SUB) - y0) * run) // rise) - left
            crossings.append((row - top) * (w + 1) + min(max(column, 0), w))
    toggled = np.bincount(np.array(crossings, np.int64), minlength=h * (w + 1)).astype(np.uint8)
    inside = np.cumsum(toggled.reshape(h, w + 1)[:, :w], axis=1, dtype=np.uint8) & 1
    return Patch(inside.astype(bool), slice(top, top + h), slice(left, left + w))


def bar(start: Sequence[int], end: Sequence[int], width: int) -> np.ndarray:
    """Return the rectangle, 4×2, around a line between two points; ``width`` in fine pixels."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = max(math.isqrt(dx * dx + dy * dy), 1)
    half = width << SUB >> 1
    ox, oy = -dy * half // length, dx * half // length
    corners = [(start[0] + ox, start[1] + oy), (end[0] + ox, end[1] + oy)]
    return np.array([*corners, (end[0] - ox, end[1] - oy), (start[0] - ox, start[1] - oy)])


def texture(
    name: str, rows: slice, columns: slice, centre: tuple[int, int], angle: int, period: int
) -> np.ndarray:
    """Return which of two colours (0, 1) each fine pixel of a window has, h×w uint8.

    ``period`` is the width of a stripe, in fine pixels; ``centre`` and ``angle`` place the pattern.
    """
    height, width = rows.stop - rows.start, columns.stop - columns.start
    if name == "plain":
        return np.zeros((height, width), np.uint8)
    x = np.arange(columns.start, columns.stop, dtype=np.int32) - centre[0]
    y = np.arange(rows.start, rows.stop, dtype=np.int32)[:, None] - centre[1]
    c, s = cosine(angle), sine(angle)
    u, width16 = (x * c + y * s) >> (_ONE - 4), period << 4  # 1/16 fine pixels
    if name == "striped":
        return ((u // width16) & 1).astype(np.uint8)
    v = (y * c - x * s) >> (_ONE - 4)
    if name == "checked":
        return (((u // width16) + (v // width16)) & 1).astype(np.uint8)
    if name != "dotted":
        raise ValueError(f"texture {name!r} is not one of {', '.join(TEXTURES)}")
    du, dv = u % (2 * width16) - width16, v % (2 * width16) - width16
    return (du * du + dv * dv < 45 * width16 * width16 // 100).astype(np.uint8)


def light(rows: slice, columns: slice, angle: int, extent: int) -> np.ndarray:
    """Return a ramp 0..LEVELS-1 over a window, h×w uint8, brightest towards ``angle``."""
    x = np.arange(columns.start, columns.stop, dtype=np.int32) * 2 - columns.start - columns.stop
    y = np.arange(rows.start, rows.stop, dtype=np.int32)[:, None] * 2 - rows.start - rows.stop
    c, s = cosine(angle) >> 8, sine(angle) >> 8
    ramp = (x * c + y * s) * (LEVELS // 4) // (64 * max(extent, 1)) + LEVELS // 2
    return np.minimum(np.maximum(ramp, 0), LEVELS - 1).astype(np.uint8)


def colour(dice: Dice, jitter: int = 24) -> list[int]:
    """Return an RGB colour near one of the palette's, 3 integers in 0..255."""
    near = PALETTE[dice.below(len(PALETTE))]
    return [min(max(part + dice.between(-jitter, jitter), 0), 255) for part in near]


def brightness(rgb: Sequence[int]) -> int:
    """Return the luma (BT.601) of an RGB colour, 0..255."""
    return (77 * rgb[0] + 151 * rgb[1] + 28 * rgb[2]) >> 8


def colour_pair(dice: Dice, contrast: int = 60) -> np.ndarray:
    """Return two colours whose brightness differs by at least ``contrast`` of 255, 2×3."""
    first = colour(dice)
    for _ in range(16):
        second = colour(dice)
        if abs(brightness(second) - brightness(first)) >= contrast:
            return np.array([first, second])
    return np.array([first, [255] * 3 if brightness(first) < 128 else [0] * 3])


def paint(
    canvas: Canvas,
    polygon: np.ndarray,
    pattern: str,
    colours: np.ndarray,
    dice: Dice,
    radius: int,
    number: int = 0,
) -> None:
    """Paint a textured, lit polygon, which then owns its pixels; its shadow, if any, owns none.

    Args:
        polygon: n×2 in 2^-SUB fine pixels.
        pattern: one of TEXTURES.
        colours: 2×3, RGB.
        radius: of the polygon, in fine pixels; patterns and shadows scale with it.
        number: of the object, for ``canvas.owner``.
    """
    patch = canvas.patch(polygon)
    if not patch.mask.size:
        return
    if dice.chance(60):
        _shadow(canvas, patch, dice, radius)
    _, rows, columns = patch
    centre = (columns.start + dice.below(8), rows.start + dice.below(8))
    period = max(radius * dice.between(20, 34) // 100, 2 * FINE)
    spots = texture(pattern, rows, columns, centre, dice.below(TURN), period)
    index = light(rows, columns, dice.below(TURN), radius) + spots * np.uint8(LEVELS)
    ramps = _ramps(colours)
    canvas.fill(patch, np.take(ramps, index, axis=0), number)
    if dice.chance(35):
        canvas.fill(canvas.border(patch, FINE), ramps[LEVELS // 2] >> 1, number)


def background(dice: Dice, height: int, width: int) -> np.ndarray:
    """Return H×W×3: a wash of muted colours, now and then with a faint pattern."""
    pair = colour_pair(dice, 20)
    grey = dice.between(60, 180)
    mix = dice.noise(4, 4, 1) if dice.chance(75) else np.full((4, 4, 1), dice.below(256), np.uint8)
    wash = (pair[0] * mix.astype(np.int64) + pair[1] * (255 - mix.astype(np.int64))) // 255
    wash = ((wash * 2 + grey) // 3).astype(np.uint8)
    canvas = cv2.resize(wash, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
    if dice.chance(50):
        name = TEXTURES[dice.between(1, 3)]
        rows, columns = slice(0, height), slice(0, width)
        period = max(min(height, width) * dice.between(4, 12) // 100, 2 * FINE)
        spots = texture(name, rows, columns, (dice.below(99), 0), dice.below(TURN), period)
        canvas += spots[:, :, None] * np.uint8(dice.between(12, 24))  # a wash is at most 230
    return canvas


def clutter(canvas: Canvas, dice: Dice, at: tuple[int, int], radius: int) -> None:
    """Draw one piece that is no object: a shard, a bar, a wire or a patterned scrap."""
    kind, ink = dice.below(4), colour(dice)
    radii = [UNIT * dice.between(35, 100) // 100 for _ in range(dice.between(3, 5))]
    shard = place(radial(radii), at, radius, dice.between(10, 24), dice.below(TURN))
    if kind == 0:
        canvas.fill(canvas.patch(shard), ink)
    elif kind == 1:
        line = bar(shard[0].tolist(), shard[1].tolist(), max(radius // 5, FINE))
        canvas.fill(canvas.patch(line), ink)
    elif kind == 2:
        canvas.fill(canvas.border(canvas.patch(shard), max(radius // 8, 2)), ink)
    else:
        paint(canvas, shard, TEXTURES[dice.below(4)], colour_pair(dice), dice, radius)


def develop(canvas: Canvas, dice: Dice) -> np.ndarray:
    """Return the finished picture, (H/FINE)×(W/FINE)×3 uint8: reduced, exposed, with grain."""
    height, width = (side // FINE for side in canvas.pixels.shape[:2])
    small = cv2.resize(canvas.pixels, (width, height), interpolation=cv2.INTER_AREA)
    gain, lift = dice.between(180, 290), dice.between(-24, 24)
    curve = np.clip((np.arange(256) * gain >> 8) + lift, 0, 255).astype(np.uint8)
    grain = dice.noise(height, width, 3)
    strength = dice.between(4, 6)  # grain of ±8, ±4 or ±2 of 255
    up = cv2.add(cv2.LUT(small, curve), grain >> np.uint8(strength))
    return cv2.subtract(up, np.full_like(up, 128 >> strength))


def _ramps(colours: np.ndarray) -> np.ndarray:
    """Two colours 2×3 -> 2·LEVELS×3 uint8: each from shade to light."""
    steps = 36 + np.arange(LEVELS)  # of 64
    ramps = colours[:, None, :] * steps[None, :, None] >> 6
    return np.minimum(ramps, 255).astype(np.uint8).reshape(-1, 3)


def _shadow(canvas: Canvas, patch: Patch, dice: Dice, radius: int) -> None:
    """Darken a patch's pixels moved aside by up to a fifth of the radius."""
    down, right = (dice.between(-radius, radius) // 5 for _ in range(2))
    mask, rows, columns = patch
    top, left = max(rows.start + down, 0), max(columns.start + right, 0)
    window = canvas.pixels[top : max(rows.stop + down, 0), left : max(columns.stop + right, 0)]
    top, left = top - rows.start - down, left - columns.start - right
    mask = mask[top : top + window.shape[0], left : left + window.shape[1]]
    _copy_masked((window >> 1) + (window >> 3), window, mask)


def _copy_masked(source: np.ndarray, target: np.ndarray, mask: np.ndarray) -> None:
    """Copy …×3 bytes to h×w×3 where a mask h×w says so; as one item a pixel, ten times as fast."""
    np.copyto(target.view("V3")[..., 0], source.view("V3")[..., 0], where=mask)
