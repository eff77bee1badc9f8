"""COCO annotations and detections that have what is awkward, for the tests of evaluations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from core.results import ResultRow, append_rows
from detection.saved import read_truth


def random_case(folder: Path, seed: int) -> tuple[Any, list[dict[str, Any]]]:
    """Objects and detections: crowds, tied scores, images without either, undetected classes."""
    generator = np.random.default_rng(seed)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": k, "name": f"class {k}"} for k in (2, 3, 9)]
    detections = []
    for image_id in range(1, 21):
        content["images"].append(
            {"id": image_id, "file_name": "x.png", "height": 200, "width": 200}
        )
        for _ in range(generator.integers(0, 7)):
            x, y = generator.integers(0, 100, 2)
            w, h = generator.integers(4, 100, 2)
            crowd = int(generator.random() < 0.2)
            box = [int(v) for v in (x, y, w, h)]
            mask = np.zeros((200, 200, 1), np.uint8, order="F")
            mask[y : y + h, x : x + w] = 1
            rle = coco_mask.encode(mask)[0]
            rle["counts"] = rle["counts"].decode()
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            common = {"image_id": image_id, "category_id": int(generator.choice([2, 3, 9]))}
            annotation = {"id": len(content["annotations"]) + 1, "iscrowd": crowd, "bbox": box}
            annotation |= {"area": int(w * h)}
            annotation["segmentation"] = rle if crowd else [[int(v) for v in polygon[0]]]
            content["annotations"].append(common | annotation)
            for _ in range(generator.integers(0, 4)):
                shift = generator.integers(-6, 7, 2)
                moved = [max(0, box[0] + int(shift[0])), max(0, box[1] + int(shift[1])), *box[2:]]
                score = float(generator.choice([0.25, 0.5, 0.75, generator.random()]))
                if common["category_id"] != 9:
                    detections.append(
                        common | {"bbox": moved, "segmentation": dict(rle), "score": score}
                    )
    path = folder / f"random{seed}.json"
    path.write_text(json.dumps(content))
    return read_truth(path), detections


def write_run(folder: Path, truth: Path, detections: Any, init: str, seed: int) -> None:
    """Write what a detection run leaves: a row, its data, its detections."""
    (folder / "inference").mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps({"json": str(truth), "images": "x"}))
    (folder / "inference/coco_instances_results.json").write_text(json.dumps(detections))
    row = ResultRow(
        step="detection", protocol="p", dataset="d", split="val", metric="bbox/AP", value=1.0,
        unit="%", init=init, seed=seed, config="c",
    )  # fmt: skip
    append_rows(folder / "results.jsonl", [row])
