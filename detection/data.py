"""Detection data: a COCO-format pair of json and images, or a data set that detectron2 knows.

A data set is validated before a run begins: every annotation, the presence of every image, and that
images decode. By name are known the embedded shapes, and what detectron2 knows, where it looks for
it: COCO, its keypoints and LVIS are pairs; Pascal VOC and Cityscapes have formats of their own.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image, UnidentifiedImageError

from core.config import ROOT
from core.errors import InputError
from core.results import sha256_of
from data.shapes import scenes
from detection import formats
from detection.annotations import has_extent, read_annotations

DECODE_UP_TO = 1000  # images that are decoded before any run; more than these, with --check-images
ORIENTATION = 0x0112  # EXIF tag; 5..8 swap height and width
DEEP = ("I", "F", "I;16", "I;16B", "I;16L")  # PIL's modes of more than 8 bits
SHAPES = "shapes"
KINDS = {"coco": "coco", "lvis": "lvis", "pascal_voc": "voc", "cityscapes_instance": "cityscapes"}
COCO_KEYPOINTS = 17  # how many sigmas stand for an empty TEST.KEYPOINT_OKS_SIGMAS
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


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set: annotations, images, and what a config has to know of them."""

    name: str  # of the data set, as result rows name it
    split: str  # "train" or "val"
    json: Path  # of a kind that has no json: the folder of its annotations
    images: Path  # the folder that file names are relative to
    classes: tuple[str, ...]  # in the order of their category ids
    num_images: int
    num_objects: int  # without crowds
    has_masks: bool  # of every object; in "val" of every crowd too: they count in an evaluation
    has_rle: bool  # a non-crowd mask is run-length encoded, which needs MASK_FORMAT "bitmask"
    keypoints: tuple[str, ...] = ()  # their names, where objects have some
    kind: str = "coco"  # whose rules evaluate it: "coco", "lvis", "voc", "cityscapes"
    digest: str = ""  # of its annotation files, of a kind that has no json
    without_mask: int | str | None = None  # id of the first annotation without a mask
    without_keypoints: int | str | None = None  # id of the first annotation without keypoints

    @property
    def catalog_name(self) -> str:
        """The name under which detectron2 knows the split."""
        return f"{self.name}_{self.split}"


def open_pair(
    json_path: str | Path,
    images: str | Path,
    split: str,
    name: str = "",
    kind: str = "coco",
    decode: bool = False,
) -> Split:
    """Validate a json and its image folder, and describe them.

    Args:
        json_path: the annotations.
        images: the folder that their file names are relative to.
        split: "train" or "val".
        name: of the data set; by default that of the folder.
        kind: whose rules evaluate it.
        decode: decode every image, however many there are.

    Raises:
        InputError: missing file or folder, not COCO, a missing or undecodable image (named).
    """
    json_path, images = Path(json_path), Path(images)
    content = read_annotations(json_path, kind, train=split == "train")
    if not images.is_dir():
        raise InputError(f"image folder {images} does not exist (for {json_path})")
    categories = {entry["id"]: entry["name"] for entry in content["categories"]}
    objects = [a for a in content["annotations"] if not a.get("iscrowd", 0)]
    if not any(has_extent(a["bbox"]) for a in objects):
        raise InputError(f"{json_path} has no object whose box has a width and a height")
    masked = objects if split == "train" else content["annotations"]
    without_mask = next((a["id"] for a in masked if not a.get("segmentation")), None)
    without_keypoints = next((a["id"] for a in masked if not a.get("keypoints")), None)
    pair = Split(
        name=name or _default_name(json_path),
        split=split,
        json=json_path.resolve(),
        images=images.resolve(),
        classes=tuple(categories[key] for key in sorted(categories)),
        num_images=len(content["images"]),
        num_objects=len(objects),
        has_masks=without_mask is None,
        has_rle=any(isinstance(a.get("segmentation"), dict) for a in objects),
        keypoints=tuple(content["categories"][0].get("keypoints") or ()),
        kind=kind,
        without_mask=without_mask,
        without_keypoints=without_keypoints,
    )
    files = [
        (pair.images / image["file_name"], (image["width"], image["height"]))
        for image in content["images"]
    ]
    check_present((path for path, _ in files), pair.json)
    if decode or len(files) <= DECODE_UP_TO:
        check_all_decode(files)
    return pair


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
        places = formats.voc_places(Path(meta.dirname), meta.split)
    elif kind == "cityscapes":
        places = [Path(meta.gt_dir), Path(meta.image_dir)]
    else:
        places = [Path(meta.json_file), Path(meta.image_root)]
    for place in places:
        if not place.exists():
            raise InputError(_missing(name, place, kind))
    formats.check_installed(kind)
    if kind in formats.OWN_FORMATS:
        return _open_own_format(name, kind, decode)
    return open_pair(places[0], places[1], split=split, name=stem, kind=kind, decode=decode)


def open_shapes(split: str, shapes: dict[str, Any], scratch: Path | None = None) -> Split:
    """Draw one split of the embedded data, unless it is there already, and open it."""
    key = {"n": shapes[f"{split.upper()}_IMAGES"], "size": shapes["SIZE"], "seed": shapes["SEED"]}
    folder = ROOT / "datasets"
    if scratch is not None and not scenes.place(folder, split, **key).json.is_file():
        folder = scratch
    json_path, images = scenes.write_coco(folder, split, **key)
    return open_pair(json_path, images, split, SHAPES)


def register(splits: Iterable[Split]) -> None:
    """Register splits in detectron2's catalogue, in place of any older one of that name."""
    for split in splits:
        if split.kind in formats.OWN_FORMATS:
            continue  # detectron2 has them under these names
        name = split.catalog_name
        formats.forget(name)
        if split.kind == "lvis":
            load = functools.partial(formats.lvis_records, split.json, split.images)
            DatasetCatalog.register(name, load)
            meta = MetadataCatalog.get(name)
            meta.set(json_file=str(split.json), image_root=str(split.images))
            meta.set(thing_classes=list(split.classes), evaluator_type="lvis")
            continue
        register_coco_instances(name, {}, str(split.json), str(split.images))
        if split.keypoints:
            meta = MetadataCatalog.get(name)
            flips = formats.flips(split.keypoints)
            meta.set(keypoint_names=list(split.keypoints), keypoint_flip_map=flips)


def open_few(split: Split, number: int, folder: Path) -> Split:
    """Return a split of the first images that have objects, registered; its files in ``folder``."""
    if split.kind in formats.OWN_FORMATS:
        few = formats.register_few(split.catalog_name, split.kind, number, folder)
        return _open_own_format(few, split.kind)
    content = read_annotations(split.json, split.kind)
    objects: dict[Any, list[Any]] = {}
    for entry in content["annotations"]:
        objects.setdefault(entry["image_id"], []).append(entry)
    images = sorted(content["images"], key=lambda image: image["id"] not in objects)[:number]
    annotations = [entry for image in images for entry in objects.get(image["id"], [])]
    path = folder / "few.json"
    path.write_text(json.dumps(content | {"images": images, "annotations": annotations}))
    opened = open_pair(path, split.images, "val", "preflight", split.kind)
    register([opened])
    return opened


def fit_to_data(cfg: CfgNode, train: tuple[Split, ...], val: Split, notes: list[str]) -> None:
    """Set the keys that follow from the data: names, number of classes, mask format.

    Raises:
        InputError: the data lack masks or keypoints that the config's detector learns.
    """
    cfg.DATASETS.TRAIN = tuple(pair.catalog_name for pair in train)
    cfg.DATASETS.TEST = (val.catalog_name,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = len(val.classes)
    for pair in (*train, val):
        if not pair.num_objects:
            raise InputError(f"{pair.json} has no object ({pair.catalog_name})")
        if cfg.MODEL.MASK_ON and not pair.has_masks:
            which = f", annotation {pair.without_mask} first" * (pair.without_mask is not None)
            raise InputError(
                f"{pair.json} has boxes without masks{which}; use a box protocol "
                "(detection/faster_rcnn_R50_FPN_1x.yaml) or MODEL.MASK_ON False"
            )
        if cfg.MODEL.KEYPOINT_ON and not pair.keypoints:
            raise InputError(f"{pair.json} names no keypoints in its first category")
        if cfg.MODEL.KEYPOINT_ON and pair.without_keypoints is not None:
            raise InputError(
                f"{pair.json}: annotation {pair.without_keypoints} has no keypoints: an object of "
                "which no point is seen has all of them 0, 0, 0 and num_keypoints 0"
            )
    if cfg.MODEL.KEYPOINT_ON:
        _fit_keypoints(cfg, train, val, notes)
    if any(pair.has_rle for pair in train):
        cfg.INPUT.MASK_FORMAT = "bitmask"
    counts = ", ".join(f"{p.catalog_name} {p.num_images} images" for p in (*train, val))
    notes.append(f"data: {counts}, {len(val.classes)} classes")


def _fit_keypoints(cfg: CfgNode, train: tuple[Split, ...], val: Split, notes: list[str]) -> None:
    """Set the number of keypoints; there must be as many sigmas, and both of a left and a right."""
    count, sigmas = len(val.keypoints), len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = count
    if (sigmas or COCO_KEYPOINTS) != count:
        raise InputError(
            f"{val.json} names {count} keypoints, but TEST.KEYPOINT_OKS_SIGMAS has "
            f"{sigmas or f'none (the {COCO_KEYPOINTS} of COCO)'}: give one per keypoint"
        )
    for pair in train:
        if pair.keypoints != val.keypoints:
            raise InputError(
                f"{pair.json} and {val.json} name different keypoints: those of training must be "
                "those of validation, in the same order"
            )
    for pair in train if cfg.INPUT.RANDOM_FLIP != "none" else ():
        names = pair.keypoints
        for name, other in zip(names, map(formats.mirrored, names), strict=True):
            if other not in names:
                raise InputError(
                    f"{pair.json}: keypoint {name!r} has no {other!r} to change places with in "
                    "mirrored images; rename it, or set INPUT.RANDOM_FLIP none"
                )
        if not formats.flips(names):
            notes.append(
                f"no keypoint of {pair.catalog_name} is a left or right one: they keep their names "
                "in mirrored images; if they should not, set INPUT.RANDOM_FLIP none"
            )


def check_same_classes(train: Split, val: Split) -> None:
    """Raise InputError unless both splits have the same classes in the same order."""
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))[:3] or ["another order"]
        raise InputError(
            f"{train.json} and {val.json} have different categories ({', '.join(odd)}): "
            "a detector trained on one cannot be evaluated on the other"
        )


def check_present(files: Iterable[Path], named_by: Path | str) -> None:
    """Raise InputError unless all images exist; each folder is listed once."""
    present: dict[Path, set[str]] = {}
    for path in files:
        if path.parent not in present:
            inside = path.parent.is_dir()
            present[path.parent] = {e.name for e in os.scandir(path.parent)} if inside else set()
        if path.name not in present[path.parent]:
            raise InputError(f"image {path} does not exist, but {named_by} names it")


def check_all_decode(files: Sequence[tuple[Path, tuple[int, int]]]) -> None:
    """Decode images on all cores, and compare their sizes with width and height.

    Raises:
        InputError: names the first that does not decode, and counts the others.
    """

    def wrong(file: tuple[Path, tuple[int, int]]) -> str:
        try:
            check_decodes(*file)
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # decoding does not hold Python's lock
        found = [sentence for sentence in threads.map(wrong, files) if sentence]
    if found:
        others = f" (and {len(found) - 1} more of {len(files)} images)" if len(found) > 1 else ""
        raise InputError(found[0] + others)


def check_decodes(path: Path, size: tuple[int, int] | None = None) -> None:
    """Decode one image (JPEG at an eighth of its size, which still finds a truncated file).

    Args:
        path: the image.
        size: width and height that it should have, as the json says.

    Raises:
        InputError: it does not decode, or has another size.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(ORIENTATION, 1) >= 5:
                width, height = height, width
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
            mode = image.mode
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise InputError(f"image {path} does not decode: {error}") from None
    if mode in DEEP:
        raise InputError(
            f"image {path} has more than 8 bits a channel (mode {mode}), and detectron2 reads 8: "
            "convert it"
        )
    if size is not None and size != (width, height):
        raise InputError(
            f"image {path} is {width}×{height} pixels, but its json says {size[0]}×{size[1]}"
        )


def _open_own_format(name: str, kind: str, decode: bool = False) -> Split:
    """Describe VOC or Cityscapes; the records are read once, so that damage is found."""
    meta, records = MetadataCatalog.get(name), formats.load(name)
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
        digest=_digest_of_files(formats.annotation_files(name, kind, records)),
    )


def _digest_of_files(files: Iterable[Path]) -> str:
    """Return a sha256 of the names and bytes of files, wherever their folders lie."""
    named = sorted((file.name, sha256_of(file)) for file in files)
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _default_name(json_path: Path) -> str:
    folder = json_path.resolve().parent
    return folder.parent.name if folder.name == "annotations" else folder.name


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
