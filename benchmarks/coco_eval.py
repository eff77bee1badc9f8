"""Judging saved detections, files read and all: the fastest backend against pycocotools.

Baseline: ``COCO(file)``, ``loadRes(file)``, ``COCOeval`` as its documentation has it. Ours: what
``tools/evaluate.py`` calls on the same two files, checks of the detections and curves included. The
interpreter's start and imports count on neither side; all numbers must agree to 1e-10.
"""

import contextlib
import dataclasses
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.saved import choose, evaluate_saved

REPEATS = 3  # the fastest counts, on both sides
AGREE = 1e-10  # between any two of COCO's twelve numbers


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A seeded set in COCO's measures."""

    images: int = 1000
    objects: int = 7  # per image
    detections: int = 30  # per image
    classes: int = 80
    height: int = 480
    width: int = 640
    corners: int = 16  # of an outline


def bbox(sizes: Sizes | None = None) -> tuple[float, float, list[str]]:
    """Return the baseline's seconds, ours, and further lines to print, for boxes."""
    return measure("bbox", sizes or Sizes())


def segm(sizes: Sizes | None = None) -> tuple[float, float, list[str]]:
    """Return the same for masks, given as RLE without boxes."""
    return measure("segm", sizes or Sizes())


def measure(task: str, sizes: Sizes) -> tuple[float, float, list[str]]:
    """Evaluate one seeded pair of files both ways, in turn."""
    backend = choose("auto")
    with tempfile.TemporaryDirectory() as folder:
        truth, found = write_set(Path(folder), sizes, task)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(REPEATS):
            began = time.perf_counter()
            expected = _pycocotools(truth, found, task)
            seconds[0].append(time.perf_counter() - began)
            began = time.perf_counter()
            (evaluation,) = evaluate_saved(truth, found, backend)
            seconds[1].append(time.perf_counter() - began)
        size = found.stat().st_size / 1e6
    ours = [-1.0 if v is None else v for v in evaluation.stats.values()]
    apart = float(np.abs(np.array(ours) - expected).max())
    assert apart <= AGREE, f"{backend} is {apart} from pycocotools"
    lines = [
        f"{sizes.images} images, {sizes.images * sizes.detections} detections ({size:.0f} MB of "
        f"JSON), {sizes.classes} classes; {backend}: AP {100 * ours[0]:.2f}, the twelve numbers "
        f"within {apart:.0e} of pycocotools'",
    ]
    return min(seconds[0]), min(seconds[1]), lines


def write_set(folder: Path, sizes: Sizes, task: str, seed: int = 0) -> tuple[Path, Path]:
    """Write seeded annotations and detections (half of them near an object); return both files."""
    generator = np.random.default_rng(seed)
    size = {"height": sizes.height, "width": sizes.width}
    truth: dict[str, Any] = {
        "images": [{"id": n, "file_name": f"{n}.jpg", **size} for n in range(1, sizes.images + 1)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, sizes.classes + 1)],
        "annotations": [],
    }
    detections = []
    for image in range(1, sizes.images + 1):
        outlines = [_outline(generator, sizes) for _ in range(sizes.objects)]
        classes = generator.integers(1, sizes.classes + 1, sizes.objects)
        for outline, category in zip(outlines, classes, strict=True):
            entry = _described(outline, sizes) | {"segmentation": [outline.ravel().tolist()]}
            entry |= {"id": len(truth["annotations"]) + 1, "iscrowd": 0}
            truth["annotations"].append(entry | {"image_id": image, "category_id": int(category)})
        for n in range(sizes.detections):
            near = n % 2 == 0
            if near:
                place = int(generator.integers(sizes.objects))
                outline = outlines[place] + generator.normal(0, 8, 2)
                category = classes[place]
            else:
                outline = _outline(generator, sizes)
                category = generator.integers(1, sizes.classes + 1)
            entry = _described(outline, sizes)
            del entry["area"]
            if task == "segm":
                del entry["bbox"]
            else:
                del entry["segmentation"]
            score = float(generator.beta(4, 2) if near else generator.beta(1, 4))
            detections.append(
                entry | {"image_id": image, "category_id": int(category), "score": score}
            )
    (folder / "instances.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(detections))
    return folder / "instances.json", folder / "results.json"


def _outline(generator: np.random.Generator, sizes: Sizes) -> np.ndarray:
    """Return a random blob, corners×2, x before y, in pixels."""
    angle = np.linspace(0, 2 * np.pi, sizes.corners, endpoint=False)
    radius = np.exp(generator.uniform(2.0, 4.7)) * generator.uniform(0.7, 1.0, sizes.corners)
    centre = generator.uniform((40, 40), (sizes.width - 40, sizes.height - 40))
    return centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _described(outline: np.ndarray, sizes: Sizes) -> dict[str, Any]:
    """Return the area, the box and the mask (RLE) of an outline, in COCO's forms."""
    polygon = [outline.ravel().tolist()]
    rle = coco_mask.frPyObjects(polygon, sizes.height, sizes.width)[0]
    return {
        "area": float(coco_mask.area(rle)),
        "bbox": [round(float(v), 2) for v in coco_mask.toBbox(rle)],
        "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
    }


def _pycocotools(truth: Path, found: Path, task: str) -> np.ndarray:
    """Return the twelve numbers of record."""
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = COCO(str(truth))
        evaluator = COCOeval(annotations, annotations.loadRes(str(found)), task)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return np.asarray(evaluator.stats)
