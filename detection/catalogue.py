"""Data sets by name: the embedded shapes, and those that detectron2 knows, where it looks for them.

COCO, its keypoints and LVIS are pairs of json and images; Pascal VOC and Cityscapes have formats
and rules of their own. All are registered with detectron2 under ``<name>_<split>``.
"""

import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from core.config import ROOT
from core.errors import InputError
from detection import foreign
from detection.datasets import Split, open_pair

SHAPES = "shapes"
KINDS = {"coco": "coco", "lvis": "lvis", "pascal_voc": "voc", "cityscapes_instance": "cityscapes"}
SIDE = re.compile(r"left|right|(?<![^\W_])[lr](?![^\W_])", re.IGNORECASE)  # l, r: whole words
OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}
LAYOUTS = {
    "coco": """  coco/annotations/{instances,person_keypoints}_{train,val}2017.json
  coco/{train,val}2017/*.jpg""",
    "lvis": """  lvis/lvis_v1_{train,val}.json
  coco/{train,val}2017/*.jpg""",
    "voc": """  VOC{2007,2012}/{Annotations/*.xml,JPEGImages/*.jpg}
  VOC{2007,2012}/ImageSets/Main/{trainval,test}.txt""",
    "cityscapes": """  cityscapes/leftImg8bit/{train,val}/CITY/*_leftImg8bit.png
  cityscapes/gtFine/{train,val}/CITY/*_gtFine_{instanceIds.png,labelIds.png,polygons.json}""",
}


def open_named(
    name: str, shapes: dict[str, Any], scratch: Path | None = None, decode: bool = False
) -> Split:
    """Open ``shapes_train``, ``shapes_val`` or a data set that detectron2 knows.

    Args:
        name: as in ``DATASETS.TRAIN``.
        shapes: the config's ``SUITE.SHAPES``.
        scratch: where the embedded data are drawn if ``datasets/`` has them not; None: there.
        decode: decode every image.

    Raises:
        InputError: unknown name, or files that are not there: where they were looked for, and how
            to lay them out.
    """
    stem, _, split = name.rpartition("_")
    if stem == SHAPES and split in ("train", "val"):
        return open_shapes(split, shapes, scratch)
    kind = _kind(name)
    meta = MetadataCatalog.get(name)
    if kind == "voc":
        places = foreign.voc_places(Path(meta.dirname), meta.split)
    elif kind == "cityscapes":
        places = [Path(meta.gt_dir), Path(meta.image_dir)]
    else:
        places = [Path(meta.json_file), Path(meta.image_root)]
    for place in places:
        if not place.exists():
            raise InputError(_missing(name, place, kind))
    foreign.check_installed(kind)
    if kind in foreign.OWN_FORMATS:
        return foreign.open_split(name, kind, decode)
    return open_pair(places[0], places[1], split=split, name=stem, kind=kind, decode=decode)


def open_shapes(split: str, shapes: dict[str, Any], scratch: Path | None = None) -> Split:
    """Draw one split of the embedded data, unless it is there already, and open it."""
    from data.shapes.scenes import place, write_coco

    key = {"n": shapes[f"{split.upper()}_IMAGES"], "size": shapes["SIZE"], "seed": shapes["SEED"]}
    folder = ROOT / "datasets"
    if scratch is not None and not place(folder, split, **key).json.is_file():
        folder = scratch
    json_path, images = write_coco(folder, split, **key)
    return open_pair(json_path, images, split, SHAPES)


def register(splits: Iterable[Split]) -> None:
    """Make splits known to detectron2's catalogue, in place of any older one of that name."""
    for split in splits:
        if split.kind in foreign.OWN_FORMATS:
            continue  # detectron2 has them under these names
        name = split.catalog_name
        foreign.forget(name)
        if split.kind == "lvis":
            DatasetCatalog.register(name, functools.partial(foreign.lvis_records, split))
            meta = MetadataCatalog.get(name)
            meta.set(json_file=str(split.json), image_root=str(split.images))
            meta.set(thing_classes=list(split.classes), evaluator_type="lvis")
            continue
        register_coco_instances(name, {}, str(split.json), str(split.images))
        if split.keypoints:
            meta = MetadataCatalog.get(name)
            meta.set(keypoint_names=list(split.keypoints), keypoint_flip_map=flips(split.keypoints))


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


def _kind(name: str) -> str:
    known = {n for n in DatasetCatalog.list() if _evaluator(n) in KINDS}
    if name in known:
        return KINDS[_evaluator(name)]
    near = [k for k in known if k.startswith(("coco_2017", name[:4]))]
    raise InputError(
        f"data set {name!r} is not known; known are {SHAPES}_train, {SHAPES}_val, "
        f"{', '.join(sorted(near))}, or name a pair with --train-json and --train-images"
    )


def _evaluator(name: str) -> str:
    return str(MetadataCatalog.get(name).get("evaluator_type", ""))


def _missing(name: str, place: Path, kind: str) -> str:
    root = os.environ.get("DETECTRON2_DATASETS")
    where = f"$DETECTRON2_DATASETS is {root}" if root else "$DETECTRON2_DATASETS is not set"
    return (
        f"data set {name!r} is missing: looked for {place.absolute()} ({where});\n"
        f"expected layout under $DETECTRON2_DATASETS:\n{LAYOUTS[kind]}\n"
        "or name any COCO-format pair with --train-json, --train-images, --val-json, --val-images"
    )
