"""COCO's annotations and detections, read and validated whole, before anything depends on them.

pycocotools and detectron2 take a malformed entry as it comes: some end a run with a traceback after
its last iteration, some change a number without a word. Here every entry is looked at once, and
each error is one sentence with the file, the entry's id and what it should hold.

Nothing here needs detectron2 or torch.
"""

import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from core.errors import InputError

FIELDS = {  # what every entry of a list must have
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
}
ONE = {"images": "image", "categories": "category", "annotations": "annotation"}
MIN_POLYGON = 6  # numbers: three points


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


def read_annotations(path: Path, kind: str = "coco", train: bool = False) -> dict[str, Any]:
    """Read a json of images, annotations and categories, and validate every entry.

    Args:
        path: the file.
        kind: "coco", or "lvis", which names images by their URL.
        train: allows polygons that detectron2 leaves out when it trains, beside a valid one.

    Raises:
        InputError: the file is not COCO's format; names the entry and what it should hold.
    """
    content = read_json(path)
    for key, fields in FIELDS.items():
        _check_list(path, content, key, fields if (kind, key) != ("lvis", "images") else ("id",))
    if kind == "lvis":
        for image in content["images"]:
            if isinstance(image.get("coco_url"), str):  # …/train2017/000000155379.jpg
                image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
        _check_list(path, content, "images", FIELDS["images"])
    for key in FIELDS:
        _check_ids(path, content, key)
    for image in content["images"]:
        if wrong := _wrong_image(image):
            raise InputError(f"{path}: image {image['id']} has {wrong}")
    for category in content["categories"]:
        if wrong := _wrong_category(category):
            raise InputError(f"{path}: category {category['id']} has {wrong}")
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    keypoints = {c["id"]: len(c.get("keypoints") or ()) for c in content["categories"]}
    for entry in content["annotations"]:
        if wrong := _wrong_annotation(entry, sizes, keypoints, train):
            raise InputError(f"{path}: annotation {entry['id']} has {wrong}")
    return content


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
        wrong = _wrong_detection(detection, sizes, truth.cats)
        if wrong:
            raise InputError(f"{path}: detection {number} {wrong}")
    if not any(all(field in d for d in detections) for field in ("bbox", "segmentation")):
        raise InputError(f"{path}: neither a bbox nor a segmentation is in every detection")
    return detections


def all_finite(values: Iterable[Any]) -> bool:
    """Whether all values are finite numbers."""
    try:
        return all(map(math.isfinite, values))
    except (TypeError, OverflowError):  # a string, a list, None; an integer that no float can hold
        return False


def is_box(box: Any) -> bool:
    """Whether a value is [x, y, width, height] of finite numbers, width and height 0 or more."""
    return isinstance(box, list) and len(box) == 4 and all_finite(box) and min(box[2:]) >= 0


def has_extent(box: list[float]) -> bool:
    """Whether a box [x, y, width, height] covers anything, as floating-point corners see it."""
    x, y, width, height = box
    return x + width > x and y + height > y


def run_lengths(counts: str) -> list[int] | None:
    """Return the run lengths of compressed RLE, None if the string is not a valid one.

    Each is a number of five bits a character, the lowest first, 32 marking all but the last one and
    16 a negative last one; from the fourth on it is the difference to the run before the last
    (pycocotools, maskApi.c: rleFrString).
    """
    codes = np.frombuffer(counts.encode(errors="replace"), np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 12:  # 60 bits
        return None
    place = np.arange(codes.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << 5 * place, starts)
    runs -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return runs.tolist() if runs.min() >= 0 else None


def _check_list(path: Path, content: Any, key: str, fields: Iterable[str]) -> None:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise InputError(f"{path} is not a COCO annotation file: it has no list {key!r}")
    if not entries:
        raise InputError(f"{path} has no {key}: it needs one or more")
    for entry in entries:
        missing = [f for f in fields if not isinstance(entry, dict) or f not in entry]
        if missing:
            known = isinstance(entry, dict) and "id" in entry
            which = f"{ONE[key]} {entry['id']}" if known else f"an entry of {key!r}"
            raise InputError(f"{path} is not a COCO annotation file: {which} has no {missing[0]!r}")


def _check_ids(path: Path, content: dict[str, Any], key: str) -> None:
    """Ids are integers, or all of them strings, and none stands twice."""
    ids = [entry["id"] for entry in content[key]]
    kind: type = str if isinstance(ids[0], str) else int
    seen: set[Any] = set()
    for value in ids:
        if type(value) is not kind:
            raise InputError(
                f"{path}: the id {value!r} in {key} must be "
                f"{'an integer' if kind is int else 'a string, as that of the first is'}"
            )
        if value in seen:
            raise InputError(f"{path}: {ONE[key]} {value} stands twice: ids must be unique")
        seen.add(value)


def _wrong_image(image: dict[str, Any]) -> str:
    name = image["file_name"]
    if not isinstance(name, str) or not name:
        return f"file_name {name!r}, which must be a string"
    for side in ("height", "width"):
        if type(image[side]) is not int or image[side] < 1:
            return f"{side} {image[side]!r}, which must be a whole number of pixels"
    return ""


def _wrong_category(category: dict[str, Any]) -> str:
    if not isinstance(category["name"], str):
        return f"name {category['name']!r}, which must be a string"
    names = category.get("keypoints") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return f"keypoints {_brief(names)}, which must be a list of names"
    return ""


def _wrong_annotation(
    entry: dict[str, Any], sizes: dict[Any, list[int]], keypoints: dict[Any, int], train: bool
) -> str:
    """Return what is wrong with an annotation, "" for nothing; ``sizes`` are [height, width]."""
    for field, known in (("image_id", sizes), ("category_id", keypoints)):
        value = entry[field]
        if not isinstance(value, int | str) or value not in known:
            return f"{field} {value!r}, which is not listed"
    if not is_box(entry["bbox"]):
        return (
            f"bbox {_brief(entry['bbox'])}, which must be [x, y, width, height] of finite numbers, "
            "width and height 0 or more"
        )
    if not all_finite([entry["area"]]) or entry["area"] < 0:
        return f"area {entry['area']!r}, which must be a number of square pixels"
    if entry.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd {entry['iscrowd']!r}, which must be 0 or 1"
    if entry.get("ignore", 0) != 0:
        return f"ignore {entry['ignore']!r}, which detectron2 does not know: use iscrowd, or 0"
    points, names = entry.get("keypoints", []), keypoints[entry["category_id"]]
    if names and not (isinstance(points, list) and len(points) in (0, 3 * names)):
        return f"keypoints {_brief(points)}, which must be x, y, visibility of {names} points"
    if names and not all_finite([*points, entry.get("num_keypoints", 0)]):
        return "keypoints or num_keypoints that are not finite numbers"
    mask = entry.get("segmentation")
    return _wrong_mask(mask, sizes[entry["image_id"]], train) if mask else ""


def _wrong_mask(mask: Any, size: list[int], train: bool) -> str:
    if isinstance(mask, dict):
        return _wrong_rle(mask, size)
    if not isinstance(mask, list) or not all(isinstance(polygon, list) for polygon in mask):
        return (
            f"segmentation {_brief(mask)}, which must be a list of polygons [[x1, y1, x2, y2, x3, "
            "y3, …], …] or RLE; leave it out where there are boxes only"
        )
    lengths = [len(polygon) for polygon in mask]
    if any(length % 2 for length in lengths):
        return f"a polygon of {next(n for n in lengths if n % 2)} numbers, which must be even"
    # a later one of fewer points has no area; pycocotools takes four numbers at first for a box
    if (max(lengths) if train else lengths[0]) < MIN_POLYGON:
        return f"a polygon of {lengths[0]} numbers, which must be {MIN_POLYGON} or more"
    if not all_finite(itertools.chain.from_iterable(mask)):
        return "a polygon with something else than finite numbers"
    return ""


def _wrong_rle(mask: dict[str, Any], size: list[int]) -> str:
    counts = mask.get("counts")
    if mask.get("size") != size:
        return f"a mask of size {mask.get('size')}, but its image is {size} (height, width)"
    if isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts):
        runs: list[int] | None = counts
    else:
        runs = run_lengths(counts) if isinstance(counts, str) else None
    if runs is None:
        return f"a mask with counts {_brief(counts)}, which must be RLE: run lengths or a string"
    if sum(runs) != size[0] * size[1]:
        return f"a mask of {sum(runs)} pixels, but its image has {size[0] * size[1]}"
    return ""


def _wrong_detection(
    detection: Any, sizes: dict[int, list[int]], categories: dict[int, Any]
) -> str:
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


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
