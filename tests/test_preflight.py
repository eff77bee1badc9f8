"""Preflight and dry run: each check passes on what is right and fails on its own mistake."""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from core.disk import Disk, Files
from core.errors import InputError
from core.results import ResultRow, append_rows
from detection import checks
from detection.bench import Limits
from detection.cfg import hash_of, load_cfg
from detection.checks import CHECKS
from detection.plan import kept_checkpoints
from detection.preflight import FAILED, NOT_RUN, PASSED, preflight
from detection.run import run
from tests.detection_tiny import CONFIG, SMALL, backbone, request, write_backbone, write_pair

ROOT = Path(__file__).resolve().parent.parent
QUICK = Limits(iterations=5, overfit_steps=40, overfit_factor=1.5, images=2, resume_iterations=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_pair(folder)
    return folder


def _learned() -> dict[str, torch.Tensor]:
    """Return a backbone whose stem no initialisation makes."""
    tensors = {name: value.clone() for name, value in backbone().items()}
    tensors["stem.conv1.weight"] *= 2
    tensors["stem.conv1.norm.running_mean"] += 0.1
    return tensors


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("weights") / "ce_d2.pth", _learned())


def _found(asked: Any, only: str = "", limits: Limits = QUICK) -> dict[str, tuple[str, str]]:
    findings = preflight(asked, limits, [name for name in only.split(",") if name])
    return {finding.name: (finding.mark, finding.fact) for finding in findings}


def test_a_run_that_will_go_well_passes_all_checks_and_nothing_is_left(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = _found(request(data, tmp_path / "run", weights=str(weights)))
    assert {name: mark for name, (mark, _) in found.items()} == dict.fromkeys(CHECKS, PASSED)
    assert list(tmp_path.iterdir()) == []
    said = {name: fact for name, (_, fact) in found.items()}
    assert "100 of 100" in said["keys"]
    assert "res5" in said["parity"]
    assert "on 1 × cpu with 2 images each" in said["iterations"]
    assert "all 4 take" in said["iterations"]  # of the schedule, not of the check
    assert "at most 2 checkpoints" in said["memory"]
    assert "12 rows from 2 images" in said["evaluate"]
    assert "bits" in said["resume"]


def test_each_mistake_in_the_weights_is_found_by_its_own_check(data: Path, tmp_path: Path) -> None:
    output, four = tmp_path / "run", "keys,parity,stem,input"

    def marks(name: str, tensors: Any = None, **facts: Any) -> dict[str, tuple[str, str]]:
        path = write_backbone(tmp_path / f"{name}.pth", tensors, **facts)
        return _found(request(data, output, weights=str(path)), four)

    random = marks("random")
    assert random["stem"][0] == FAILED
    assert "initialisation scale" in random["stem"][1]
    assert [random[name][0] for name in ("keys", "parity", "input")] == [PASSED] * 3
    other_mean = marks("mean", _learned(), mean=[0.0, 0.0, 0.0])
    assert [other_mean[name][0] for name in four.split(",")] == [PASSED, FAILED, PASSED, FAILED]
    assert "PIXEL_MEAN" in other_mean["input"][1]
    assert "res2 is the first stage" in other_mean["parity"][1]
    partly = marks("partly", {k: v for k, v in _learned().items() if "res4.1.conv2" not in k})
    assert partly["keys"][0] == FAILED
    assert "res4.1.conv2" in partly["keys"][1]
    assert partly["parity"] == (NOT_RUN, "not run: keys has not passed")
    silent = write_backbone(tmp_path / "s.pth", _learned(), mean=None, arch=None)
    vouched = request(data, output, weights=str(silent), assume_convention=True)
    assert _found(vouched, "input,parity")["input"][0] == NOT_RUN
    unproved = {f.name: f.stands_in_the_way for f in preflight(vouched, QUICK, ["input", "parity"])}
    assert unproved == {"keys": False, "parity": True, "input": True}
    assert "does not say its arch, mean" in _found(vouched, "parity")["parity"][1]


def test_without_weights_what_looks_at_them_is_not_run(data: Path, tmp_path: Path) -> None:
    found = _found(request(data, tmp_path / "run"), "keys,parity,stem,input,evaluate")
    assert [found[name][0] for name in ("keys", "parity", "stem", "input")] == [NOT_RUN] * 4
    assert "no --weights" in found["stem"][1]
    assert found["evaluate"][0] == PASSED
    findings = preflight(request(data, tmp_path / "run"), QUICK, ["stem", "evaluate"])
    assert not any(finding.stands_in_the_way for finding in findings)


def test_losses_that_are_not_finite_fail_and_memory_is_not_judged(
    data: Path, weights: Path, tmp_path: Path
) -> None:
    wild = ["SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0"]
    asked = request(data, tmp_path / "run", weights=str(weights), overrides=wild)
    found = _found(asked, "memory")
    assert found["keys"][0] == PASSED  # what a check needs is run with it
    assert found["iterations"][0] == FAILED
    assert "not finite at iteration" in found["iterations"][1]
    assert found["memory"] == (NOT_RUN, "not run: iterations has not passed")


def test_an_unforeseen_error_fails_its_check_and_the_others_are_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("segmentation")

    monkeypatch.setattr(checks, "evaluate_model", broken)
    found = _found(request(data, tmp_path / "run"), "evaluate,resume")
    assert found["evaluate"] == (FAILED, "KeyError: 'segmentation'")
    assert found["resume"][0] == PASSED


def test_a_detector_that_cannot_learn_is_not_overfitted(
    data: Path, weights: Path, tmp_path: Path
) -> None:
    asleep = ["SOLVER.BASE_LR", "1e-12"]
    asked = request(data, tmp_path / "run", weights=str(weights), overrides=asleep)
    assert _found(asked, "overfit", dataclasses.replace(QUICK, overfit_steps=6))["overfit"][0] == (
        FAILED
    )


def test_a_resume_that_forgets_the_optimiser_is_found(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = checks.restore

    def forgetful(trainer: Any, content: Any, *rest: Any) -> int:
        start = whole(trainer, content, *rest)
        trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": {}})
        return start

    monkeypatch.setattr(checks, "restore", forgetful)
    found = _found(request(data, tmp_path / "run", weights=str(weights)), "resume")
    assert found["resume"][0] == FAILED
    assert "tensors differ" in found["resume"][1]


def test_a_full_disk_fails(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "disk", lambda cfg, each: Disk((Files(3, "", each),), 2 * each))
    found = _found(request(data, tmp_path / "run", weights=str(weights)), "memory")
    assert found["memory"][0] == FAILED
    assert "not enough disk" in found["memory"][1]


def test_eight_processes_are_planned_and_one_is_measured(
    data: Path, weights: Path, tmp_path: Path
) -> None:
    asked = request(data, tmp_path / "run", weights=str(weights), num_processes=2)
    assert "on 2 × cpu with 1 images each" in _found(asked, "iterations")["iterations"][1]


def test_bad_input_is_one_sentence(data: Path, weights: Path, tmp_path: Path) -> None:
    good = request(data, tmp_path / "run", weights=str(weights))
    with pytest.raises(InputError, match="no check 'speed'; known are keys"):
        _found(good, "speed")
    with pytest.raises(InputError, match="--iterations 2: take 5"):
        _found(good, "", Limits(iterations=2))
    with pytest.raises(InputError, match="more than 1"):
        _found(good, "", Limits(overfit_factor=1.0))
    with pytest.raises(InputError, match=r"none\.pth does not exist"):
        _found(request(data, tmp_path / "run", weights="none.pth"))
    with pytest.raises(InputError, match="without --resume"):
        _found(request(data, tmp_path / "run", weights=str(weights), eval_only=True))


def test_the_tool_says_its_findings_and_ends_with_status_1_if_one_failed(
    data: Path, weights: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "tools/preflight.py", "--config", CONFIG, "--weights", str(weights)]
    for split in ("train", "val"):
        words += [f"--{split}-json", str(data / "instances.json")]
        words += [f"--{split}-images", str(data / "images")]
    words += ["--num-gpus", "0", "--output", str(tmp_path / "run"), "--only", "input"]
    words += [*SMALL, "INPUT.FORMAT", "BGR"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert ended.stdout.startswith("✗  input       ")
    assert ended.stdout.endswith("0 of 1 checks passed, 1 failed, 0 not run\n")
    assert ended.stderr == ""


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs" / "new"
    asked = request(data, output, weights=str(weights), num_processes=2, dry_run=True)
    assert run(asked) == 0
    said = capsys.readouterr().out
    assert not output.parent.exists()
    assert "MAX_ITER: 4" in said
    assert "world     2 × cpu with 1 images each, lr 0.01" in said
    assert "4 iterations of 2 images: 1.33 epochs of 6 images; then 6 images evaluated" in said
    assert "unknown: tools/preflight.py measures it" in said
    assert "at most 2 checkpoints" in said
    row = ResultRow(
        "detection", "p", "d", "val", "bbox/AP", 1.0, "%", "ce", 1, run="runs/old",
        config=hash_of(load_cfg(CONFIG, SMALL)),
        details={"world_size": 2, "device": "cpu", "seconds_per_iteration": 900.0},
    )  # fmt: skip
    append_rows(output.parent / "old" / "results.jsonl", [row])
    run(asked)
    assert "time      1:00:00 at 900 s an iteration, as measured by runs/old" in (
        capsys.readouterr().out
    )
    assert not output.exists()


def test_a_dry_run_plans_for_gpus_that_another_machine_has(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = dataclasses.replace(
        request(data, tmp_path / "new"), dry_run=True, num_gpus=4, overrides=(),
        config="detection/mask_rcnn_R50_FPN_1x.yaml",
    )  # fmt: skip
    assert run(asked) == 0
    said = capsys.readouterr().out
    assert "4 × cuda with 4 images each" in said
    assert "about 12 h on 8 GPUs (SUITE.EXPECTED_HOURS); 24 h on 4" in said
    assert "at most 3 checkpoints of 0.35 GB" in said  # 44 M parameters, weights and momentum
    run(dataclasses.replace(asked, overrides=["SOLVER.REFERENCE_WORLD_SIZE", "8"]))
    said = capsys.readouterr().out
    assert "180000 iterations of 8 images" in said
    assert "scaled by SOLVER.REFERENCE_WORLD_SIZE" in said


@pytest.mark.parametrize(
    ("last", "keep", "period", "milestone", "kept"),
    [
        (100, 0, 10, 0, 10),  # 10 … 90, and the final one
        (100, 2, 10, 0, 3),
        (100, 2, 10, 30, 6),  # 30, 60 and 90 beside the last two, one more while it is written
        (100, 2, 200, 0, 1),
        (100, 2, 0, 0, 1),
    ],
)
def test_checkpoints_on_disk_are_counted(
    last: int, keep: int, period: int, milestone: int, kept: int
) -> None:
    keys = {"SOLVER.MAX_ITER": last, "SUITE.KEEP_LAST": keep, "SOLVER.CHECKPOINT_PERIOD": period}
    keys["SUITE.MILESTONE_PERIOD"] = milestone
    overrides = [text for key, value in keys.items() for text in (key, str(value))]
    assert kept_checkpoints(load_cfg(CONFIG, overrides)) == kept


def test_a_dry_run_draws_no_data_into_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detection import data as catalogue

    monkeypatch.setattr(catalogue, "ROOT", tmp_path)
    shapes = {"TRAIN_IMAGES": 2, "VAL_IMAGES": 2, "SIZE": 64, "SEED": 0}
    drawn = catalogue.open_named("shapes_val", shapes, tmp_path / "scratch")
    assert drawn.json.is_relative_to(tmp_path / "scratch")
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    kept = catalogue.open_named("shapes_val", shapes)
    assert kept.json.is_relative_to(tmp_path / "datasets")
    assert catalogue.open_named("shapes_val", shapes, tmp_path / "scratch").json == kept.json


def test_features_are_found_where_a_c4_detector_keeps_its_last_stage(
    data: Path, tmp_path: Path
) -> None:
    path = write_backbone(tmp_path / "r50.pth", backbone(50), arch="resnet50")
    asked = request(data, tmp_path / "run", weights=str(path))
    c4 = dataclasses.replace(asked, config="detection/mask_rcnn_R50_C4_1x.yaml", overrides=())
    mark, fact = _found(c4, "parity")["parity"]
    assert (mark, "res5" in fact) == (PASSED, True)
    strided = ["MODEL.RESNETS.STRIDE_IN_1X1", "True"]  # every name and shape still matches
    found = _found(dataclasses.replace(c4, overrides=strided), "keys,parity")
    assert [found[name][0] for name in ("keys", "parity")] == [PASSED, FAILED]
