"""Detection data: any COCO-format pair of json and image folder, checked before a run begins.

A pair is checked for what would else surface after hours: a json that is not COCO, missing images,
annotations of unknown categories, images that do not decode. ``detection.catalogue`` opens by name.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from core.errors import InputError

DECODE_UP_TO = 1000  # images that are decoded before a run starts; more than these, while it runs
ORIENTATION = 0x0112  # EXIF tag; 5..8 swap height and width


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
    has_masks: bool  # of every object; in "val" of every crowd too, for masks are judged by those
    has_rle: bool  # a non-crowd mask is run-length encoded, which needs MASK_FORMAT "bitmask"
    keypoints: tuple[str, ...] = ()  # their names, where objects have some
    kind: str = "coco"  # whose rules judge it: "coco", "lvis", "voc", "cityscapes"
    without_mask: int | None = None  # id of the first annotation for which has_masks is false

    @property
    def catalog_name(self) -> str:
        """The name under which detectron2 knows the split."""
        return f"{self.name}_{self.split}"


def open_pair(
    json_path: str | Path, images: str | Path, split: str, name: str = "", kind: str = "coco"
) -> Split:
    """Check a json and its image folder, and describe them.

    Raises:
        InputError: missing file or folder, not COCO, a missing or undecodable image (named).
    """
    json_path, images = Path(json_path), Path(images)
    content = read_annotations(json_path, kind)
    if not images.is_dir():
        raise InputError(f"image folder {images} does not exist (for {json_path})")
    categories = {entry["id"]: entry["name"] for entry in content["categories"]}
    _check_references(json_path, content, categories)
    objects = [a for a in content["annotations"] if not a.get("iscrowd", 0)]
    masked = objects if split == "train" else content["annotations"]
    without_mask = next((a["id"] for a in masked if not a.get("segmentation")), None)
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
        keypoints=tuple(content["categories"][0].get("keypoints", ())),
        kind=kind,
        without_mask=without_mask,
    )
    _check_images(pair, content["images"])
    return pair


def check_same_classes(train: Split, val: Split) -> None:
    """Raise InputError unless both splits have the same classes in the same order."""
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))[:3] or ["another order"]
        raise InputError(
            f"{train.json} and {val.json} have different categories ({', '.join(odd)}): "
            "a detector trained on one cannot be judged on the other"
        )


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
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise InputError(f"image {path} does not decode: {error}") from None
    if size is not None and size != (width, height):
        raise InputError(
            f"image {path} is {width}×{height} pixels, but its json says {size[0]}×{size[1]}"
        )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def read_annotations(path: Path, kind: str = "coco") -> dict[str, Any]:
    """Read a json and check that it is COCO's format; LVIS's is made so (file names, no crowds).

    Raises:
        InputError: it is not, and what it lacks.
    """
    content = read_json(path)
    if kind == "lvis":
        for entry in content["images"] if isinstance(content, dict) and "images" in content else ():
            if "coco_url" in entry:  # …/train2017/000000155379.jpg
                entry["file_name"] = "/".join(entry["coco_url"].split("/")[-2:])
    wanted = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name")}
    wanted["annotations"] = ("id", "image_id", "category_id", "bbox", "area")
    for key, fields in wanted.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise InputError(f"{path} is not a COCO annotation file: it has no list {key!r}")
        for entry in entries:
            missing = [f for f in fields if not isinstance(entry, dict) or f not in entry]
            if missing:
                raise InputError(
                    f"{path} is not a COCO annotation file: an entry of {key!r} has no "
                    f"{missing[0]!r}"
                )
    if not content["images"] or not content["categories"]:
        raise InputError(f"{path} has no images or no categories")
    return content


def _check_references(path: Path, content: dict[str, Any], categories: dict[int, str]) -> None:
    image_ids = {entry["id"] for entry in content["images"]}
    if len(image_ids) != len(content["images"]):
        raise InputError(f"{path}: an image id stands twice")
    seen: set[Any] = set()
    for entry in content["annotations"]:
        where = f"{path}: annotation {entry['id']}"
        if entry["id"] in seen:
            raise InputError(f"{where} stands twice")
        seen.add(entry["id"])
        if entry["category_id"] not in categories:
            raise InputError(f"{where} is of category {entry['category_id']}, which is not listed")
        if entry["image_id"] not in image_ids:
            raise InputError(f"{where} is of image {entry['image_id']}, which is not listed")
        box = entry["bbox"]
        if not isinstance(box, list) or len(box) != 4 or min(box[2:]) < 0:
            raise InputError(f"{where} has bbox {box}, not [x, y, width, height]")


def _check_images(pair: Split, images: list[dict[str, Any]]) -> None:
    present: dict[Path, set[str]] = {}
    for entry in images:
        path = pair.images / entry["file_name"]
        if path.parent not in present:
            inside = path.parent.is_dir()
            present[path.parent] = {e.name for e in os.scandir(path.parent)} if inside else set()
        if path.name not in present[path.parent]:
            raise InputError(f"image {path} does not exist, but {pair.json} names it")
    if len(images) <= DECODE_UP_TO:
        for entry in images:
            check_decodes(pair.images / entry["file_name"], (entry["width"], entry["height"]))


def _default_name(json_path: Path) -> str:
    folder = json_path.resolve().parent
    return folder.parent.name if folder.name == "annotations" else folder.name
