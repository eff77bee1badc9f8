"""Data sets with formats and rules of their own: Pascal VOC, LVIS, Cityscapes.

VOC and Cityscapes are loaded and judged by detectron2's code, LVIS is judged by hotcoco.
"""

import contextlib
import functools
import importlib.util
import io
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.data.datasets.cityscapes import load_cityscapes_instances
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    DatasetEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.structures import Boxes, BoxMode, Instances

from core.errors import InputError
from detection.annotations import read_annotations
from detection.datasets import Split, check_all_decode, check_present
from detection.saved import Evaluation

OWN_FORMATS = ("voc", "cityscapes")  # those that have no json
NEEDS = {"cityscapes": ("cityscapesscripts", "shapely"), "lvis": ("hotcoco",)}
LVIS_DETECTIONS = 300  # that count in an image
LVIS_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")


def check_installed(kind: str) -> None:
    """Raise InputError unless the packages that read or evaluate a kind of data are installed."""
    packages = NEEDS.get(kind, ())
    if not all(map(importlib.util.find_spec, packages)):
        raise InputError(f"evaluating {kind} data needs `pip install {' '.join(packages)}`")


def voc_places(folder: Path, split: str) -> list[Path]:
    """Return what a VOC folder must hold."""
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    return [listing, folder / "Annotations", folder / "JPEGImages"]


def open_split(name: str, kind: str, decode: bool = False) -> Split:
    """Describe a split of VOC or Cityscapes; its records are read once, so that damage shows.

    Args:
        name: in detectron2's catalogue.
        kind: "voc" or "cityscapes".
        decode: decode every image.

    Raises:
        InputError: an annotation or image is missing or damaged.
    """
    meta = MetadataCatalog.get(name)
    try:
        records = DatasetCatalog.get(name)
    except (OSError, ValueError, SyntaxError, AttributeError, AssertionError) as error:
        raise InputError(f"data set {name!r} cannot be read: {error}") from None
    files = [(Path(r["file_name"]), (r["width"], r["height"])) for r in records]
    check_present((path for path, _ in files), name)
    if decode:
        check_all_decode(files)
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


def open_few(split: Split, number: int, folder: Path) -> Split:
    """Register and open the first images of a VOC or Cityscapes split, as links in ``folder``."""
    name, meta = f"preflight_{split.kind}_few", MetadataCatalog.get(split.catalog_name)
    forget(name)
    if split.kind == "voc":
        listing, *parts = voc_places(Path(meta.dirname), meta.split)
        (folder / "ImageSets" / "Main").mkdir(parents=True)
        for part in parts:
            (folder / part.name).symlink_to(part.absolute())
        images = listing.read_text(encoding="utf-8").split()[: max(number, 2)]  # one is no list
        voc_places(folder, "few")[0].write_text("\n".join(images), encoding="utf-8")
        register_pascal_voc(name, str(folder), "few", meta.year, split.classes)
        return open_split(name, "voc")
    places = {"image_dir": folder / "leftImg8bit", "gt_dir": folder / "gtFine"}
    for image in sorted(Path(meta.image_dir).glob("*/*_leftImg8bit.png"))[:number]:
        city, stem = image.parent.name, image.name.removesuffix("leftImg8bit.png")
        for place, file in [
            ("image_dir", image),
            *(("gt_dir", f) for f in Path(meta.gt_dir, city).glob(f"{stem}gtFine_*")),
        ]:
            (places[place] / city).mkdir(parents=True, exist_ok=True)
            (places[place] / city / file.name).symlink_to(file.absolute())
    given = {key: str(place) for key, place in places.items()}
    load = functools.partial(load_cityscapes_instances, **given, from_json=True, to_polygons=True)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**given, thing_classes=list(split.classes))
    return open_split(name, "cityscapes")


def forget(name: str) -> None:
    """Take a data set out of detectron2's catalogue, if it is there."""
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


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


def evaluate_lvis(
    content: dict[str, Any], detections: list[dict[str, Any]], task: str
) -> Evaluation:
    """Evaluate detections by LVIS's federated rules: 300 an image, classes where they are verified.

    Args:
        content: of the json.
        detections: in COCO's result format.
        task: "bbox" or "segm".

    Returns:
        AP of all, by size, and of rare, common and frequent classes (APr, APc, APf); 0..1.

    Raises:
        InputError: hotcoco is not installed.
    """
    check_installed("lvis")
    import hotcoco

    truth = hotcoco.COCO(content)
    fields = "bbox" if task == "bbox" else "segmentation"
    kept = ("image_id", "category_id", "score", fields)
    found = truth.loadRes([{k: d[k] for k in kept} for d in detections])
    judge = hotcoco.COCOeval(truth, found, task, lvis_style=True)
    with contextlib.redirect_stdout(io.StringIO()):
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    stats = judge.get_results()
    values = {k: float(stats[k]) if stats[k] > -1 else None for k in LVIS_STATS}
    return Evaluation(task, values, {}, no_curves())


class CityscapesEvaluator(CityscapesInstanceEvaluator):
    """detectron2's, around what Cityscapes' script 2.3 asks of NumPy and NumPy 2.4 has no more.

    The script calls ``in1d``, and writes counts as JSON, which fails now that they are no ``int``;
    the two files, a cache and ``matches.json`` in the current folder, are wanted by nobody.
    """

    def evaluate(self) -> Any:
        """Return AP and AP50 of the masks, in percent; None on ranks but the first."""
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as script

        def in1d(values: np.ndarray, among: Any) -> np.ndarray:
            return np.isin(values, among).ravel()

        with (
            mock.patch.object(np, "in1d", in1d, create=True),
            mock.patch.object(script, "writeDict2JSON"),
        ):
            return super().evaluate()


def evaluator(split: Split) -> DatasetEvaluator:
    """Return detectron2's own evaluator of VOC or Cityscapes."""
    makers = {"voc": PascalVOCDetectionEvaluator, "cityscapes": CityscapesEvaluator}
    return makers[split.kind](split.catalog_name)


def check_voc(split: Split) -> list[str]:
    """Evaluate a VOC split's own objects: see ``detection.evaluation.check_split``.

    AP may stay below 100: a class without objects has 0, and of two equal boxes one counts.
    """
    judge = evaluator(split)
    judge.reset()
    for record in DatasetCatalog.get(split.catalog_name):
        own = Instances((record["height"], record["width"]))
        boxes = [a["bbox"] for a in record["annotations"]]
        own.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        own.scores = torch.ones(len(boxes))
        own.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        judge.process([record], [{"instances": own}])
    try:
        (found,) = as_evaluations(judge.evaluate())
    except (AttributeError, TypeError, ValueError, SyntaxError) as error:
        raise InputError(f"{split.json} cannot be evaluated by VOC's rules: {error}") from None
    ap = 100 * (found.stats["AP"] or 0.0)
    return [f"{split.json}: AP of its own objects, taken as detections: bbox {ap:.4g}"]


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
