"""COCO's evaluation: of boxes, masks and keypoints, without a model and without detectron2.

pycocotools' numbers are the numbers of record; the other backends agree and are faster. Evaluations
become result rows, the AP table and ``coco_metrics.json`` here.
"""

import collections
import contextlib
import dataclasses
import io
import json
import logging
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from core.errors import InputError
from core.results import ROWS_FILE, ResultRow, append_rows
from detection.annotations import read_annotations, read_detections

RESULTS_FILE = "coco_instances_results.json"  # a run's detections
DATASET_FILE = "dataset.json"  # where its validation data are
METRICS_FILE = "coco_metrics.json"  # what a report reads: AP per class, curves
TASKS = {"bbox": "bbox", "segm": "segmentation"}  # and the field of a detection that is evaluated
IOU_OF_CURVES = {"0.5": 0, "0.75": 5}  # index of the IoU threshold
logger = logging.getLogger("detectron2.detection.evaluation")
STATS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
ALL_SIZES = (0.0, 1e10)  # square pixels, COCO's "all"
KEYPOINT_STATS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    T IoU thresholds, R recall points, K classes, A size classes, M detection limits.
    """

    iou_type: str  # "bbox", "segm" or "keypoints"
    stats: dict[str, float | None]  # 0..1; None where there is no object to find
    per_class: dict[str, float | None]  # AP, 0..1
    precision: np.ndarray  # T×R×K×A×M; −1 where undefined

    def curve(self, threshold: int) -> list[float]:
        """Return precision at the R recalls, a mean over classes, at IoU 0.5 + 0.05·threshold."""
        at = self.precision[threshold, :, :, 0, -1]  # R×K
        defined = at[:, (at > -1).all(axis=0)]
        return [float(v) for v in defined.mean(axis=1)] if defined.size else []


def evaluate(
    truth: COCO,
    detections: Sequence[dict[str, Any]],
    iou_type: str,
    backend: str = "pycocotools",
    sigmas: Sequence[float] = (),
) -> Evaluation:
    """Evaluate detections in COCO's result format; none at all is an AP of 0, not an error.

    Args:
        truth: the annotations; one without ``iscrowd`` is no crowd.
        detections: image_id, category_id (the json's), score, bbox and, for "segm", segmentation.
        iou_type: "bbox", "segm" or "keypoints" (those by pycocotools alone).
        backend: whose implementation; a key of ``BACKENDS``.
        sigmas: one per keypoint, for the similarity; COCO's 17 where empty.

    Raises:
        InputError: masks are to be evaluated, and an annotation (named) has none.
    """
    names = KEYPOINT_STATS if iou_type == "keypoints" else STATS
    with contextlib.redirect_stdout(io.StringIO()):
        run = _evaluator(truth, detections, iou_type, backend if names is STATS else "pycocotools")
        if sigmas:
            run.params.kpt_oks_sigmas = np.array(sigmas)
        run.evaluate()
        run.accumulate()
        run.summarize()
    precision = np.asarray(run.eval["precision"])
    categories = truth.loadCats(sorted(truth.getCatIds()))
    named = collections.Counter(entry["name"] for entry in categories)
    classes = [
        entry["name"] if named[entry["name"]] == 1 else f"{entry['name']} ({entry['id']})"
        for entry in categories
    ]
    return Evaluation(
        iou_type=iou_type,
        stats={k: _defined(v) for k, v in zip(names, run.stats, strict=True)},
        per_class={name: _mean(precision[:, :, k, 0, -1]) for k, name in enumerate(classes)},
        precision=precision,
    )


def matches(
    truth: COCO, detections: Sequence[dict[str, Any]], iou_type: str
) -> list[dict[str, Any]]:
    """Return pycocotools' ``evalImgs`` over objects of all sizes, by category and image.

    Annotations have the ids 1, 2, … in them, in their order in the truth; 0 is no match.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        run = _evaluator(truth, detections, iou_type, "pycocotools")
        run.params.areaRng, run.params.areaRngLbl = [list(ALL_SIZES)], ["all"]
        run.evaluate()
    return [entry for entry in run.evalImgs if entry is not None]


def choose(backend: str) -> str:
    """Return the name of a backend; "auto" is the fastest one that is installed.

    Raises:
        InputError: unknown, or not installed (says what to install).
    """
    if backend == "auto":
        return next(name for name in FASTEST_FIRST if find_spec(MODULES[name]))
    if backend not in BACKENDS:
        raise InputError(f"COCO backend {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if not find_spec(MODULES[backend]):
        package = MODULES[backend].replace("_", "-")
        raise InputError(f"COCO backend {backend} needs `pip install {package}`")
    return backend


def read_truth(path: str | Path) -> COCO:
    """Read annotations as pycocotools does, without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def indexed(content: dict[str, Any]) -> COCO:
    """Return the content of an annotation file as pycocotools' ``COCO``, without its output."""
    truth = COCO()
    truth.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def open_truth(path: Path) -> COCO:
    """Read and validate annotations.

    Raises:
        InputError: see ``read_annotations``.
    """
    return indexed(read_annotations(path))


def tasks_of(detections: list[dict[str, Any]]) -> list[str]:
    """Return what can be evaluated: boxes, and masks, where every detection has one."""
    return [task for task, field in TASKS.items() if all(field in d for d in detections)]


def evaluate_all(truth: COCO, detections: list[dict[str, Any]], backend: str) -> list[Evaluation]:
    """Evaluate validated detections, a task at a time."""
    return [evaluate(truth, detections, task, backend) for task in tasks_of(detections)]


def evaluate_saved(json_path: Path, detections_path: Path, backend: str) -> list[Evaluation]:
    """Evaluate a file of detections.

    Raises:
        InputError: what is wrong with either file.
    """
    truth = open_truth(json_path)
    return evaluate_all(truth, read_detections(detections_path, truth), backend)


def record(evaluations: list[Evaluation], folder: Path, backend: str, **identity: Any) -> Path:
    """Write ``coco_metrics.json`` and append result rows; return the file of the rows."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output folder {folder} cannot be made: {error.strerror}") from None
    report(evaluations, folder)
    details = {"coco_backend": backend}
    rows = result_rows(evaluations, **identity, split="val", run=str(folder), details=details)
    append_rows(folder / ROWS_FILE, rows)
    return folder / ROWS_FILE


def report(evaluations: list[Evaluation], folder: Path) -> None:
    """Log AP per class and write ``coco_metrics.json``: percent, and curves as fractions."""
    for evaluation in evaluations:
        per_class = [(name, percent(ap)) for name, ap in evaluation.per_class.items()]
        logger.info(f"{evaluation.iou_type} AP per class:\n" + tabulate(per_class, floatfmt=".2f"))
    if evaluations:
        content = {
            e.iou_type: {
                "stats": {name: percent(value) for name, value in e.stats.items()},
                "per_class": {name: percent(value) for name, value in e.per_class.items()},
                "recall": [float(v) for v in np.linspace(0, 1, e.precision.shape[1])],
                "precision": {iou: e.curve(t) for iou, t in IOU_OF_CURVES.items()},
            }
            for e in evaluations
        }
        (folder / METRICS_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def percent(value: float | None) -> float | None:
    """Return a fraction as 0..100; None, where AP is not defined, stays None."""
    return None if value is None else 100.0 * value


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


def _evaluator(
    truth: COCO, detections: Sequence[dict[str, Any]], iou_type: str, backend: str
) -> Any:
    """Return a backend's evaluator; without any detection it is pycocotools'."""
    if iou_type == "segm":
        for annotation in truth.dataset["annotations"]:
            if not annotation.get("segmentation"):
                raise InputError(
                    f"annotation {annotation['id']} has no segmentation: boxes can be evaluated "
                    "by these annotations, masks cannot"
                )
        unused = "bbox"  # with it, the size class would be the box's
    else:  # masks beside boxes only take time; alone they are where boxes come from
        unused = "segmentation" if any("bbox" in d for d in detections[:1]) else ""
    own = [{k: v for k, v in d.items() if k != unused} for d in detections]  # they get areas, ids
    return (BACKENDS[backend] if own else _pycocotools)(truth, own, iou_type)


def _pycocotools(truth: COCO, detections: list[dict[str, Any]], iou_type: str) -> Any:
    own = indexed(_content(truth))
    found = own.loadRes(detections) if detections else indexed(own.dataset | {"annotations": []})
    return COCOeval(own, found, iou_type)


def _faster(truth: COCO, detections: list[dict[str, Any]], iou_type: str) -> Any:
    from faster_coco_eval import COCOeval_faster

    own = indexed(_content(truth))
    return COCOeval_faster(own, own.loadRes(detections), iou_type)


def _hotcoco(truth: COCO, detections: list[dict[str, Any]], iou_type: str) -> Any:
    import hotcoco

    own = hotcoco.COCO(_content(truth))
    return hotcoco.COCOeval(own, own.loadRes(detections), iou_type)


def _content(truth: COCO) -> dict[str, Any]:
    """Return a copy of annotations as pycocotools wants them: with ``iscrowd``, and ids from 1.

    Evaluating masks rewrites annotations in place. An id of 0 would read as "matched nothing", and
    a detection that matched it as a false positive.
    """
    own = [
        annotation | {"id": number, "iscrowd": int(annotation.get("iscrowd") or 0)}
        for number, annotation in enumerate(truth.dataset["annotations"], 1)
    ]
    return truth.dataset | {"annotations": own}


BACKENDS = {"pycocotools": _pycocotools, "faster": _faster, "hotcoco": _hotcoco}
MODULES = {"pycocotools": "pycocotools", "faster": "faster_coco_eval", "hotcoco": "hotcoco"}
FASTEST_FIRST = ("hotcoco", "faster", "pycocotools")


def _mean(precision: np.ndarray) -> float | None:
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else None


def _defined(value: float) -> float | None:
    return float(value) if value > -1 else None
