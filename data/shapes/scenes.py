"""The embedded detection set: COCO files with masks of silhouettes other than ``images``'s.

Objects overlap; a mask is what is *seen* of an object, so hidden parts are cut out of its polygons.
Some groups are annotated as a crowd (``iscrowd`` 1, RLE), and some images have no object at all.
An object's keypoints are the extreme points of what is seen of it (arXiv 1901.08043).
H×W are fine pixels (``drawing.FINE`` per pixel and side), S pixels the side of an image.
"""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from core.errors import InputError
from core.seeds import Dice
from data.shapes import drawing
from data.shapes.drawing import FINE, TEXTURES, TURN, UNIT, Canvas
from data.shapes.outlines import outlines, run_lengths

IMAGE_SIZE = 160  # pixels
VERSION = 2  # raise it when pictures or annotations change: files of another version are not reused
SPLITS = ("train", "val", "test")
EMPTY, CROWDED = 6, 12  # percent of the images: without any object; with a crowd
SEEN = 40  # percent of an object that must stay in sight when others are put before it
SMALLEST = 12  # pixels in sight below which an object is not annotated
KEYPOINTS = ("left", "top", "right", "bottom")
_SEED = 1405  # kept apart from the classification set's

SILHOUETTES: dict[str, np.ndarray] = {
    "arrow": np.array(
        [(-960, -260), (160, -260), (160, -640), (960, 0), (160, 640), (160, 260), (-960, 260)]
    ),
    "bolt": np.array(
        [(200, -1000), (-560, 160), (-60, 160), (-260, 1000), (560, -240), (60, -240), (420, -1000)]
    ),
    "fish": np.array(
        [(-1000, -520), (-520, -120), (-180, -440), (220, -540), (620, -380), (960, 0),
         (620, 380), (220, 540), (-180, 440), (-520, 120), (-1000, 520), (-840, 0)]
    ),
    "gear": drawing.radial([UNIT, UNIT, UNIT * 7 // 10, UNIT * 7 // 10] * 7),
    "heart": np.array(
        [(0, 940), (-520, 480), (-900, 40), (-980, -320), (-840, -640), (-540, -800), (-240, -720),
         (0, -440), (240, -720), (540, -800), (840, -640), (980, -320), (900, 40), (520, 480)]
    ),
    "house": np.array(
        [(0, -960), (460, -520), (460, -860), (680, -860), (680, -310), (960, -40), (720, -40),
         (720, 900), (-720, 900), (-720, -40), (-960, -40)]
    ),
}  # fmt: skip
CLASSES = tuple(SILHOUETTES)


class CocoFiles(NamedTuple):
    """A COCO-format data set on disk."""

    json: Path
    images: Path  # the folder that the file names in the json are relative to


def place(folder: str | Path, split: str, n: int, size: int, seed: int) -> CocoFiles:
    """Return where ``write_coco`` with these arguments puts its files, complete or not."""
    home = Path(folder) / f"shapes_{split}_{n}x{size}_seed{seed}_v{VERSION}"
    return CocoFiles(home / "instances.json", home / "images")


def write_coco(
    folder: str | Path, split: str, n: int, size: int = IMAGE_SIZE, seed: int = 0
) -> CocoFiles:
    """Write n images of S×S pixels and their annotations, or find them complete from before.

    They lie in ``folder/shapes_<split>_<n>x<size>_seed<seed>_v<version>/``, as ``images/*.png`` and
    ``instances.json``; that folder appears as a whole or not at all. Image i depends on (split,
    seed, i, S) only.

    Raises:
        InputError: the folder cannot be written, or the disk is full (nothing is left behind).
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if n < 1 or size < 32:
        raise InputError(f"{n} images of {size} pixels: take at least 1 image of 32 pixels")
    folder = Path(folder)
    files = place(folder, split, n, size, seed)
    final = files.json.parent
    if _complete(files, n):
        return files
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f".{final.name}."))
        _write(temporary, split, n, size, seed)
        temporary.chmod(0o755)
        shutil.rmtree(final, ignore_errors=True)  # an incomplete one
        _rename(temporary, final)
    except OSError as error:
        raise InputError(f"{folder} cannot take the drawn data set: {error.strerror}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return files


def scene(size: int, dice: Dice) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Draw one picture.

    Returns:
        The picture S×S×3 uint8 RGB; whose each fine pixel is, H×W int16 (0: nobody's); and for
        object number k (from 1 on) at place k − 1 its ``{"class": 0..K-1, "crowd": bool}``.
    """
    side = size * FINE
    canvas = Canvas(drawing.background(dice, side, side), np.zeros((side, side), np.int16))
    for _ in range(dice.between(4, 9)):
        _clutter(canvas, dice)
    objects: list[dict[str, Any]] = []
    if not dice.chance(EMPTY):
        if dice.chance(CROWDED):
            objects.append(_crowd(canvas, dice, 1))
        for _ in range(1 + dice.below(6)):
            placed = _object(canvas, dice, len(objects) + 1)
            objects += [placed] if placed else []
        for _ in range(dice.below(4)):
            _clutter(canvas, dice)  # in front
    assert canvas.owner is not None
    return drawing.develop(canvas, dice), canvas.owner, objects


def annotations(owner: np.ndarray, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return COCO annotations, without ids, of what is seen; crowds as RLE, the rest as polygons.

    ``area`` and ``bbox`` are pycocotools' own of the segmentation, in pixels. Crowds have no
    keypoint.
    """
    size = owner.shape[0] // FINE
    found = []
    for number, thing in enumerate(objects, 1):
        mask = owner == number
        if mask.sum() < SMALLEST * FINE * FINE:
            continue
        if thing["crowd"]:
            segmentation: Any = {"size": [size, size], "counts": run_lengths(_reduced(mask))}
            rle = coco_mask.frPyObjects(segmentation, size, size)
        else:
            segmentation = outlines(mask, FINE)
            rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, size, size))
        area = int(coco_mask.area(rle))
        if area >= SMALLEST:
            found.append(
                {
                    "category_id": thing["class"] + 1,
                    "iscrowd": int(thing["crowd"]),
                    "area": area,
                    "bbox": [float(v) for v in coco_mask.toBbox(rle)],
                    "segmentation": segmentation,
                    "num_keypoints": 0 if thing["crowd"] else len(KEYPOINTS),
                    "keypoints": [0] * 12 if thing["crowd"] else _extremes(coco_mask.decode(rle)),
                }
            )
    return found


def _extremes(mask: np.ndarray) -> list[int]:
    """S×S pixels -> x, y (from 0) and 2 (visible) of each of ``KEYPOINTS``.

    Where several pixels are equally far out, the middle one counts.
    """
    rows, columns = mask.nonzero()
    found: list[int] = []
    for far in (columns == columns.min(), rows == rows.min(),
                columns == columns.max(), rows == rows.max()):  # fmt: skip
        candidates = np.flatnonzero(far)
        middle = candidates[len(candidates) // 2]
        found += [int(columns[middle]), int(rows[middle]), 2]
    return found


def _reduced(mask: np.ndarray) -> np.ndarray:
    """H×W fine -> S×S pixels: those that are at least half covered."""
    size = mask.shape[0] // FINE
    covered = mask.reshape(size, FINE, size, FINE).sum((1, 3))
    return covered * 2 >= FINE * FINE


def _object(canvas: Canvas, dice: Dice, number: int) -> dict[str, Any] | None:
    """Paint one object where it leaves enough of the others in sight; None if no place is found."""
    side, kind = canvas.pixels.shape[0], dice.below(len(CLASSES))
    t = dice.below(100)
    radius = side * (1200 + 28 * t + 28 * t * t // 100) // 20_000  # 6 to 34%, small ones often
    for _ in range(8):
        polygon = _somewhere(CLASSES[kind], side, radius, dice)
        if _leaves_others_in_sight(canvas, polygon):
            look = TEXTURES[dice.below(len(TEXTURES))]
            colours = drawing.colour_pair(dice)
            drawing.paint(canvas, polygon, look, colours, dice, radius, number)
            return {"class": kind, "crowd": False}
    return None


def _crowd(canvas: Canvas, dice: Dice, number: int) -> dict[str, Any]:
    """Paint a huddle of small objects of one class, which share a number."""
    side, kind = canvas.pixels.shape[0], dice.below(len(CLASSES))
    radius = side * dice.between(4, 6) // 100
    spread = radius * 3
    middle = [dice.between(spread, side - spread) for _ in range(2)]
    look, colours = TEXTURES[dice.below(len(TEXTURES))], drawing.colour_pair(dice)
    for _ in range(dice.between(7, 12)):
        at = (
            middle[0] + dice.between(-spread, spread),
            middle[1] + dice.between(-spread * 2 // 3, spread * 2 // 3),
        )
        polygon = drawing.place(SILHOUETTES[CLASSES[kind]], at, radius, 16, _tilt(dice))
        drawing.paint(canvas, polygon, look, colours, dice, radius, number)
    return {"class": kind, "crowd": True}


def _somewhere(name: str, side: int, radius: int, dice: Dice) -> np.ndarray:
    margin = radius * 2 // 3
    centre = (dice.between(margin, side - margin), dice.between(margin, side - margin))
    return drawing.place(SILHOUETTES[name], centre, radius, dice.between(13, 20), _tilt(dice))


def _tilt(dice: Dice) -> int:
    return dice.between(-TURN // 8, TURN // 8)


def _leaves_others_in_sight(canvas: Canvas, polygon: np.ndarray) -> bool:
    """Whether each object keeps SEEN percent of what is now seen of it under a new polygon."""
    owner = canvas.owner
    assert owner is not None
    mask, rows, columns = canvas.patch(polygon)
    before = np.bincount(owner.ravel())[1:]
    hidden = np.bincount(owner[rows, columns][mask], minlength=len(before) + 1)[1:]
    return bool(((before - hidden) * 100 >= before * SEEN).all())


def _clutter(canvas: Canvas, dice: Dice) -> None:
    side = canvas.pixels.shape[0]
    at = (dice.below(side), dice.below(side))
    drawing.clutter(canvas, dice, at, side * dice.between(3, 10) // 100)


def _write(folder: Path, split: str, n: int, size: int, seed: int) -> None:
    (folder / "images").mkdir()
    content: dict[str, Any] = {
        "info": {"description": "shapes, detection", "version": str(VERSION), "seed": seed},
        "images": [],
        "annotations": [],
        "categories": [
            {
                "id": k,
                "name": name,
                "supercategory": "shape",
                "keypoints": list(KEYPOINTS),
                "skeleton": [],
            }
            for k, name in enumerate(CLASSES, 1)
        ],
    }
    for image_id in range(1, n + 1):
        picture, owner, objects = scene(size, Dice(_SEED, SPLITS.index(split), seed, image_id))
        name = f"{image_id:06d}.png"
        png = cv2.imencode(".png", picture[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
        (folder / "images" / name).write_bytes(png.tobytes())
        content["images"].append({"id": image_id, "file_name": name, "height": size, "width": size})
        for annotation in annotations(owner, objects):
            known = {"id": len(content["annotations"]) + 1, "image_id": image_id}
            content["annotations"].append(known | annotation)
    (folder / "instances.json").write_text(json.dumps(content), encoding="utf-8")


def _complete(files: CocoFiles, n: int) -> bool:
    """Whether the annotations and every image are there (the folder came by one rename)."""
    try:
        names = {entry.name for entry in os.scandir(files.images) if entry.stat().st_size > 0}
        return files.json.stat().st_size > 0 and len(names) == n
    except OSError:
        return False


def _rename(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise  # else another process was faster, with the same content
