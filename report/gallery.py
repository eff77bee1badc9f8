"""Validation images: ground truth beside the predictions of every initialisation, same images.

Masks are drawn with OpenCV from COCO-format ground truth and ``coco_instances_results.json``.

Shapes: image H×W×3 (BGR, uint8), mask H×W (bool).
"""

import base64
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from report.runs import Run

SIDE = 360  # pixels, the longer side of a drawn picture
MOST_PREDICTIONS = 20  # per picture, by score
OPACITY = 0.42
COLOURS = (  # Okabe and Ito's, BGR
    (178, 114, 0), (0, 159, 230), (115, 158, 0), (167, 121, 204),
    (233, 180, 86), (0, 94, 213), (66, 228, 240), (150, 150, 150),
)  # fmt: skip


Image = NDArray[Any]  # H×W×3, uint8, BGR


@dataclasses.dataclass(frozen=True)
class Picture:
    """One drawn image as a data URI, with the words under it."""

    title: str
    uri: str
    note: str  # e.g. "3 of 5 found at score ≥ 0.5"
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Strip:
    """One validation image: ground truth first, then one picture per initialisation."""

    name: str
    pictures: tuple[Picture, ...]


@dataclasses.dataclass(frozen=True)
class Gallery:
    """The strips, the score from which predictions are drawn, and a note on both."""

    strips: tuple[Strip, ...]
    score: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class _Truth:
    """COCO-format ground truth, indexed by image."""

    images: dict[int, dict[str, Any]]
    annotations: dict[int, list[dict[str, Any]]]
    categories: dict[int, str]
    folder: Path

    def colour(self, category: int) -> tuple[int, int, int]:
        place = list(self.categories).index(category) if category in self.categories else 0
        return COLOURS[place % len(COLOURS)]


def draw_gallery(runs: Sequence[Run], labels: dict[str, str], images: int, score: float) -> Gallery:
    """Draw the same few images for every initialisation.

    Args:
        runs: detection runs; of each initialisation the first with detections is drawn, and only
            runs that were evaluated on the data of the first run.
        labels: initialisation → words under its pictures; also their order.
        images: how many, evenly spaced over the images that show 2 to 8 objects.
        score: predictions below it are not drawn; where nothing at all reaches it, 3/4 of the
            highest score takes its place, for all initialisations alike, with a note.
    """
    drawable = _one_per_init(runs, labels)
    if not drawable:
        return Gallery((), score, "No run has both its detections and the place of its images.")
    first = drawable[0].dataset or {}
    try:
        truth = _read_truth(Path(first["json"]), Path(first["images"]))
        results = {run.init: _by_image(run.detections) for run in drawable if run.detections}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Gallery((), score, f"The images cannot be drawn here: {error}.")
    chosen, notes = _choose(truth, images), []
    highest = max(
        (d["score"] for found in results.values() for i in chosen for d in found.get(i["id"], [])),
        default=0.0,
    )
    if 0 < highest < score:
        notes.append(f"Nothing in these images reaches a score of {score:g}.")
        score = round(0.75 * highest, 2)
    strips, missing = [], 0
    for image in chosen:
        picture = cv2.imread(str(truth.folder / image["file_name"]))
        if picture is None:
            missing += 1
            continue
        strips.append(_strip(image, picture, truth, results, labels, score))
    if missing:
        notes.append(f"{missing} images are not in {truth.folder}.")
    return Gallery(tuple(strips), score, " ".join(notes))


def _one_per_init(runs: Sequence[Run], labels: dict[str, str]) -> list[Run]:
    """Return one run per initialisation, all on the same data, in the order of the labels."""
    drawable = [run for run in runs if run.dataset and run.detections]
    if not drawable:
        return []
    place = drawable[0].dataset or {}
    same = [r for r in drawable if r.dataset and r.dataset["json"] == place["json"]]
    seeds = [{run.seed for run in same if run.init == init} for init in {r.init for r in same}]
    common = sorted(seed for seed in set.intersection(*seeds) if seed is not None)
    chosen: dict[str, Run] = {}
    for run in sorted(same, key=lambda r: (r.seed not in common[:1], r.seed or 0)):
        chosen.setdefault(run.init, run)
    order = [init for init in labels if init in chosen] + [i for i in chosen if i not in labels]
    return [chosen[init] for init in order]


def _read_truth(file: Path, folder: Path) -> _Truth:
    content = json.loads(file.read_text(encoding="utf-8"))
    annotations: dict[int, list[dict[str, Any]]] = {}
    for annotation in content.get("annotations", []):
        annotations.setdefault(annotation["image_id"], []).append(annotation)
    return _Truth(
        images={image["id"]: image for image in content["images"]},
        annotations=annotations,
        categories={c["id"]: c["name"] for c in content["categories"]},
        folder=folder,
    )


def _by_image(file: Path) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for detection in json.loads(file.read_text(encoding="utf-8")):
        found.setdefault(detection["image_id"], []).append(detection)
    return found


def _choose(truth: _Truth, count: int) -> list[dict[str, Any]]:
    """Return images evenly spaced over those with 2 to 8 objects (or, without such, over all)."""
    objects = {
        key: sum(not a.get("iscrowd") for a in truth.annotations.get(key, []))
        for key in truth.images
    }
    good = sorted(key for key, number in objects.items() if 2 <= number <= 8)
    good = good or sorted(key for key, number in objects.items() if number) or sorted(objects)
    count = min(count, len(good))
    return [truth.images[good[(2 * n + 1) * len(good) // (2 * count)]] for n in range(count)]


def _strip(
    image: dict[str, Any],
    picture: Image,
    truth: _Truth,
    results: dict[str, dict[int, list[dict[str, Any]]]],
    labels: dict[str, str],
    score: float,
) -> Strip:
    objects = truth.annotations.get(image["id"], [])
    counted = sum(not o.get("iscrowd") for o in objects)
    pictures = [_picture("ground truth", f"{counted} objects", picture, objects, truth)]
    for init, found in results.items():
        own = sorted(found.get(image["id"], []), key=lambda d: -d["score"])
        kept = [d for d in own if d["score"] >= score][:MOST_PREDICTIONS]
        note = f"{len(kept)} at score ≥ {score:g}"
        if not kept:
            note = f"none; highest score {own[0]['score']:.2f}" if own else "none at any score"
        pictures.append(_picture(labels.get(init, init), note, picture, kept, truth))
    return Strip(str(image["file_name"]), tuple(pictures))


def _picture(
    title: str,
    note: str,
    picture: Image,
    objects: Iterable[dict[str, Any]],
    truth: _Truth,
) -> Picture:
    drawn = draw_objects(picture, objects, truth.categories, truth.colour)
    height, width = drawn.shape[:2]
    encoded = cv2.imencode(".webp", drawn, [cv2.IMWRITE_WEBP_QUALITY, 84])[1]
    uri = "data:image/webp;base64," + base64.b64encode(encoded.tobytes()).decode()
    return Picture(title, uri, note, width, height)


def draw_objects(
    picture: Image,
    objects: Iterable[dict[str, Any]],
    categories: dict[int, str],
    colour: Any,
) -> Image:
    """Return the picture, scaled to 360 pixels, with every object's mask, outline and name.

    Args:
        objects: COCO annotations or results; one without a segmentation is drawn as its box.
        colour: category id → BGR.
    """
    height, width = picture.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    canvas = cv2.resize(picture, size, interpolation=how)
    names = []
    for item in sorted(objects, key=_area, reverse=True):  # small ones on top
        shade = colour(item["category_id"])
        mask = mask_of(item, height, width)
        large = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_LINEAR)
        contours, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        if not item.get("iscrowd"):
            inside = large.astype(bool)
            canvas[inside] = ((1 - OPACITY) * canvas[inside] + OPACITY * np.array(shade)).astype(
                np.uint8
            )
        cv2.drawContours(canvas, contours, -1, (255, 255, 255), 3, cv2.LINE_AA)
        cv2.drawContours(canvas, contours, -1, shade, 2, cv2.LINE_AA)
        text = "crowd" if item.get("iscrowd") else categories.get(item["category_id"], "?")
        if "score" in item:
            text += f" {item['score']:.2f}"
        x, y = item["bbox"][0] * scale, item["bbox"][1] * scale
        names.append((text, round(x), round(y)))
    for text, x, y in names:
        _write(canvas, text, x, y)
    return canvas


def mask_of(item: dict[str, Any], height: int, width: int) -> NDArray[np.bool_]:
    """Return an object's mask, H×W: from polygons, from either kind of RLE, or from its box."""
    segmentation = item.get("segmentation")
    if isinstance(segmentation, list) and segmentation:
        encoded = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation, dict):
        encoded = segmentation
        if isinstance(segmentation["counts"], list):
            encoded = coco_mask.frPyObjects(segmentation, height, width)
    else:
        x, y, w, h = item["bbox"]
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        encoded = coco_mask.merge(coco_mask.frPyObjects([corners], height, width))
    return np.asarray(coco_mask.decode(encoded)).astype(bool)


def _area(item: dict[str, Any]) -> float:
    return float(item["bbox"][2] * item["bbox"][3])


def _write(canvas: Image, text: str, x: int, y: int) -> None:
    """Write white on black at a box's corner, inside the picture."""
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.4
    (width, height), base = cv2.getTextSize(text, font, size, 1)
    x = min(max(x, 0), max(canvas.shape[1] - width - 4, 0))
    y = min(max(y, height + base + 2), canvas.shape[0])
    cv2.rectangle(canvas, (x, y - height - base - 2), (x + width + 4, y), (20, 20, 20), -1)
    place = (x + 2, y - base)
    cv2.putText(canvas, text, place, font, size, (255, 255, 255), 1, cv2.LINE_AA)
