"""COCO's twelve numbers for boxes and masks. pycocotools' are the numbers of record."""

import collections
import contextlib
import dataclasses
import io
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from core.errors import InputError
from detection.annotations import has_extent

STATS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
ALL_SIZES = (0.0, 1e10)  # square pixels, COCO's "all"
COUNTED = {"bbox": 100, "segm": 100, "keypoints": 20}  # detections of a class in an image
KEYPOINT_STATS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

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
    """Judge detections in COCO's result format; none at all is an AP of 0, not an error.

    Args:
        truth: the annotations; one that does not say ``iscrowd`` is none.
        detections: image_id, category_id (the json's), score, bbox and, for "segm", segmentation.
        iou_type: "bbox", "segm" or "keypoints" (those by pycocotools alone).
        backend: whose implementation; a key of ``BACKENDS``.
        sigmas: one per keypoint, for the similarity; COCO's 17 where empty.

    Raises:
        InputError: masks are to be judged, and an annotation (named) has none.
    """
    names = KEYPOINT_STATS if iou_type == "keypoints" else STATS
    with contextlib.redirect_stdout(io.StringIO()):
        judge = _judge(truth, detections, iou_type, backend if names is STATS else "pycocotools")
        if sigmas:
            judge.params.kpt_oks_sigmas = np.array(sigmas)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = np.asarray(judge.eval["precision"])
    categories = truth.loadCats(sorted(truth.getCatIds()))
    named = collections.Counter(entry["name"] for entry in categories)
    classes = [
        entry["name"] if named[entry["name"]] == 1 else f"{entry['name']} ({entry['id']})"
        for entry in categories
    ]
    return Evaluation(
        iou_type=iou_type,
        stats={k: _defined(v) for k, v in zip(names, judge.stats, strict=True)},
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
        judge = _judge(truth, detections, iou_type, "pycocotools")
        judge.params.areaRng, judge.params.areaRngLbl = [list(ALL_SIZES)], ["all"]
        judge.evaluate()
    return [entry for entry in judge.evalImgs if entry is not None]


def check_truth(
    path: str | Path,
    tasks: Sequence[str],
    evaluate_task: Callable[[COCO, list[dict[str, Any]], str], Evaluation],
    per_image: int = 0,
) -> list[str]:
    """Evaluate the annotations against themselves: their objects as detections have an AP of 100.

    Args:
        path: the annotations, validated (``detection.annotations``).
        tasks: "bbox", "segm", "keypoints".
        evaluate_task: what will evaluate a model: truth, detections and task to an evaluation.
        per_image: detections that count in an image, of all classes; 0: ``COUNTED`` of each class.

    Returns:
        Sentences: what was found, and which objects no detector can find.

    Raises:
        InputError: the evaluation fails, or AP is another one.
    """
    truth = read_truth(path)
    notes, found = [], {}
    for task in tasks:
        own = {
            a["id"]: _as_detection(truth, a, task)
            for a in truth.dataset["annotations"]
            if not a.get("iscrowd")
        }
        lost = [key for key, detection in own.items() if detection is None]
        detections = [detection for detection in own.values() if detection is not None]
        kept = [a for a in truth.dataset["annotations"] if own.get(a["id"], a) is not None]
        try:
            result = evaluate_task(indexed(truth.dataset | {"annotations": kept}), detections, task)
        except InputError:
            raise
        except Exception as error:  # whatever it is, it would end the run after its last iteration
            raise InputError(
                f"{path} cannot be evaluated ({task}): {type(error).__name__}: {error}"
            ) from None
        places = ("image_id",) if per_image else ("image_id", "category_id")
        counts = collections.Counter(tuple(d[key] for key in places) for d in detections)
        most, counted = max(counts.values(), default=0), per_image or COUNTED[task]
        ap = found[task] = result.stats["AP"]
        if most > counted:
            notes.append(
                f"{path}: an image has {most} objects where the first {counted} detections count: "
                f"{task} AP cannot reach 100"
            )
        elif ap is None or ap < 1 - 1e-6:
            said = "undefined" if ap is None else f"{100 * ap:.2f}"
            raise InputError(
                f"{path}: its own objects, taken as detections, have a {task} AP that is {said}, "
                "and should have 100: the annotations contradict each other"
            )
        if lost and task != "keypoints":  # objects without keypoints are legion, and do not count
            what = "box covers nothing" if task == "bbox" else "mask has no pixel"
            notes.append(
                f"warning: {path}: no detector can find {len(lost)} of the objects, such as "
                f"annotation {lost[0]}, whose {what}"
            )
    aps = ", ".join(f"{task} {100 * ap:.4g}" for task, ap in found.items() if ap is not None)
    return [f"{path}: AP of its own objects, taken as detections: {aps}", *notes]


def choose(backend: str) -> str:
    """Return the backend that a name means; "auto" is the fastest one that is installed.

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
    """Read annotations without pycocotools' chatter."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def indexed(content: dict[str, Any]) -> COCO:
    """Return the content of an annotation file as pycocotools has it, without its chatter."""
    truth = COCO()
    truth.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


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
    return detection | {"segmentation": rle} if masks.area(rle) else None


def _judge(truth: COCO, detections: Sequence[dict[str, Any]], iou_type: str, backend: str) -> Any:
    """Return an evaluator that has not begun; without any detection it is pycocotools'."""
    if iou_type == "segm":
        for annotation in truth.dataset["annotations"]:
            if not annotation.get("segmentation"):
                raise InputError(
                    f"annotation {annotation['id']} has no segmentation: these annotations judge "
                    "boxes, not masks"
                )
        unused = "bbox"  # with it, the size class would be the box's
    else:  # masks beside boxes only take time; alone they are where boxes come from
        unused = "segmentation" if any("bbox" in d for d in detections[:1]) else ""
    own = [{k: v for k, v in d.items() if k != unused} for d in detections]  # they get areas, ids
    return (BACKENDS[backend] if own else _pycocotools)(truth, own, iou_type)


def _pycocotools(truth: COCO, detections: list[dict[str, Any]], iou_type: str) -> Any:
    own = _copy(truth)
    found = own.loadRes(detections) if detections else indexed(own.dataset | {"annotations": []})
    return COCOeval(own, found, iou_type)


def _faster(truth: COCO, detections: list[dict[str, Any]], iou_type: str) -> Any:
    from faster_coco_eval import COCOeval_faster

    own = _copy(truth)
    return COCOeval_faster(own, own.loadRes(detections), iou_type)


def _hotcoco(truth: COCO, detections: list[dict[str, Any]], iou_type: str) -> Any:
    import hotcoco

    own = hotcoco.COCO(_content(truth))
    return hotcoco.COCOeval(own, own.loadRes(detections), iou_type)


def _copy(truth: COCO) -> COCO:
    """Return the truth with annotations of its own: judging masks rewrites them in place."""
    return indexed(_content(truth))


def _content(truth: COCO) -> dict[str, Any]:
    """Return annotations as pycocotools wants them: each says whether it is a crowd, ids from 1.

    An id of 0 would read as "matched nothing", and a detection that matched it as a false positive.
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
