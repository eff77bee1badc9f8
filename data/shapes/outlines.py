"""Masks as COCO writes them: polygons and run lengths, by integer arithmetic.

H×W are mask pixels, of which ``fine`` make one pixel of the image and side.
"""

import cv2
import numpy as np

TOLERANCE = 2  # nodes, half mask pixels: how far a corner may lie from the simplified outline
SPECK = 48  # nodes²: holes below (12 mask pixels) stay inside the polygon
SLIVER = 32  # nodes²: parts below (8 mask pixels) are left out


def outlines(mask: np.ndarray, fine: int = 1) -> list[list[float]]:
    """Return polygons [x, y, x, y, …] in image pixels along the edges of a mask, H×W bool.

    Polygons have no holes, so a mask with a hole is cut in two through it, and the halves abut.
    Corners lie on the borders between mask pixels, simplified by at most one of them.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return []
    top, left = int(rows[0]), int(columns[0])
    mask = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    contours, tree = cv2.findContours(_nodes(mask), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    polygons = []
    for contour, (_, _, _, parent) in zip(contours, tree[0]):
        area = cv2.contourArea(contour)
        if parent >= 0 and area >= SPECK:
            cut = int(contour[:, 0, 0].min() + contour[:, 0, 0].max()) // 4
            halves = [mask.copy(), mask.copy()]
            halves[0][:, cut:], halves[1][:, :cut] = False, False
            polygons = [polygon for half in halves for polygon in outlines(half, fine)]
            break
        if parent < 0 and area >= SLIVER:
            polygons.append((simplified(contour[:, 0], TOLERANCE) / (2 * fine)).ravel().tolist())
    shift = (left / fine, top / fine)
    return [[v + shift[k % 2] for k, v in enumerate(polygon)] for polygon in polygons]


def simplified(points: np.ndarray, tolerance: int) -> np.ndarray:
    """Return the corners that a closed polygon needs to pass within ``tolerance`` of all of them.

    Douglas and Peucker's algorithm in integers (``cv2.approxPolyDP`` differs between OpenCV 4.9
    and 5.0). Points n×2 -> m×2, at least three of them where the polygon has an area.
    """
    points = points.astype(np.int64)
    first = int(np.lexsort((points[:, 1], points[:, 0]))[0])
    ring = np.concatenate([points[first:], points[: first + 1]])  # n+1, closed
    farthest = int(((ring - ring[0]) ** 2).sum(1).argmax())
    kept, chains = {0, farthest}, [(0, farthest), (farthest, len(points))]
    while chains:
        start, end = chains.pop()
        if end - start < 2:
            continue
        off, length2 = _off_chord(ring, start, end)
        if int(off.max()) ** 2 > tolerance**2 * length2:
            middle = start + 1 + int(off.argmax())
            kept.add(middle)
            chains += [(start, middle), (middle, end)]
    if len(kept) < 3:  # a sliver: keep what lies farthest from its axis
        off, _ = _off_chord(np.concatenate([ring, ring[[farthest]]]), 0, len(ring))
        kept.add(1 + int(off.argmax()))
    return ring[sorted(kept)]


def _off_chord(ring: np.ndarray, start: int, end: int) -> tuple[np.ndarray, int]:
    """Return the points' distances × length from the chord start-end, and its length squared."""
    chord, steps = ring[end] - ring[start], ring[start + 1 : end] - ring[start]
    distance = np.abs(chord[0] * steps[:, 1] - chord[1] * steps[:, 0])
    return distance, max(int((chord**2).sum()), 1)


def run_lengths(mask: np.ndarray) -> list[int]:
    """Return COCO's uncompressed RLE of a mask: runs down the columns, the first one of zeros."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    ends = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]), [mask.size]])
    runs: list[int] = np.diff(ends).tolist()
    return runs if runs[-1] else runs[:-1]


def _nodes(mask: np.ndarray) -> np.ndarray:
    """H×W pixels -> (2H+1)×(2W+1) nodes: at 2k the borders of pixels, at 2k + 1 their centres."""
    height, width = mask.shape
    nodes = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    for dy in range(3):
        for dx in range(3):
            nodes[dy : dy + 2 * height : 2, dx : dx + 2 * width : 2] |= mask
    return nodes
