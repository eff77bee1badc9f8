"""Judging detections: hand-made cases whose AP is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from core.errors import InputError
from detection import evaluation
from detection.coco_backends import MODULES, choose, evaluate, read_truth
from tests.detection_tiny import write_pair


@pytest.fixture
def truth_file(tmp_path: Path) -> Path:
    return write_pair(tmp_path / "tiny")[0]


def _perfect(truth: Any) -> list[dict[str, Any]]:
    """Every object found exactly, masks as RLE."""
    return [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "segmentation": json.loads(json.dumps(truth.annToRLE(a), default=bytes.decode)),
            "score": 0.5 + 0.01 * a["id"],
        }
        for a in truth.dataset["annotations"]
    ]


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_perfect_detections_have_an_ap_of_100(truth_file: Path, task: str) -> None:
    truth = read_truth(truth_file)
    found = evaluate(truth, _perfect(truth), task)
    assert [found.stats[m] for m in ("AP", "AP50", "AP75", "APs")] == pytest.approx([1.0] * 4)
    assert found.stats["APl"] is None  # no large object: undefined, which is not 0
    assert found.per_class == pytest.approx({"square": 1.0, "bar": 1.0})
    rows = evaluation.result_rows(
        [found], protocol="p", dataset="d", split="val", init="ce", seed=0
    )
    by_metric = {row.metric: row for row in rows}
    assert by_metric[f"{task}/AP"].value == pytest.approx(100.0)
    assert (by_metric[f"{task}/APl"].value, by_metric[f"{task}/AP"].unit) == (None, "%")


def test_one_class_missed_halves_the_ap(truth_file: Path) -> None:
    truth = read_truth(truth_file)
    squares = [d for d in _perfect(truth) if d["category_id"] == 3]
    assert evaluate(truth, squares, "bbox").stats["AP"] == pytest.approx(0.5)


def test_no_detection_is_an_ap_of_0_and_not_an_error(truth_file: Path) -> None:
    for task in ("bbox", "segm"):
        found = evaluate(read_truth(truth_file), [], task)
        assert (found.stats["AP"], found.stats["APl"]) == (0.0, None)


def test_boxes_off_by_a_known_overlap_score_at_the_thresholds_below_it(truth_file: Path) -> None:
    truth = read_truth(truth_file)
    shifted = _perfect(truth)
    for detection in shifted:  # IoU of a box shifted by a quarter of its width: 0.75 / 1.25 = 0.6
        x, y, w, h = detection["bbox"]
        detection["bbox"] = [x + w / 4, y, w, h]
    found = evaluate(truth, shifted, "bbox").stats
    assert (found["AP50"], found["AP75"]) == pytest.approx((1.0, 0.0))
    assert found["AP"] == pytest.approx(3 / 10)  # 0.50, 0.55 and 0.60 of ten thresholds


def test_the_size_class_of_a_mask_is_its_own_not_its_box_es(tmp_path: Path) -> None:
    path, _ = write_pair(tmp_path / "tiny", images=1)
    content = json.loads(path.read_text())
    content["images"][0].update(width=200, height=200)
    thin = [[0, 0, 100, 100, 99, 100, 0, 2]]  # a diagonal sliver in a large box
    content["annotations"] = [
        dict(content["annotations"][0], bbox=[0, 0, 100, 100], segmentation=thin, area=150)
    ]
    path.write_text(json.dumps(content))
    truth = read_truth(path)
    assert evaluate(truth, _perfect(truth), "segm").stats["APs"] == pytest.approx(1.0)


def test_saved_detections_are_judged_alone(truth_file: Path, tmp_path: Path) -> None:
    saved = tmp_path / "coco_instances_results.json"
    saved.write_text(json.dumps(_perfect(read_truth(truth_file))))
    found = evaluation.evaluate_saved(truth_file, saved, "pycocotools", tmp_path)
    assert [e.iou_type for e in found] == ["bbox", "segm"]
    metrics = json.loads((tmp_path / "coco_metrics.json").read_text())
    assert metrics["segm"]["stats"]["AP"] == pytest.approx(100.0)
    assert len(metrics["bbox"]["precision"]["0.5"]) == len(metrics["bbox"]["recall"]) == 101


@pytest.mark.parametrize(
    "text",
    ["{}", "nonsense", '[{"image_id": 1}]', '[{"image_id": 99, "category_id": 3, "score": 1}]'],
)
def test_a_file_of_no_detections_is_refused(truth_file: Path, tmp_path: Path, text: str) -> None:
    saved = tmp_path / "results.json"
    saved.write_text(text)
    with pytest.raises(InputError, match=r"results\.json"):
        evaluation.evaluate_saved(truth_file, saved, "pycocotools")


@pytest.mark.parametrize("backend", ["pycocotools", "faster", "hotcoco"])
def test_the_recorded_numbers_of_real_detections(shared_data: Path, backend: str) -> None:
    pytest.importorskip(MODULES[backend])
    pairs = json.loads((shared_data / "evaluator" / "expected.json").read_text())["pairs"]
    assert len(pairs) == 6
    for pair in pairs:
        truth = read_truth(shared_data / pair["gt"])
        detections = json.loads((shared_data / pair["dt"]).read_text())
        found = evaluate(truth, detections, pair["iou_type"], backend).stats
        assert found == pytest.approx(pair["stats"], abs=1e-10)


def _random_case(folder: Path, seed: int) -> tuple[Any, list[dict[str, Any]]]:
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


@pytest.mark.parametrize("backend", ["faster", "hotcoco"])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_fast_backends_agree_with_the_one_of_record(
    tmp_path: Path, backend: str, task: str
) -> None:
    pytest.importorskip(MODULES[backend])
    for seed in range(3):
        truth, detections = _random_case(tmp_path, seed)
        record = evaluate(truth, detections, task)
        fast = evaluate(truth, detections, task, backend)
        assert fast.stats == pytest.approx(record.stats, abs=1e-10)
        assert fast.per_class == pytest.approx(record.per_class, abs=1e-10)
        assert np.abs(fast.precision - record.precision).max() < 1e-10


def test_judging_masks_leaves_the_truth_as_it_was(truth_file: Path) -> None:
    truth = read_truth(truth_file)
    before = json.dumps(truth.dataset)
    evaluate(truth, _perfect(truth), "segm")
    assert json.dumps(truth.dataset) == before


def test_an_unknown_backend_is_refused_and_auto_is_one_of_them() -> None:
    with pytest.raises(InputError, match="fast"):
        choose("fast")
    assert choose("auto") in MODULES
