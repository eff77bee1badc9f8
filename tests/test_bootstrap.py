"""The paired bootstrap: COCO's own numbers where they can be had, and intervals that cover."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import InputError
from core.results import append_rows, read_rows
from detection.compare import (
    ClassMatches,
    average_precisions,
    compare,
    compare_files,
    compare_runs,
    draws,
    find_trials,
    match,
)
from detection.saved import evaluate, indexed
from tests.coco_cases import random_case, write_run

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_the_images_as_they_are_have_pycocotools_ap(tmp_path: Path, task: str) -> None:
    for seed in range(3):  # crowds, tied scores, classes without detections
        truth, detections = random_case(tmp_path, seed)
        times = draws(len(truth.imgs), 5, np.random.default_rng(seed))
        found = average_precisions(match(truth, detections, task), times)[:, 0]
        record = evaluate(truth, detections, task)
        per_threshold = [p[p > -1].mean() for p in record.precision[:, :, :, 0, -1]]
        assert found == pytest.approx(per_threshold, abs=1e-12)
        expected = [record.stats[m] for m in ("AP", "AP50", "AP75")]
        assert [found.mean(), found[0], found[5]] == pytest.approx(expected, abs=1e-12)


def test_what_matches_the_annotation_of_id_0_is_a_hit(tmp_path: Path) -> None:
    truth, _ = random_case(tmp_path, 0)
    objects = [a for a in truth.dataset["annotations"] if not a["iscrowd"]]
    from_0 = [a | {"id": n} for n, a in enumerate(objects)]
    keys = ("image_id", "category_id", "bbox")
    perfect = [{k: a[k] for k in keys} | {"score": 1} for a in objects]
    once = np.ones((len(truth.imgs), 1), np.int32)
    found = match(indexed(truth.dataset | {"annotations": from_0}), perfect, "bbox")
    assert average_precisions(found, once) == pytest.approx(1.0)


def test_a_draw_is_pycocotools_ap_of_the_images_repeated(tmp_path: Path) -> None:
    truth, detections = random_case(tmp_path, 4)
    generator = np.random.default_rng(4)
    for detection in detections:  # no ties: the order of an image's copies is then no matter
        detection["score"] = float(generator.random())
    times = draws(len(truth.imgs), 6, generator)
    found = average_precisions(match(truth, detections, "bbox"), times).mean(axis=0)
    for column in range(times.shape[1]):
        repeated, repeated_detections = _repeat(truth.dataset, detections, times[:, column])
        record = evaluate(repeated, repeated_detections, "bbox").stats["AP"]
        assert found[column] == pytest.approx(record, abs=1e-12)


def _repeat(content: dict[str, Any], detections: list[dict[str, Any]], times: Any) -> Any:
    """Return annotations and detections in which image i really stands times[i] times."""
    made: dict[str, Any] = {"images": [], "annotations": [], "categories": content["categories"]}
    found = []
    for image, count in zip(sorted(content["images"], key=lambda i: i["id"]), times, strict=True):
        for _ in range(count):
            new = len(made["images"]) + 1
            made["images"].append(image | {"id": new})
            for entry in content["annotations"]:
                if entry["image_id"] == image["id"]:
                    number = len(made["annotations"]) + 1
                    made["annotations"].append(entry | {"image_id": new, "id": number})
            own = [d for d in detections if d["image_id"] == image["id"]]
            found += [d | {"image_id": new} for d in own]
    return indexed(made), found


def test_the_same_detections_differ_by_nothing_and_a_seed_repeats(tmp_path: Path) -> None:
    truth, detections = random_case(tmp_path, 1)
    for comparison in compare_files(truth, detections, detections, 100, 0).values():
        assert (comparison.delta, comparison.low, comparison.high) == (0, 0, 0)
        assert not comparison.real
    half = detections[::2]
    one, two, other = (compare_files(truth, half, detections, 100, s) for s in (0, 0, 1))
    assert one == two != other
    swapped = compare_files(truth, detections, half, 100, 0)
    for metric, comparison in one.items():
        assert comparison.delta == pytest.approx(-swapped[metric].delta)
        assert comparison.low == pytest.approx(-swapped[metric].high)


def _synthetic(generator: np.random.Generator, images: int, skills: tuple[float, float]) -> Any:
    """Return two detectors' matches on the same images: each object is found with its skill.

    Images differ in difficulty, and both detectors feel it: without pairing, the interval would be
    much wider. Every image has four objects and two false alarms of lower scores.
    """
    ease = generator.beta(2, 2, images)
    sides = []
    for skill in skills:
        hit = generator.random((images, 4)) < (skill * ease)[:, None]
        scores = np.concatenate(
            [generator.normal(1, 1, (images, 4)), generator.normal(0, 1, (images, 2))], 1
        )
        true = np.concatenate([hit, np.zeros((images, 2), bool)], axis=1).ravel()
        order = np.argsort(-scores.ravel())
        image = np.repeat(np.arange(images), 6)[order]
        places = (np.flatnonzero(true[order]),) * 10
        nothing = (np.empty(0, np.intp),) * 10
        sides.append([ClassMatches(image, np.full(images, 4), places, nothing)])
    return sides


def test_intervals_cover_the_difference_of_the_population() -> None:
    generator = np.random.default_rng(0)
    skills = (0.8, 0.7)
    once = np.ones((30_000, 1), np.int32)
    large = [average_precisions(s, once).mean() for s in _synthetic(generator, 30_000, skills)]
    truth, covered, found_real, repeats = 100 * (large[0] - large[1]), 0, 0, 100
    for _ in range(repeats):
        ours, baseline = _synthetic(generator, 120, skills)
        times = draws(120, 200, generator)
        sides = [[average_precisions(side, times)] for side in (ours, baseline)]
        result = compare(*sides, generator)["AP"]
        covered += result.low <= truth <= result.high
        found_real += result.real
    assert 0.88 <= covered / repeats <= 0.99  # 95% ± 4 standard errors of 1.8%
    assert found_real > 0.2 * repeats  # of chance alone it would be 0.05


def test_without_a_difference_few_are_called_real() -> None:
    generator = np.random.default_rng(1)
    real = 0
    for _ in range(100):
        ours, baseline = _synthetic(generator, 120, (0.7, 0.7))
        times = draws(120, 200, generator)
        sides = [[average_precisions(side, times)] for side in (ours, baseline)]
        real += compare(*sides, generator)["AP"].real
    assert real / 100 <= 0.13


def test_the_level_of_the_draws_is_no_matter_but_their_spread() -> None:
    """Repeated images raise the AP of weak detectors: here every draw by five points."""
    drawn = np.concatenate([[3.0], 8 + np.linspace(-1, 1, 101)])
    ours = np.tile(drawn / 100, (10, 1))
    found = compare([ours], [np.zeros_like(ours)], np.random.default_rng(0))["AP"]
    assert (found.delta, found.low, found.high) == pytest.approx((3, 3 - 0.95, 3 + 0.95))


def test_with_several_trials_the_interval_knows_of_their_spread() -> None:
    """Each trial alone is certain about its Δ; the trials disagree from −1 to +3."""
    ones = np.ones((10, 101)) / 100
    alone = compare([3 * ones], [0 * ones], np.random.default_rng(0))["AP"]
    assert (alone.delta, alone.low, alone.high) == pytest.approx((3, 3, 3))
    ours = [-ones, ones, 3 * ones]
    together = compare(ours, [0 * ones] * 3, np.random.default_rng(0))["AP"]
    assert together.delta == pytest.approx(1)
    assert together.low < 0 < together.high


def test_runs_are_paired_by_seed_and_make_rows(tmp_path: Path) -> None:
    truth, detections = random_case(tmp_path, 2)
    generator = np.random.default_rng(0)
    for init, share in (("ce", 0.6), ("ctc", 0.9), ("lonely", 0.5)):
        for seed in (1, 2, 3) if init != "lonely" else (9,):
            kept = [d for d in copy.deepcopy(detections) if generator.random() < share]
            write_run(
                tmp_path / f"runs/{init}-s{seed}", tmp_path / "random2.json", kept, init, seed
            )
    (tmp_path / "runs/ctc-s3").rename(tmp_path / "runs/ctc-s3.old1")
    assert len(list(find_trials(tmp_path / "runs"))) == 6
    rows = compare_runs([str(tmp_path / "runs")], resamples=100)
    assert len(read_rows(tmp_path / "runs/bootstrap.jsonl")) == len(rows) == 6
    assert {row.init for row in rows} == {"ctc"}
    first = rows[0]
    assert (first.metric, first.details["seeds"]) == ("bbox/AP minus ce", [1, 2])
    each = [
        100 * evaluate(truth, json.loads(f.read_text()), "bbox").stats["AP"]
        for init in ("ctc", "ce")
        for seed in (1, 2)
        for f in [tmp_path / f"runs/{init}-s{seed}/inference/coco_instances_results.json"]
    ]
    assert first.value == pytest.approx((each[0] + each[1] - each[2] - each[3]) / 2)
    low, high = first.details["interval"]
    assert low < first.value < high
    with pytest.raises(InputError, match=r"nothing to compare with 'moco'.*ce, ctc, lonely"):
        compare_runs([str(tmp_path / "runs")], baseline="moco")
    done = subprocess.run(
        [sys.executable, "tools/compare.py", str(tmp_path / "nowhere")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_runs_that_learned_from_other_annotations_are_not_compared(tmp_path: Path) -> None:
    _, detections = random_case(tmp_path, 2)
    for init in ("ce", "ctc"):
        write_run(tmp_path / f"runs/{init}-s1", tmp_path / "random2.json", detections, init, 1)
    file = tmp_path / "runs/ctc-s1/results.jsonl"
    (row,) = read_rows(file)
    file.unlink()
    append_rows(file, [dataclasses.replace(row, data="few/val")])
    with pytest.raises(InputError, match="nothing to compare"):
        compare_runs([str(tmp_path / "runs")], resamples=100)
