"""From detections to result rows: box and mask AP in percent, and the files that a report reads."""

import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from core.errors import InputError
from core.progress import Progress
from core.results import ResultRow
from detection import foreign
from detection.coco_backends import Evaluation, read_truth
from detection.coco_backends import evaluate as judge
from detection.datasets import Split
from detection.loader import test_loader

RESULTS_FILE = "coco_instances_results.json"
METRICS_FILE = "coco_metrics.json"
IOU_OF_CURVES = {"0.5": 0, "0.75": 5}  # index of the IoU threshold
logger = logging.getLogger("detectron2.detection.evaluation")


class Evaluator(COCOEvaluator):
    """detectron2's evaluator, judged by ``coco_backends``; keeps the evaluations it made.

    Differences: no detection at all is an AP of 0 (not NaN), and ``coco_metrics.json`` holds
    all twelve numbers, AP per class and precision-recall curves.
    """

    def __init__(self, split: Split, cfg: CfgNode, folder: Path) -> None:
        super().__init__(split.catalog_name, tasks=tuple(tasks_of(cfg)), output_dir=str(folder))
        self.split, self.folder = split, folder
        self.backend = cfg.SUITE.COCO_BACKEND
        self.sigmas = list(cfg.TEST.KEYPOINT_OKS_SIGMAS)
        self.evaluations: list[Evaluation] = []

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: list[int] | None = None
    ) -> None:
        detections = list(itertools.chain.from_iterable(p["instances"] for p in predictions))
        categories = sorted(self._coco_api.getCatIds())  # class k is the k-th id
        for detection in detections:
            detection["category_id"] = categories[detection["category_id"]]
        (self.folder / RESULTS_FILE).write_text(json.dumps(detections), encoding="utf-8")
        if self.split.kind == "lvis":
            found = [foreign.judge_lvis(self.split.json, detections, t) for t in self._tasks]
        else:
            found = [
                judge(self._coco_api, detections, task, self.backend, self.sigmas)
                for task in self._tasks
            ]
        self.evaluations = report(found, self.folder)
        self._results.update(as_metrics(found))


def evaluate_model(
    cfg: CfgNode, model: nn.Module, split: Split, folder: Path, bar: bool = False
) -> list[Evaluation]:
    """Run the model over a split on all ranks; rank 0 returns the evaluations, the others none.

    Args:
        cfg: test-time sizes and thresholds.
        model: a detector, alone or under DDP; its training mode comes back afterwards.
        split: the data, registered.
        folder: gets detections and metrics (``OUTPUT_DIR/inference``).
        bar: draw a bar on a terminal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    loader = test_loader(cfg, split.catalog_name)
    own_rules = split.kind in ("voc", "cityscapes")
    evaluator = foreign.evaluator(split) if own_rules else Evaluator(split, cfg, folder)
    quiet = not (bar and comm.is_main_process())
    with Progress(len(loader), f"evaluating {split.catalog_name}", quiet=quiet) as progress:
        callbacks = {} if quiet else {"after_inference": progress.update}
        results = inference_on_dataset(model, loader, evaluator, callbacks=callbacks)
    if isinstance(evaluator, Evaluator):
        return evaluator.evaluations
    return report(foreign.as_evaluations(results or {}), folder)


def evaluate_saved(
    json_path: Path, detections_path: Path, backend: str, folder: Path | None = None
) -> list[Evaluation]:
    """Judge a saved ``coco_instances_results.json`` without any model.

    Raises:
        InputError: the file is not a list of detections, or of other images than the json's.
    """
    truth = read_truth(json_path)
    try:
        detections = json.loads(detections_path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{detections_path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{detections_path} is not JSON: {error}") from None
    fields = ("image_id", "category_id", "score")
    if not isinstance(detections, list) or any(
        not isinstance(d, dict) or any(f not in d for f in fields) for d in detections
    ):
        raise InputError(f"{detections_path} is no list of COCO detections ({', '.join(fields)})")
    strangers = {d["image_id"] for d in detections} - set(truth.imgs)
    if strangers:
        raise InputError(
            f"{detections_path} has detections on image {min(strangers)}, which {json_path} has not"
        )
    tasks = [
        task
        for task, field in (("bbox", "bbox"), ("segm", "segmentation"))
        if not detections or all(field in d for d in detections)
    ]
    return report([judge(truth, detections, task, backend) for task in tasks], folder)


def report(evaluations: list[Evaluation], folder: Path | None) -> list[Evaluation]:
    """Log AP per class and write ``coco_metrics.json`` where there is a folder; return the same."""
    for evaluation in evaluations:
        per_class = [(name, percent(ap)) for name, ap in evaluation.per_class.items()]
        logger.info(f"{evaluation.iou_type} AP per class:\n" + tabulate(per_class, floatfmt=".2f"))
    if folder is not None and evaluations:
        content = {e.iou_type: metrics_of(e) for e in evaluations}
        (folder / METRICS_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return evaluations


def tasks_of(cfg: CfgNode) -> list[str]:
    """Return what the config's detector predicts: boxes, and masks or keypoints where it does."""
    masks = ["segm"] if cfg.MODEL.MASK_ON and cfg.MODEL.META_ARCHITECTURE != "RetinaNet" else []
    return ["bbox", *masks, *(["keypoints"] if cfg.MODEL.KEYPOINT_ON else [])]


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
