"""Data sets with formats and rules of their own: Pascal VOC, LVIS, Cityscapes.

VOC and Cityscapes are loaded and judged by detectron2's code, LVIS is judged by hotcoco.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    DatasetEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.structures import BoxMode

from core.errors import InputError
from detection.coco_backends import Evaluation
from detection.datasets import Split, read_annotations

LVIS_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")


def voc_places(folder: Path, split: str) -> list[Path]:
    """Return what a VOC folder must hold."""
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    return [listing, folder / "Annotations", folder / "JPEGImages"]


def open_split(name: str, kind: str) -> Split:
    """Describe a split of VOC or Cityscapes; its records are read once, so that damage shows.

    Raises:
        InputError: an annotation or image is missing, or a package that reads them is.
    """
    meta = MetadataCatalog.get(name)
    if kind == "cityscapes" and not importlib.util.find_spec("cityscapesscripts"):
        raise InputError("Cityscapes needs its own script: `pip install cityscapesscripts`")
    try:
        records = DatasetCatalog.get(name)
    except (OSError, ValueError, SyntaxError, AttributeError, AssertionError) as error:
        raise InputError(f"data set {name!r} cannot be read: {error}") from None
    for record in records:
        if not Path(record["file_name"]).is_file():
            raise InputError(f"image {record['file_name']} does not exist, but {name} names it")
    voc = kind == "voc"
    stem, _, split = name.rpartition("_")
    return Split(
        name=stem,
        split=split,
        json=Path(meta.dirname if voc else meta.gt_dir).resolve(),
        images=Path(f"{meta.dirname}/JPEGImages" if voc else meta.image_dir).resolve(),
        classes=tuple(meta.thing_classes),
        num_images=len(records),
        num_objects=sum(len(record["annotations"]) for record in records),
        has_masks=not voc,
        has_rle=False,
        kind=kind,
    )


def lvis_records(split: Split) -> list[dict[str, Any]]:
    """Return detectron2's records of an LVIS json, sorted by image id."""
    content = read_annotations(split.json, "lvis")
    classes = {k: i for i, k in enumerate(sorted(c["id"] for c in content["categories"]))}
    records: dict[int, dict[str, Any]] = {}
    for image in content["images"]:
        records[image["id"]] = {
            "file_name": str(split.images / image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": [],
        }
    for entry in content["annotations"]:
        records[entry["image_id"]]["annotations"].append(
            {
                "bbox": entry["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": classes[entry["category_id"]],
                "segmentation": entry["segmentation"],
            }
        )
    return [records[key] for key in sorted(records)]


def judge_lvis(json_path: Path, detections: list[dict[str, Any]], task: str) -> Evaluation:
    """Judge detections by LVIS's federated rules: 300 an image, classes judged where verified.

    Returns:
        AP of all, by size, and of rare, common and frequent classes (APr, APc, APf); 0..1.

    Raises:
        InputError: hotcoco is not installed.
    """
    if not importlib.util.find_spec("hotcoco"):
        raise InputError("LVIS evaluation needs `pip install hotcoco`")
    import hotcoco

    truth = hotcoco.COCO(str(json_path))
    fields = "bbox" if task == "bbox" else "segmentation"
    kept = ("image_id", "category_id", "score", fields)
    found = truth.loadRes([{k: d[k] for k in kept} for d in detections])
    judge = hotcoco.COCOeval(truth, found, task, lvis_style=True)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    stats = judge.get_results()
    values = {k: float(stats[k]) if stats[k] > -1 else None for k in LVIS_STATS}
    return Evaluation(task, values, {}, no_curves())


def evaluator(split: Split) -> DatasetEvaluator:
    """Return detectron2's own evaluator of VOC or Cityscapes."""
    makers = {"voc": PascalVOCDetectionEvaluator, "cityscapes": CityscapesInstanceEvaluator}
    return makers[split.kind](split.catalog_name)


def as_evaluations(results: dict[str, dict[str, float]]) -> list[Evaluation]:
    """Turn a detectron2 evaluator's percentages into evaluations."""
    return [
        Evaluation(
            task, {k: v / 100 if v == v else None for k, v in stats.items()}, {}, no_curves()
        )
        for task, stats in results.items()
    ]


def no_curves() -> np.ndarray:
    """Return the precision array of an evaluation that keeps no curves: T×R×0×1×1."""
    return np.empty((10, 101, 0, 1, 1))
