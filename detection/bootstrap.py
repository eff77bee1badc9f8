"""Is a difference in AP more than chance? A paired bootstrap over the validation images.

Images are drawn with replacement, the same ones for both sides, and AP is accumulated again for
every draw, with COCO's own rules: an image that is drawn twice counts twice. What a detection
matches does not depend on the other images, so each is matched once.

Trials are paired by seed: Δ is the mean over the pairs. One draw of images serves all pairs, and
with several pairs these are drawn with replacement too, so that the interval knows of both kinds of
chance, the images and the seeds. Two or three seeds say little about seeds (too narrow); noise that
each image and seed has of its own is drawn twice (too wide).

Interpolated precision overestimates on few images, and a draw, with its repeated images, does so
once more. The draws' spread therefore counts and not their level: the interval is moved so that
their mean lies on Δ. It says how far Δ varies between validation sets of this size.

Shapes: I images, D detections of a class by falling score, P of them true positives, B draws,
T IoU thresholds.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO

from detection.saved import matches

Array = NDArray[Any]

THRESHOLDS = 10  # IoU 0.50, 0.55 … 0.95
METRICS = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}  # of the thresholds
RECALLS = np.linspace(0.0, 1.0, 101)  # COCO's
CELLS = 2_000_000  # of one D×B array: draws are worked off in blocks
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class ClassMatches:
    """What became of one class's detections.

    At each threshold, ``hits`` are the places (of D) of true positives, ``ignored`` those that
    matched a crowd and count for nothing.
    """

    images: Array  # D: the index of each detection's image
    objects: Array  # I: how many there are to find in each image
    hits: tuple[Array, ...]  # T
    ignored: tuple[Array, ...]  # T


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A difference and its interval, in percent points of AP."""

    delta: float | None  # None where AP is not defined
    low: float | None
    high: float | None

    @property
    def real(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def match(truth: COCO, detections: Sequence[dict[str, Any]], iou_type: str) -> list[ClassMatches]:
    """Match every image once, as pycocotools does; return the classes that have objects.

    Args:
        truth: the annotations.
        detections: of one run, in COCO's result format.
        iou_type: "bbox" or "segm".
    """
    index = {image: n for n, image in enumerate(sorted(truth.getImgIds()))}
    by_class: dict[int, list[dict[str, Any]]] = {}
    for entry in matches(truth, detections, iou_type):
        by_class.setdefault(entry["category_id"], []).append(entry)
    found = (_of_class(entries, index) for _, entries in sorted(by_class.items()))
    return [matched for matched in found if matched.objects.any()]


def draws(images: int, count: int, generator: np.random.Generator) -> Array:
    """Return how often each image is in each draw, I×(1+B); column 0 is the images as they are."""
    times = generator.multinomial(images, np.full(images, 1 / images), count)
    return np.concatenate([np.ones((1, images), np.int32), times.astype(np.int32)]).T.copy()


def average_precisions(classes: Sequence[ClassMatches], times: Array) -> Array:
    """Return AP (0..1) at each threshold in each draw, T×B; NaN where no object was drawn.

    A mean over the classes of which the draw has objects, as COCO's.

    Args:
        classes: as ``match`` gives them.
        times: I×B, as ``draws`` gives them.
    """
    total = np.zeros((THRESHOLDS, times.shape[1]))
    defined = np.zeros(times.shape[1])
    for matched in classes:
        to_find = matched.objects @ times  # B
        width = max(1, CELLS // max(1, len(matched.images)))
        for start in range(0, times.shape[1], width):
            block = slice(start, start + width)
            total[:, block] += _of_draws(matched, times[:, block], to_find[block])
        defined += to_find > 0
    with np.errstate(invalid="ignore"):
        return np.where(defined > 0, total / np.maximum(defined, 1), np.nan)


def compare(
    ours: Sequence[Array], baseline: Sequence[Array], generator: np.random.Generator
) -> dict[str, Comparison]:
    """Return Δ (ours − baseline) with its interval, for AP, AP50 and AP75.

    Args:
        ours: per trial, ``average_precisions`` of ``draws``; column 0 gives Δ itself.
        baseline: the same trials of the other side, from the same draws.
        generator: draws trials where there are several.
    """
    pairs = np.stack([a - b for a, b in zip(ours, baseline, strict=True)])  # S×T×(1+B)
    trials, _, width = pairs.shape
    chosen = generator.integers(trials, size=(trials, width - 1))
    found = {}
    for metric, thresholds in METRICS.items():
        per_trial = 100 * pairs[:, thresholds].mean(axis=1)  # S×(1+B)
        delta = per_trial[:, 0].mean()
        drawn = np.take_along_axis(per_trial[:, 1:], chosen, axis=0).mean(axis=0)
        drawn = drawn[np.isfinite(drawn)]
        if not np.isfinite(delta) or not drawn.size:
            found[metric] = Comparison(None, None, None)
            continue
        around = drawn - drawn.mean() + delta
        low, high = np.quantile(around, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found[metric] = Comparison(float(delta), float(low), float(high))
    return found


def _of_class(entries: list[dict[str, Any]], index: dict[int, int]) -> ClassMatches:
    """Put a class's images together and sort its detections by score, ties as COCO's code does."""
    objects = np.zeros(len(index), np.int32)
    for entry in entries:
        objects[index[entry["image_id"]]] = np.count_nonzero(~np.asarray(entry["gtIgnore"], bool))
    scored = [entry for entry in entries if len(entry["dtScores"])]
    if not scored:
        nothing = (np.empty(0, np.intp),) * THRESHOLDS
        return ClassMatches(np.empty(0, np.intp), objects, nothing, nothing)
    scores = np.concatenate([entry["dtScores"] for entry in scored])
    order = np.argsort(-scores, kind="stable")
    image = np.repeat(
        [index[entry["image_id"]] for entry in scored], [len(e["dtScores"]) for e in scored]
    )
    hit = np.concatenate([np.asarray(e["dtMatches"]) != 0 for e in scored], axis=1)[:, order]
    void = np.concatenate([np.asarray(e["dtIgnore"], bool) for e in scored], axis=1)[:, order]
    return ClassMatches(
        image[order],
        objects,
        tuple(np.flatnonzero(row) for row in hit & ~void),
        tuple(np.flatnonzero(row) for row in void),
    )


def _of_draws(matched: ClassMatches, times: Array, to_find: Array) -> Array:
    """Return one class's AP at each threshold in each draw, T×B; 0 where it has no object.

    Precision is looked at where a true positive stands: between two of them it only falls.
    """
    weights = times[matched.images]  # D×B: how often each detection is in each draw
    before = np.cumsum(weights, axis=0)
    found = np.zeros((THRESHOLDS, times.shape[1]))
    for t, (hits, ignored) in enumerate(zip(matched.hits, matched.ignored, strict=True)):
        if not len(hits):
            continue
        true = np.cumsum(weights[hits], axis=0)  # P×B
        judged = before[hits]
        if len(ignored):
            void = np.zeros((len(ignored) + 1, times.shape[1]), before.dtype)
            np.cumsum(weights[ignored], axis=0, out=void[1:])
            judged = judged - void[np.searchsorted(ignored, hits)]
        precision = true / (judged + np.spacing(1))
        envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        recall = true / np.maximum(to_find, 1)
        reached = np.searchsorted(RECALLS, recall.ravel(), side="right").reshape(recall.shape)
        points = np.diff(reached, axis=0, prepend=0)  # recalls that each one is first to reach
        found[t] = (envelope * points).sum(axis=0) / len(RECALLS)
    return np.where(to_find > 0, found, 0.0)
