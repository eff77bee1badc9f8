"""Saved detections (``coco_instances_results.json``), checked and judged without any model."""

from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from core.errors import InputError
from core.results import ROWS_FILE, append_rows
from detection.annotations import all_finite, read_annotations, read_json
from detection.coco_backends import Evaluation, evaluate, indexed
from detection.scores import report, result_rows

# what a run leaves for others beside its rows: detections, and where its validation data are
RESULTS_FILE = "coco_instances_results.json"
DATASET_FILE = "dataset.json"
TASKS = {"bbox": "bbox", "segm": "segmentation"}  # and the field that it judges


def open_truth(path: Path) -> COCO:
    """Read annotations.

    Raises:
        InputError: not a COCO annotation file, and what it lacks.
    """
    return indexed(read_annotations(path))


def read_detections(path: Path, truth: COCO) -> list[dict[str, Any]]:
    """Read detections in COCO's result format; an empty list is one, an empty file is not.

    Raises:
        InputError: which entry is wrong, and how.
    """
    detections = read_json(path)
    if not isinstance(detections, list):
        raise InputError(f"{path} is not a list of detections, as COCO's result format has it")
    sizes = {key: [image["height"], image["width"]] for key, image in truth.imgs.items()}
    for number, detection in enumerate(detections, 1):
        wrong = _wrong(detection, sizes, truth.cats)
        if wrong:
            raise InputError(f"{path}: detection {number} {wrong}")
    if not tasks_of(detections):
        raise InputError(f"{path}: neither a bbox nor a segmentation is in every detection")
    return detections


def tasks_of(detections: list[dict[str, Any]]) -> list[str]:
    """Return what can be judged: boxes, and masks, where every detection has one."""
    return [task for task, field in TASKS.items() if all(field in d for d in detections)]


def judge(truth: COCO, detections: list[dict[str, Any]], backend: str) -> list[Evaluation]:
    """Judge checked detections, a task at a time."""
    return [evaluate(truth, detections, task, backend) for task in tasks_of(detections)]


def evaluate_saved(json_path: Path, detections_path: Path, backend: str) -> list[Evaluation]:
    """Judge a file of detections.

    Raises:
        InputError: what is wrong with either file.
    """
    truth = open_truth(json_path)
    return judge(truth, read_detections(detections_path, truth), backend)


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


def _wrong(detection: Any, sizes: dict[int, list[int]], categories: dict[int, Any]) -> str:
    """Return what is wrong with one detection, "" for nothing; ``sizes`` are [height, width]."""
    if not isinstance(detection, dict):
        return "is not an object with image_id, category_id and score"
    for field in ("image_id", "category_id", "score"):
        if field not in detection:
            return f"has no {field}"
    for field, known in (("image_id", sizes), ("category_id", categories)):
        value = detection[field]
        if not isinstance(value, int | str) or value not in known:
            return f"has {field} {value!r}, which is not in the annotations"
    if not all_finite([detection["score"]]):
        return f"has score {detection['score']!r}, not a finite number"
    if "bbox" in detection:
        box = detection["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all_finite(box):
            return f"has bbox {box!r}, not [x, y, width, height] in finite pixels"
    if "segmentation" in detection:
        mask, size = detection["segmentation"], sizes[detection["image_id"]]
        if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str):
            return "has a segmentation that is not compressed RLE (size and counts)"
        if mask.get("size") != size:
            return f"has a mask of size {mask.get('size')}, but its image is {size} (height, width)"
    return ""
