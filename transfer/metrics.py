"""Scores of a classifier as the field has them for each data set: top-1, mean per class, VOC mAP.

Shapes: N images, K classes.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

IGNORED = -1  # in N×K targets: neither right nor wrong (VOC's "difficult")
RECALL_LEVELS = 11  # VOC 2007: recall 0, 0.1, …, 1


def top1(scores: Tensor, labels: Tensor) -> float:
    """Return the share of images whose highest score is their label's, in %.

    Args:
        scores: N×K. labels: N.

    Raises:
        ValueError: no images, or shapes that do not fit.
    """
    _check(scores, labels)
    return 100.0 * (scores.argmax(1) == labels).double().mean().item()


def mean_per_class(scores: Tensor, labels: Tensor, skip_absent: bool = False) -> float:
    """Return the mean over classes of each class's own accuracy, in %.

    Args:
        scores: N×K. labels: N; every one of the K classes must occur, unless ``skip_absent``.

    Raises:
        ValueError: a class has no image: its accuracy, and so the mean, is not defined.
    """
    _check(scores, labels)
    classes = scores.shape[1]
    counts = torch.bincount(labels, minlength=classes).double()
    present = counts > 0
    if not skip_absent and not bool(present.all()):
        raise ValueError(f"class {int((~present).nonzero()[0])} has no image to be evaluated on")
    right = torch.bincount(labels[scores.argmax(1) == labels], minlength=classes).double()
    return 100.0 * (right / counts)[present].mean().item()


def voc07_map(scores: Tensor, targets: Tensor, skip_absent: bool = False) -> float:
    """Return the mean over classes of the 11-point average precision, in %.

    Args:
        scores: N×K, any monotone scores. targets: N×K of 1, 0 and −1 (left out).
        skip_absent: leave out classes without a positive image.

    Raises:
        ValueError: a class has no positive image.
    """
    if scores.shape != targets.shape or scores.ndim != 2:
        raise ValueError(f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)} differ")
    present = [
        k for k in range(scores.shape[1]) if not skip_absent or bool((targets[:, k] == 1).any())
    ]
    precisions = [average_precision_11(scores[:, k], targets[:, k]) for k in present]
    return 100.0 * sum(precisions) / len(precisions)


def average_precision_11(scores: Tensor, targets: Tensor) -> float:
    """Return one class's 11-point interpolated average precision, in 0..1.

    AP = 1/11·Σ_r max over recall ≥ r of the precision, r = 0, 0.1, …, 1 (Everingham et al.,
    The PASCAL VOC Challenge, IJCV 2010, §4.2). Equal scores are ranked as one block, so that the
    order of the images does not matter.

    Args:
        scores: N. targets: N of 1, 0 and −1 (left out).
    """
    labelled = targets != IGNORED
    scores, positive = scores[labelled].double(), (targets[labelled] == 1).double()
    total = positive.sum()
    if total == 0:
        raise ValueError("a class has no positive image to be evaluated on")
    order = scores.argsort(descending=True)
    ranked = scores[order]
    found = positive[order].cumsum(0)
    last_of_block = torch.ones(len(ranked), dtype=torch.bool)
    last_of_block[:-1] = ranked[:-1] != ranked[1:]
    rank = torch.arange(1, len(ranked) + 1, dtype=torch.float64)
    precision, recall = (found / rank)[last_of_block], (found / total)[last_of_block]
    levels = torch.arange(RECALL_LEVELS, dtype=torch.float64) / (RECALL_LEVELS - 1)
    reached = recall[None, :] >= levels[:, None] - 1e-12  # levels × thresholds
    best = torch.where(reached, precision[None, :], 0.0).max(1).values
    return best.mean().item()


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "top1": top1,
    "mean_per_class": mean_per_class,
    "voc07_map": voc07_map,
}

# the same on a small held-out part, where a rare class may be absent; for choosing only
HELD_OUT_METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "top1": top1,
    "mean_per_class": functools.partial(mean_per_class, skip_absent=True),
    "voc07_map": functools.partial(voc07_map, skip_absent=True),
}


def _check(scores: Tensor, labels: Tensor) -> None:
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"scores must be N×K with N labels, not {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    if bool(((labels < 0) | (labels >= scores.shape[1])).any()):
        raise ValueError(f"labels must lie in 0..{scores.shape[1] - 1}")
