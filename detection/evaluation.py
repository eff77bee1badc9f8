"""From a model to evaluations: detectron2's inference, and whose rules judge it."""

import itertools
import json
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.utils import comm
from torch import nn

from core.progress import Progress
from detection import foreign
from detection.coco_backends import Evaluation, check_truth
from detection.coco_backends import evaluate as judge
from detection.datasets import Split
from detection.loader import test_loader
from detection.saved import RESULTS_FILE
from detection.scores import as_metrics, report


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
    own_rules = split.kind in foreign.OWN_FORMATS
    evaluator = foreign.evaluator(split) if own_rules else Evaluator(split, cfg, folder)
    quiet = not (bar and comm.is_main_process())
    with Progress(len(loader), f"evaluating {split.catalog_name}", quiet=quiet) as progress:
        callbacks = {} if quiet else {"after_inference": progress.update}
        results = inference_on_dataset(model, loader, evaluator, callbacks=callbacks)
    if isinstance(evaluator, Evaluator):
        return evaluator.evaluations
    return report(foreign.as_evaluations(results or {}), folder)


def check_split(cfg: CfgNode, split: Split) -> list[str]:
    """Evaluate a split's own objects by the rules that will evaluate the detector.

    Cityscapes' masks are not: its script reads them from a file each, which takes hours.

    Returns:
        Sentences on what was found.

    Raises:
        InputError: the evaluation fails, or AP is not 100.
    """
    if split.kind == "cityscapes":
        return []
    if split.kind == "voc":
        return foreign.check_voc(split)
    if split.kind == "lvis":
        return check_truth(
            split.json,
            tasks_of(cfg),
            lambda truth, found, task: foreign.judge_lvis(truth.dataset, found, task),
            per_image=foreign.LVIS_DETECTIONS,
        )
    backend, sigmas = cfg.SUITE.COCO_BACKEND, list(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    return check_truth(
        split.json,
        tasks_of(cfg),
        lambda truth, found, task: judge(truth, found, task, backend, sigmas),
    )


def tasks_of(cfg: CfgNode) -> list[str]:
    """Return what the config's detector predicts: boxes, and masks or keypoints where it does."""
    masks = ["segm"] if cfg.MODEL.MASK_ON and cfg.MODEL.META_ARCHITECTURE != "RetinaNet" else []
    return ["bbox", *masks, *(["keypoints"] if cfg.MODEL.KEYPOINT_ON else [])]
