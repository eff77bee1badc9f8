"""COCO's twelve numbers for boxes and masks. pycocotools' are the numbers of record."""

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

STATS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    T IoU thresholds, R recall points, K classes, A size classes, M detection limits.
    """

    iou_type: str  # "bbox" or "segm"
    stats: dict[str, float | None]  # 0..1; None where there is no object to find
    per_class: dict[str, float | None]  # AP, 0..1
    precision: np.ndarray  # T×R×K×A×M; −1 where undefined

    def curve(self, threshold: int) -> list[float]:
        """Return precision at the R recalls, a mean over classes, at IoU 0.5 + 0.05·threshold."""
        at = self.precision[threshold, :, :, 0, -1]  # R×K
        defined = at[:, (at > -1).all(axis=0)]
        return [float(v) for v in defined.mean(axis=1)] if defined.size else []


def evaluate(
    truth: COCO, detections: Sequence[dict[str, Any]], iou_type: str, backend: str = "pycocotools"
) -> Evaluation:
    """Judge detections in COCO's result format; none at all is an AP of 0, not an error.

    Args:
        truth: the annotations.
        detections: image_id, category_id (the json's), score, bbox and, for "segm", segmentation.
        iou_type: "bbox" or "segm".
        backend: whose numbers; see ``BACKENDS``.
    """
    if iou_type == "segm":  # with a bbox present, the size class would be the box's
        detections = [{k: v for k, v in d.items() if k != "bbox"} for d in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        found = _loaded(truth, list(detections))
        judge = COCOeval(truth, found, iou_type)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = np.asarray(judge.eval["precision"])
    names = [entry["name"] for entry in truth.loadCats(sorted(truth.getCatIds()))]
    return Evaluation(
        iou_type=iou_type,
        stats={k: _defined(v) for k, v in zip(STATS, judge.stats, strict=True)},
        per_class={name: _mean(precision[:, :, k, 0, -1]) for k, name in enumerate(names)},
        precision=precision,
    )


def read_truth(path: str | Path) -> COCO:
    """Read annotations without pycocotools' chatter."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def _loaded(truth: COCO, detections: list[dict[str, Any]]) -> COCO:
    if detections:
        return truth.loadRes(detections)
    empty = COCO()
    empty.dataset = {key: truth.dataset[key] for key in ("images", "categories")}
    empty.dataset["annotations"] = []
    empty.createIndex()
    return empty


def _mean(precision: np.ndarray) -> float | None:
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else None


def _defined(value: float) -> float | None:
    return float(value) if value > -1 else None
