"""Judging detections: hand-made cases whose AP is known."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from detection import evaluation
from detection.coco_backends import evaluate, read_truth
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


def test_the_recorded_numbers_of_real_detections(shared_data: Path) -> None:
    pairs = json.loads((shared_data / "evaluator" / "expected.json").read_text())["pairs"]
    for pair in pairs:
        truth = read_truth(shared_data / pair["gt"])
        detections = json.loads((shared_data / pair["dt"]).read_text())
        found = evaluate(truth, detections, pair["iou_type"]).stats
        assert found == pytest.approx(pair["stats"], abs=1e-12)
