"""Batch and number of processes: the scaling rule is applied, said and recorded in the name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from detection.formats import flips
from detection.job import Job, prepare
from tests.detection_tiny import request, write_pair

NAME = "mask_rcnn_R50_FPN_1x"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_pair(folder)
    return folder


def _prepared(data: Path, scratch: Path, gpus: int, *overrides: str, **fields: Any) -> Job:
    asked = dataclasses.replace(
        request(data, scratch / "run", **fields), num_gpus=gpus, dry_run=True,
        config=f"detection/{NAME}.yaml", overrides=overrides,
    )  # fmt: skip
    return prepare(asked, scratch)


def test_the_scaling_rule_is_said_and_another_batch_has_another_name(
    data: Path, tmp_path: Path
) -> None:
    rule = ("SOLVER.REFERENCE_WORLD_SIZE", "8")
    plain = _prepared(data, tmp_path, 8)
    two, four = (_prepared(data, tmp_path, gpus, *rule) for gpus in (2, 4))
    assert (plain.identity["protocol"], plain.details["ims_per_batch"]) == (NAME, 16)
    assert (two.details["ims_per_batch"], two.details["max_iter"]) == (4, 360_000)
    assert two.details["base_lr"] == pytest.approx(0.005)
    said = "16 → 4 images a batch, lr 0.02 → 0.005, 90000 → 360000 iterations"
    assert said in " ".join(two.notes)
    names = {job.identity["protocol"] for job in (plain, two, four)}
    hashes = {job.identity["config"] for job in (plain, two, four)}
    assert (len(names), len(hashes)) == (3, 3)
    assert two.details["overrides"]["SOLVER.IMS_PER_BATCH"] == 4
    with pytest.raises(InputError, match="REFERENCE_WORLD_SIZE 3 does not divide"):
        _prepared(data, tmp_path, 2, "SOLVER.REFERENCE_WORLD_SIZE", "3")


def test_a_scaled_config_reads_back_as_what_was_run(data: Path, tmp_path: Path) -> None:
    scaled = _prepared(data, tmp_path, 2, "SOLVER.REFERENCE_WORLD_SIZE", "8")
    saved = tmp_path / "config.yaml"
    saved.write_text(scaled.declared)
    asked = dataclasses.replace(
        request(data, tmp_path / "run"), num_gpus=2, dry_run=True, config=str(saved), overrides=()
    )
    again = prepare(asked, tmp_path)
    for key in ("protocol", "config"):
        assert again.identity[key] == scaled.identity[key]
    assert again.details["max_iter"] == scaled.details["max_iter"]


def test_other_annotations_are_other_data_whatever_their_name(data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "instances.json").read_text())
    fewer = data / "instances_few.json"
    fewer.write_text(json.dumps(content | {"annotations": content["annotations"][:8]}))
    plain = _prepared(data, tmp_path, 8).identity
    (copy := data / "copy.json").write_bytes((data / "instances.json").read_bytes())
    assert _prepared(data, tmp_path, 8, train_json=str(copy)).identity == plain
    found = {plain["data"]}
    for split in ("train_json", "val_json"):
        other = _prepared(data, tmp_path, 8, **{split: str(fewer)}).identity
        assert {**other, "data": plain["data"]} == plain
        found.add(other["data"])
    assert len(found) == 3


def test_a_machine_that_is_slower_than_the_first_may_find_the_folder_begun(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    two = {"num_machines": 2, "dist_url": "tcp://first:29500"}
    assert _prepared(data, tmp_path, 8, machine_rank=1, **two).mode == "train"
    with pytest.raises(InputError, match="not empty"):
        _prepared(data, tmp_path, 8, machine_rank=0, **two)


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["nose", "left_eye", "right_eye"], [("left_eye", "right_eye")]),
        (["hip_left", "hip_right"], [("hip_left", "hip_right")]),
        (["R_eye", "L_eye", "L_F_paw", "R_F_paw"], [("R_eye", "L_eye"), ("L_F_paw", "R_F_paw")]),
        (["eye r", "eye l", "tail"], [("eye r", "eye l")]),
        (["EyeLeft", "EyeRight", "LEFT HIP", "RIGHT HIP"],
         [("EyeLeft", "EyeRight"), ("LEFT HIP", "RIGHT HIP")]),
        (["elbow", "rear", "trail", "left_ear"], []),
    ],
)  # fmt: skip
def test_a_mirror_exchanges_left_and_right_however_they_are_written(
    names: list[str], pairs: list[tuple[str, str]]
) -> None:
    assert flips(names) == pairs


def test_keypoints_that_cannot_be_judged_or_mirrored_are_refused(tmp_path: Path) -> None:
    def job(names: list[str], sigmas: int, *more: str, **fields: Any) -> Job:
        folder = tmp_path / "_".join(names)
        path = folder / "instances.json"
        if not path.exists():
            write_pair(folder)
            content = json.loads(path.read_text())
            content["categories"] = [{"id": 3, "name": "square", "keypoints": names}]
            objects = [a for a in content["annotations"] if a["category_id"] == 3]
            for entry in objects:
                entry |= {"keypoints": [1, 1, 2] * len(names), "num_keypoints": len(names)}
            path.write_text(json.dumps(content | {"annotations": objects}))
        keys = ["MODEL.KEYPOINT_ON", "True", "TEST.KEYPOINT_OKS_SIGMAS", str([0.1] * sigmas)]
        return _prepared(folder, tmp_path, 8, *keys, *more, **fields)

    numbered = [str(n) for n in range(17)]
    assert job(["hip_left", "hip_right"], 2).cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 2
    for names, sigmas in ((["a", "b", "c"], 2), (["a", "b", "c"], 0), (numbered, 3)):
        with pytest.raises(InputError, match=f"{len(names)} keypoints, but TEST.KEYPOINT_OKS"):
            job(names, sigmas)
    assert "if they should not, set INPUT.RANDOM_FLIP none" in " ".join(job(numbered, 0).notes)
    with pytest.raises(InputError, match="'hip_left' has no 'hip_right'"):
        job(["hip_left", "tail"], 2)
    other = {"val_json": str(tmp_path / "hip_left_hip_right" / "instances.json")}
    other["val_images"] = str(tmp_path / "hip_left_hip_right" / "images")
    with pytest.raises(InputError, match="name different keypoints"):
        job(["hip_right", "hip_left"], 2, **other)
    unflipped = job(["hip_left", "tail"], 2, "INPUT.RANDOM_FLIP", "none")
    assert "RANDOM_FLIP" not in " ".join(unflipped.notes)


@pytest.mark.parametrize("name", ["mask_rcnn_R50_FPN_1x", "mask_rcnn_R50_C4_1x"])
def test_one_gpu_with_a_small_batch_is_another_protocol_and_says_so(
    data: Path, tmp_path: Path, name: str
) -> None:
    def said(gpus: int, *overrides: str) -> str:
        asked = dataclasses.replace(
            request(data, tmp_path / "run"), num_gpus=gpus, dry_run=True,
            config=f"detection/{name}.yaml", overrides=overrides,
        )  # fmt: skip
        return " ".join(prepare(asked, tmp_path).notes)

    small = ("SOLVER.IMS_PER_BATCH", "2")
    assert "statistics of 2 images on one process, where the protocol has 16" in said(1, *small)
    assert "one GPU sees all 16 images" in said(1)
    assert "another protocol" not in said(1) + said(8)
