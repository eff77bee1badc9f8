"""Data with formats and rules of their own: Pascal VOC, LVIS, Cityscapes, keypoints.

VOC and Cityscapes are read and evaluated by detectron2's code, LVIS is evaluated by hotcoco.
"""

import contextlib
import functools
import importlib.util
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
from detection.saved import Evaluation

OWN_FORMATS = ("voc", "cityscapes")  # those that have no json
NEEDS = {"cityscapes": ("cityscapesscripts", "shapely"), "lvis": ("hotcoco",)}
LVIS_DETECTIONS = 300  # that count in an image
LVIS_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
SIDE = re.compile(r"left|right|(?<![^\W_])[lr](?![^\W_])", re.IGNORECASE)  # l, r: whole words
OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}


def check_installed(kind: str) -> None:
    """Raise InputError unless the packages that read or evaluate a kind of data are installed."""
    packages = NEEDS.get(kind, ())
    if not all(map(importlib.util.find_spec, packages)):
        raise InputError(f"evaluating {kind} data needs `pip install {' '.join(packages)}`")


def voc_places(folder: Path, split: str) -> list[Path]:
    """Return what a VOC folder must hold."""
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    return [listing, folder / "Annotations", folder / "JPEGImages"]


def load(name: str) -> list[dict[str, Any]]:
    """Return detectron2's records of a VOC or Cityscapes data set.

    Raises:
        InputError: an annotation is missing or damaged.
    """
    try:
        records: list[dict[str, Any]] = DatasetCatalog.get(name)
    except (OSError, ValueError, SyntaxError, AttributeError, AssertionError) as error:
        raise InputError(f"data set {name!r} cannot be read: {error}") from None
    return records


def annotation_files(name: str, kind: str, records: Iterable[dict[str, Any]]) -> list[Path]:
    """Return the files that the annotations of VOC or Cityscapes are read from."""
    meta = MetadataCatalog.get(name)
    if kind == "voc":
        folder = Path(meta.dirname) / "Annotations"
        return [folder / f"{record['image_id']}.xml" for record in records]
    images = [Path(record["file_name"]) for record in records]
    return [
        file
        for image in images
        for file in Path(meta.gt_dir, image.parent.name).glob(
            image.name.removesuffix("leftImg8bit.png") + "gtFine_*"
        )
    ]


def register_few(name: str, kind: str, number: int, folder: Path) -> str:
    """Register the first images of a VOC or Cityscapes data set, as links in ``folder``.

    Returns:
        The name of the new data set.
    """
    few, meta = f"preflight_{kind}_few", MetadataCatalog.get(name)
    forget(few)
    if kind == "voc":
        listing, *parts = voc_places(Path(meta.dirname), meta.split)
        (folder / "ImageSets" / "Main").mkdir(parents=True)
        for part in parts:
            (folder / part.name).symlink_to(part.absolute())
        images = listing.read_text(encoding="utf-8").split()[: max(number, 2)]  # one is no list
        voc_places(folder, "few")[0].write_text("\n".join(images), encoding="utf-8")
        register_pascal_voc(few, str(folder), "few", meta.year, tuple(meta.thing_classes))
        return few
    places = {"image_dir": folder / "leftImg8bit", "gt_dir": folder / "gtFine"}
    for image in sorted(Path(meta.image_dir).glob("*/*_leftImg8bit.png"))[:number]:
        city, stem = image.parent.name, image.name.removesuffix("leftImg8bit.png")
        annotations = Path(meta.gt_dir, city).glob(f"{stem}gtFine_*")
        for place, file in [("image_dir", image), *(("gt_dir", f) for f in annotations)]:
            (places[place] / city).mkdir(parents=True, exist_ok=True)
            (places[place] / city / file.name).symlink_to(file.absolute())
    given = {key: str(place) for key, place in places.items()}
    load = functools.partial(load_cityscapes_instances, **given, from_json=True, to_polygons=True)
    DatasetCatalog.register(few, load)
    MetadataCatalog.get(few).set(**given, thing_classes=list(meta.thing_classes))
    return few


def forget(name: str) -> None:
    """Take a data set out of detectron2's catalogue, if it is there."""
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def lvis_records(json_path: Path, images: Path) -> list[dict[str, Any]]:
    """Return detectron2's records of an LVIS json, sorted by image id."""
    content = read_annotations(json_path, "lvis")
    classes = {k: i for i, k in enumerate(sorted(c["id"] for c in content["categories"]))}
    records: dict[int, dict[str, Any]] = {}
    for image in content["images"]:
        records[image["id"]] = {
            "file_name": str(images / image["file_name"]),
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
    run = hotcoco.COCOeval(truth, found, task, lvis_style=True)
    with contextlib.redirect_stdout(io.StringIO()):
        run.evaluate()
        run.accumulate()
        run.summarize()
    stats = run.get_results()
    values = {k: 100 * stats[k] if stats[k] > -1 else float("nan") for k in LVIS_STATS}
    return as_evaluations({task: values})[0]


class CityscapesEvaluator(CityscapesInstanceEvaluator):
    """detectron2's, for Cityscapes' script 2.3 under NumPy 2.4.

    The script calls ``numpy.in1d``, which is gone, and writes counts as JSON, which fails since
    they are no ``int``: files in the current folder that nothing here reads.
    """

    def evaluate(self) -> Any:
        """Return AP and AP50 of the masks, in percent; None on ranks but the first."""
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as script

        if not hasattr(np, "in1d"):
            setattr(np, "in1d", lambda values, among: np.isin(values, among).ravel())  # noqa: B010
        script.writeDict2JSON = lambda *_: None
        return super().evaluate()


def evaluator(kind: str, name: str) -> DatasetEvaluator:
    """Return detectron2's own evaluator of a VOC or Cityscapes data set."""
    makers = {"voc": PascalVOCDetectionEvaluator, "cityscapes": CityscapesEvaluator}
    return makers[kind](name)


def check_voc(name: str) -> str:
    """Evaluate a VOC data set's own objects, and return a sentence with their AP.

    AP may stay below 100: a class without objects has 0, and of two equal boxes one counts.

    Raises:
        InputError: the evaluation fails.
    """
    run = evaluator("voc", name)
    run.reset()
    for record in DatasetCatalog.get(name):
        own = Instances((record["height"], record["width"]))
        boxes = [a["bbox"] for a in record["annotations"]]
        own.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        own.scores = torch.ones(len(boxes))
        own.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        run.process([record], [{"instances": own}])
    try:
        (found,) = as_evaluations(run.evaluate())
    except (AttributeError, TypeError, ValueError, SyntaxError) as error:
        raise InputError(f"{name} cannot be evaluated by VOC's rules: {error}") from None
    ap = 100 * (found.stats["AP"] or 0.0)
    return f"{name}: AP of its own objects, taken as detections: bbox {ap:.4g}"


def as_evaluations(results: dict[str, dict[str, float]]) -> list[Evaluation]:
    """Turn a detectron2 evaluator's percentages into evaluations without curves."""
    none = np.empty((10, 101, 0, 1, 1))  # T×R×K×A×M
    return [
        Evaluation(task, {k: v / 100 if v == v else None for k, v in stats.items()}, {}, none)
        for task, stats in results.items()
    ]


def flips(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of keypoints that a mirror exchanges: left_eye and right_eye, L_eye …"""
    names = list(names)
    pairs = [(name, mirrored(name)) for name in names]
    return [(a, b) for n, (a, b) in enumerate(pairs) if b in names[n + 1 :]]


def mirrored(name: str) -> str:
    """Return a keypoint's name with its side, left or right, l or r, exchanged; or as it is."""
    return SIDE.sub(lambda found: _in_case_of(found[0], OTHER_SIDE[found[0].lower()]), name)


def _in_case_of(like: str, word: str) -> str:
    if like.isupper():
        return word.upper()
    return word.capitalize() if like[0].isupper() else word
