"""What is made of evaluations: result rows, the AP table, and the file that a report reads.

Nothing here needs detectron2, so that saved detections are judged without it.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from core.results import ResultRow
from detection.coco_backends import Evaluation

METRICS_FILE = "coco_metrics.json"
IOU_OF_CURVES = {"0.5": 0, "0.75": 5}  # index of the IoU threshold
logger = logging.getLogger("detectron2.detection.evaluation")


def report(evaluations: list[Evaluation], folder: Path | None) -> list[Evaluation]:
    """Log AP per class and write ``coco_metrics.json`` where there is a folder; return the same."""
    for evaluation in evaluations:
        per_class = [(name, percent(ap)) for name, ap in evaluation.per_class.items()]
        logger.info(f"{evaluation.iou_type} AP per class:\n" + tabulate(per_class, floatfmt=".2f"))
    if folder is not None and evaluations:
        content = {e.iou_type: metrics_of(e) for e in evaluations}
        (folder / METRICS_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return evaluations


def percent(value: float | None) -> float | None:
    """Return a fraction as 0..100; None stays None (there is nothing to find)."""
    return None if value is None else 100.0 * value


def metrics_of(evaluation: Evaluation) -> dict[str, Any]:
    """Return one task for JSON: stats and per-class AP in percent, curves as fractions."""
    return {
        "stats": {name: percent(value) for name, value in evaluation.stats.items()},
        "per_class": {name: percent(value) for name, value in evaluation.per_class.items()},
        "recall": [float(v) for v in np.linspace(0, 1, evaluation.precision.shape[1])],
        "precision": {iou: evaluation.curve(t) for iou, t in IOU_OF_CURVES.items()},
    }


def as_metrics(evaluations: Iterable[Evaluation]) -> dict[str, dict[str, float]]:
    """Return the AP metrics in detectron2's nesting, in percent, undefined ones left out."""
    return {
        e.iou_type: {m: 100.0 * v for m in metrics(e) if (v := e.stats[m]) is not None}
        for e in evaluations
    }


def result_rows(evaluations: Iterable[Evaluation], **identity: Any) -> list[ResultRow]:
    """Return one row per task and metric: ``bbox/AP`` … ``segm/APl``, in percent.

    Args:
        evaluations: of one model on one split.
        identity: the other fields of ``ResultRow`` (protocol, dataset, init, seed, …).
    """
    return [
        ResultRow(
            step="detection",
            metric=f"{evaluation.iou_type}/{metric}",
            value=percent(evaluation.stats[metric]),
            unit="%",
            **identity,
        )
        for evaluation in evaluations
        for metric in metrics(evaluation)
    ]


def metrics(evaluation: Evaluation) -> list[str]:
    """Return the metrics that become rows: every AP (recalls stay in ``coco_metrics.json``)."""
    return [name for name in evaluation.stats if name.startswith("AP")]


def table(evaluations: Sequence[Evaluation]) -> str:
    """Return the AP table that a run ends with."""
    columns = list(dict.fromkeys(name for e in evaluations for name in metrics(e)))
    lines = [[e.iou_type, *(percent(e.stats.get(m)) for m in columns)] for e in evaluations]
    return tabulate(lines, headers=["", *columns], floatfmt=".2f", missingval="–")
