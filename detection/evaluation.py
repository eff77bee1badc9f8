"""From a model to evaluations: detectron2's inference, and the rules of the data's kind."""

import collections
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, inference_on_dataset
from detectron2.utils import comm
from pycocotools import mask
from pycocotools.coco import COCO
from torch import nn

from core.errors import InputError
from core.progress import Progress
from detection import formats
from detection.annotations import has_extent
from detection.data import Split
from detection.loader import test_loader
from detection.saved import (
    RESULTS_FILE,
    Evaluation,
    as_metrics,
    evaluate,
    indexed,
    read_truth,
    report,
)

COUNTED = {"bbox": 100, "segm": 100, "keypoints": 20}  # detections of a class in an image
EvaluateTask = Callable[[COCO, list[dict[str, Any]], str], Evaluation]  # truth, detections, task


class Evaluator(COCOEvaluator):
    """detectron2's evaluator over the backends of ``detection.saved``; keeps its evaluations.

    Differences: no detection at all is an AP of 0 (not NaN), and ``coco_metrics.json`` holds
    all twelve numbers, AP per class and precision-recall curves.
    """

    def __init__(self, split: Split, cfg: CfgNode, folder: Path) -> None:
        super().__init__(split.catalog_name, tasks=tuple(tasks_of(cfg)), output_dir=str(folder))
        self.folder, self.evaluate_task = folder, task_evaluation(cfg, split)
        self.evaluations: list[Evaluation] = []

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: list[int] | None = None
    ) -> None:
        detections = list(itertools.chain.from_iterable(p["instances"] for p in predictions))
        categories = sorted(self._coco_api.getCatIds())  # class k is the k-th id
        for detection in detections:
            detection["category_id"] = categories[detection["category_id"]]
        (self.folder / RESULTS_FILE).write_text(json.dumps(detections), encoding="utf-8")
        found = [self.evaluate_task(self._coco_api, detections, task) for task in self._tasks]
        report(found, self.folder)
        self.evaluations = found
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
    evaluator: DatasetEvaluator
    if split.kind in formats.OWN_FORMATS:
        evaluator = formats.evaluator(split.kind, split.catalog_name)
    else:
        evaluator = Evaluator(split, cfg, folder)
    quiet = not (bar and comm.is_main_process())
    with Progress(len(loader), f"evaluating {split.catalog_name}", quiet=quiet) as progress:
        callbacks = {} if quiet else {"after_inference": progress.update}
        results = inference_on_dataset(model, loader, evaluator, callbacks=callbacks)
    if isinstance(evaluator, Evaluator):
        return evaluator.evaluations
    found = formats.as_evaluations(results or {})
    report(found, folder)
    return found


def tasks_of(cfg: CfgNode) -> list[str]:
    """Return what the config's detector predicts: boxes, and masks or keypoints where it does."""
    masks = ["segm"] if cfg.MODEL.MASK_ON and cfg.MODEL.META_ARCHITECTURE != "RetinaNet" else []
    return ["bbox", *masks, *(["keypoints"] if cfg.MODEL.KEYPOINT_ON else [])]


def task_evaluation(cfg: CfgNode, split: Split) -> EvaluateTask:
    """Return what evaluates detections of a split in COCO's or LVIS's format, a task at a time."""
    if split.kind == "lvis":
        return lambda truth, found, task: formats.evaluate_lvis(truth.dataset, found, task)
    backend, sigmas = cfg.SUITE.COCO_BACKEND, list(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    return lambda truth, found, task: evaluate(truth, found, task, backend, sigmas)


def check_split(cfg: CfgNode, split: Split) -> list[str]:
    """Evaluate a split's own objects by the code that will evaluate the detector.

    Cityscapes is left out: its script reads a file for each mask, which takes hours.

    Returns:
        Sentences with the AP, and with the objects that no detector can find.

    Raises:
        InputError: the evaluation fails, or AP is not 100.
    """
    if split.kind in formats.OWN_FORMATS:
        return [formats.check_voc(split.catalog_name)] if split.kind == "voc" else []
    per_image = formats.LVIS_DETECTIONS if split.kind == "lvis" else 0
    return check_truth(split.json, tasks_of(cfg), task_evaluation(cfg, split), per_image)


def check_truth(
    path: Path, tasks: Sequence[str], evaluate_task: EvaluateTask, per_image: int = 0
) -> list[str]:
    """Evaluate annotations against themselves: their objects as detections have an AP of 100.

    Args:
        path: the annotations, validated (``detection.annotations``).
        tasks: "bbox", "segm", "keypoints".
        evaluate_task: the evaluation of a task.
        per_image: detections of an image that count; 0: ``COUNTED``, of each class.

    Returns:
        See ``check_split``.

    Raises:
        InputError: the evaluation fails, or AP is not 100.
    """
    truth, aps, notes = read_truth(path), [], []
    for task in tasks:
        own = {
            entry["id"]: _as_detection(truth, entry, task)
            for entry in truth.dataset["annotations"]
            if not entry.get("iscrowd")
        }
        found = [detection for detection in own.values() if detection]
        kept = [a for a in truth.dataset["annotations"] if own.get(a["id"], a)]
        ap = _ap(path, indexed(truth.dataset | {"annotations": kept}), found, task, evaluate_task)
        aps.append(f"{task} {100 * ap:.4g}")
        classes = collections.Counter((d["image_id"], per_image or d["category_id"]) for d in found)
        most, counted = max(classes.values()), per_image or COUNTED[task]
        if most > counted:
            notes.append(f"{task}: an image has {most} objects, and {counted} detections count")
        elif ap < 1 - 1e-6:
            raise InputError(
                f"{path}: its own objects, taken as detections, have a {task} AP of "
                f"{100 * ap:.2f}, and should have 100: the annotations contradict each other"
            )
        lost = [key for key, detection in own.items() if detection is None]
        if lost and task != "keypoints":  # without keypoints they do not count
            what = "box covers nothing" if task == "bbox" else "mask has no pixel"
            notes.append(f"no detector finds annotation {lost[0]}, whose {what} ({len(lost)} such)")
    said = [f"{path}: AP of its own objects, taken as detections: {', '.join(aps)}"]
    return said + [f"warning: {path}: {note}" for note in notes]


def _ap(
    path: Path, truth: COCO, found: list[dict[str, Any]], task: str, evaluate_task: EvaluateTask
) -> float:
    """Return the AP (0..1) of detections; whatever the evaluation raises is an InputError."""
    if not found:
        raise InputError(f"{path}: no object can be found ({task})")
    try:
        ap = evaluate_task(truth, found, task).stats["AP"]
    except InputError:
        raise
    except Exception as error:  # it would end the run after its last iteration
        raise InputError(
            f"{path} cannot be evaluated ({task}): {type(error).__name__}: {error}"
        ) from None
    return ap or 0.0


def _as_detection(truth: COCO, annotation: dict[str, Any], task: str) -> dict[str, Any] | None:
    """Return an annotation as a detection of score 1; None if it has nothing to find."""
    detection = {key: annotation[key] for key in ("image_id", "category_id")} | {"score": 1.0}
    if task == "bbox":
        box = annotation["bbox"]
        return detection | {"bbox": box} if has_extent(box) else None
    if task == "keypoints":
        given = annotation.get("num_keypoints")
        return detection | {"keypoints": annotation["keypoints"]} if given else None
    if not annotation.get("segmentation"):
        return detection  # named by the evaluation
    rle = dict(truth.annToRLE(annotation))
    if isinstance(rle["counts"], bytes):
        rle["counts"] = rle["counts"].decode()
    return detection | {"segmentation": rle} if mask.area(rle) else None
