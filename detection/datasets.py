"""Detection data: any COCO-format pair of json and image folder, validated before a run begins.

A pair is validated for what would else surface after hours: every annotation, the presence of every
image, and that images decode. ``detection.catalogue`` opens by name.
"""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from core.errors import InputError
from detection.annotations import has_extent, read_annotations

DECODE_UP_TO = 1000  # images that are decoded before any run; more than these, with --check-images
ORIENTATION = 0x0112  # EXIF tag; 5..8 swap height and width
DEEP = ("I", "F", "I;16", "I;16B", "I;16L")  # PIL's modes of more than 8 bits


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


def check_same_classes(train: Split, val: Split) -> None:
    """Raise InputError unless both splits have the same classes in the same order."""
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))[:3] or ["another order"]
        raise InputError(
            f"{train.json} and {val.json} have different categories ({', '.join(odd)}): "
            "a detector trained on one cannot be judged on the other"
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


def _default_name(json_path: Path) -> str:
    folder = json_path.resolve().parent
    return folder.parent.name if folder.name == "annotations" else folder.name
