"""Judging detections: hand-made cases whose AP is known."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import InputError
from core.results import read_rows
from detection import saved
from detection.saved import MODULES, choose, evaluate, indexed, read_truth, result_rows
from tests.coco_cases import random_case
from tests.detection_tiny import write_pair

ROOT = Path(__file__).resolve().parent.parent


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
    rows = result_rows([found], protocol="p", dataset="d", split="val", init="ce", seed=0)
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


def test_saved_detections_are_judged_and_recorded_alone(truth_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "coco_instances_results.json"
    file.write_text(json.dumps(_perfect(read_truth(truth_file))))
    found = saved.evaluate_saved(truth_file, file, "pycocotools")
    assert [e.iou_type for e in found] == ["bbox", "segm"]
    identity = {"protocol": "p", "dataset": "d", "init": "ce", "seed": 0}
    rows = saved.record(found, tmp_path, "pycocotools", **identity)
    metrics = json.loads((tmp_path / "coco_metrics.json").read_text())
    assert metrics["segm"]["stats"]["AP"] == pytest.approx(100.0)
    assert metrics["segm"]["per_class"] == pytest.approx({"square": 100.0, "bar": 100.0})
    assert len(metrics["bbox"]["precision"]["0.5"]) == len(metrics["bbox"]["recall"]) == 101
    assert {row.metric for row in read_rows(rows)} >= {"bbox/AP", "segm/AP75"}
    assert {row.details["coco_backend"] for row in read_rows(rows)} == {"pycocotools"}


RLE = {"size": [48, 64], "counts": "PP1"}
GOOD = {"image_id": 1, "category_id": 3, "score": 0.5, "bbox": [1, 2, 3, 4], "segmentation": RLE}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("{}", "not a list"),
        ("nonsense", "not JSON"),
        ("[3]", "detection 1 is not an object"),
        (json.dumps([{"image_id": 1}]), "has no category_id"),
        (json.dumps([GOOD, GOOD | {"image_id": 99}]), "detection 2 has image_id 99"),
        (json.dumps([GOOD | {"image_id": [1]}]), r"image_id \[1\]"),
        (json.dumps([GOOD | {"category_id": 4}]), "category_id 4"),
        (json.dumps([GOOD | {"score": float("nan")}]), "score nan, not a finite number"),
        (json.dumps([GOOD | {"score": "high"}]), "score 'high'"),
        (json.dumps([GOOD | {"bbox": [1, 2, 3]}]), r"bbox \[1, 2, 3\], not \[x, y"),
        (json.dumps([GOOD | {"segmentation": [[1, 2, 3, 4, 5, 6]]}]), "not compressed RLE"),
        (json.dumps([GOOD | {"segmentation": RLE | {"size": [64, 48]}}]), r"size \[64, 48\], but"),
        (json.dumps([{"image_id": 1, "category_id": 3, "score": 1}]), "neither a bbox nor"),
    ],
)
def test_damaged_detections_are_refused_in_one_sentence(
    truth_file: Path, tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"results\.json.*{said}"):
        saved.evaluate_saved(truth_file, file, "pycocotools")
    file.write_text(json.dumps([GOOD]))
    assert len(saved.evaluate_saved(truth_file, file, "pycocotools")) == 2


def test_the_tool_prints_the_table_and_refuses_with_status_2(
    truth_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(_perfect(read_truth(truth_file))))
    command = [sys.executable, "tools/evaluate.py", "--results", str(file), "--against", str(file)]
    command += ["--annotations", str(truth_file), "--resamples", "100"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for word in ("AP75", "100.00", "segm/AP50"):
        assert word in done.stdout
    command += ["--resamples", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


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


@pytest.mark.parametrize("backend", ["faster", "hotcoco"])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_fast_backends_agree_with_the_one_of_record(
    tmp_path: Path, backend: str, task: str
) -> None:
    pytest.importorskip(MODULES[backend])
    for seed in range(3):
        truth, detections = random_case(tmp_path, seed)
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


def _without(truth: Any, key: str) -> Any:
    annotations = [{k: v for k, v in a.items() if k != key} for a in truth.dataset["annotations"]]
    return indexed(truth.dataset | {"annotations": annotations})


@pytest.mark.parametrize("backend", ["pycocotools", "faster", "hotcoco"])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_an_annotation_that_does_not_say_iscrowd_is_an_object(
    truth_file: Path, backend: str, task: str
) -> None:
    pytest.importorskip(MODULES[backend])
    truth = read_truth(truth_file)
    found = evaluate(_without(truth, "iscrowd"), _perfect(truth), task, backend)
    assert found.stats["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("backend", ["pycocotools", "faster", "hotcoco"])
def test_an_annotation_may_have_the_id_0(truth_file: Path, backend: str) -> None:
    pytest.importorskip(MODULES[backend])
    truth = read_truth(truth_file)
    from_0 = [a | {"id": a["id"] - 1} for a in truth.dataset["annotations"]]
    found = evaluate(
        indexed(truth.dataset | {"annotations": from_0}), _perfect(truth), "bbox", backend
    )
    assert found.stats["AP"] == pytest.approx(1.0)


def test_annotations_without_masks_judge_boxes_and_no_masks(truth_file: Path) -> None:
    truth = read_truth(truth_file)
    annotations = [a | {"segmentation": []} if a["id"] == 4 else a for a in truth.anns.values()]
    partly = indexed(truth.dataset | {"annotations": annotations})
    assert evaluate(partly, _perfect(truth), "bbox").stats["AP"] == pytest.approx(1.0)
    with pytest.raises(InputError, match="annotation 4 has no segmentation"):
        evaluate(partly, _perfect(truth), "segm")


def test_an_unknown_backend_is_refused_and_auto_is_one_of_them() -> None:
    with pytest.raises(InputError, match="fast"):
        choose("fast")
    assert choose("auto") in MODULES
