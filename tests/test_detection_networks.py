"""Detection runs of any network: what holds of detectron2's ResNet holds of it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from core.errors import InputError
from core.results import read_rows
from core.seeds import torch_seeded
from detection.parity import proof
from detection.preflight import NOT_RUN, PASSED, preflight
from detection.run import run
from models.checkpoint import Facts, save_checkpoint
from tests.detection_tiny import request, write_backbone, write_pair
from tests.test_detection_run import _die, _model
from tests.test_preflight import QUICK

CONFIG = "detection/mask_rcnn_any_shapes.yaml"
ARCHS = ["timm/test_convnext", "timm/test_vit"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_pair(folder)
    return folder


def raw(folder: Path, arch: str) -> Path:
    """Save what ``timm.create_model(…).state_dict()`` is."""
    with torch_seeded(1):
        state = timm.create_model(arch.removeprefix("timm/")).state_dict()
    torch.save(state, folder / "w.pth")
    return folder / "w.pth"


def asked(data: Path, output: Path, arch: str = "", **fields: Any) -> Any:
    return request(data, output, config=CONFIG, arch=arch, seed=7, **fields)


def cut(wanted: Any, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a run die after some iterations."""
    from detectron2.engine import HookBase

    from detection import run as running

    class Stop(HookBase):
        def after_step(self) -> None:
            if self.trainer.iter + 1 == after:
                _die()

    original = running.add_hooks

    def with_stop(trainer: Any, *rest: Any) -> None:
        original(trainer, *rest)
        trainer.register_hooks([Stop()])

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(running, "add_hooks", with_stop)
        run(wanted)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_run_resumes_bit_exactly_and_its_detector_is_evaluated_alone(
    data: Path, tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = str(raw(tmp_path, arch))
    rate = ["MODEL.NETWORK.DROP_PATH", "0.2", "SOLVER.LAYER_DECAY", "0.8"]
    wanted = asked(data, tmp_path / "whole", arch, weights=weights, overrides=rate)
    assert run(wanted) == 0
    cut(dataclasses.replace(wanted, output=str(tmp_path / "cut")), 3, monkeypatch)
    again = dataclasses.replace(wanted, output=str(tmp_path / "cut"), weights="", resume=True)
    assert run(again) == 0
    one, other = _model(tmp_path / "whole"), _model(tmp_path / "cut")
    assert [key for key in one if not torch.equal(one[key], other[key])] == []

    rows = read_rows(tmp_path / "whole/results.jsonl")
    short = arch.removeprefix("timm/")
    assert {row.init for row in rows} == {f"w_{short}"}
    assert {row.details["arch"] for row in rows} == {arch}
    detector = str(tmp_path / "whole/model_final.pth")
    alone = asked(data, tmp_path / "alone", weights=detector, eval_only=True, overrides=rate)
    assert run(alone) == 0
    evaluated = read_rows(tmp_path / "alone/results.jsonl")
    assert [(r.metric, r.value, r.init) for r in evaluated] == [
        (r.metric, r.value, r.init) for r in rows
    ]


def test_two_ranks_share_the_statistics_of_the_networks_own_norms(
    data: Path, tmp_path: Path
) -> None:
    weights = str(raw(tmp_path, "timm/test_efficientnet"))
    arch = "timm/test_efficientnet"
    assert run(asked(data, tmp_path / "r", arch, weights=weights, num_processes=2)) == 0
    rows = read_rows(tmp_path / "r/results.jsonl")
    assert (rows[0].details["world_size"], rows[0].details["bn"]) == (2, "naiveSyncBN")


def test_bf16_and_channels_last_train_too(data: Path, tmp_path: Path) -> None:
    keys = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16", "SOLVER.MAX_ITER", "2"]
    keys += ["SUITE.CHANNELS_LAST", "True", "SOLVER.STEPS", "()"]
    assert run(asked(data, tmp_path / "r", "timm/test_vit", overrides=keys)) == 0
    rows = read_rows(tmp_path / "r/results.jsonl")
    assert (rows[0].init, rows[0].weights) == ("random_test_vit", "")


def test_a_preflight_passes_and_has_no_check_of_a_resnets_stem(data: Path, tmp_path: Path) -> None:
    weights = str(raw(tmp_path, "timm/test_convnext"))
    limits = dataclasses.replace(QUICK, overfit_factor=1.1)
    wanted = asked(data, tmp_path / "run", "timm/test_convnext", weights=weights)
    marks = {found.name: found.mark for found in preflight(wanted, limits, [])}
    assert marks.pop("stem") == NOT_RUN
    assert set(marks.values()) == {PASSED}
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_ours_needs_no_arch_and_keeps_its_input(data: Path, tmp_path: Path) -> None:
    with torch_seeded(1):
        state = timm.create_model("test_vit", num_classes=3).state_dict()
    facts = Facts("timm/test_vit", 3, "ce", 2, 1, "tiny", 32, (0.5, 0.4, 0.3), (0.25, 0.25, 0.25))
    save_checkpoint(tmp_path / "epoch_0002.pth", state, facts)
    keys = ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"]
    weights = str(tmp_path / "epoch_0002.pth")
    assert run(asked(data, tmp_path / "r", weights=weights, overrides=keys)) == 0
    row = read_rows(tmp_path / "r/results.jsonl")[0]
    assert (row.init, row.epoch) == ("ce_test_vit", 2)
    assert row.details["mean"] == pytest.approx([127.5, 102.0, 76.5])


def test_detectron2s_resnet_weights_enter_under_torchvisions_names(
    data: Path, tmp_path: Path
) -> None:
    keys = ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"]
    weights = write_backbone(tmp_path / "ce_d2.pth")
    assert run(asked(data, tmp_path / "r", weights=str(weights), overrides=keys)) == 0
    assert read_rows(tmp_path / "r/results.jsonl")[0].details["arch"] == "resnet18"
    msra = write_backbone(tmp_path / "msra_d2.pth", stride_in_1x1=True)
    with pytest.raises(InputError, match="strides in the 1×1"):
        run(asked(data, tmp_path / "other", weights=str(msra)))


def test_the_proof_of_a_conversion_finds_a_changed_tensor_and_a_lost_one(tmp_path: Path) -> None:
    from convert.backbone import read_backbone
    from convert.d2 import convert

    path = raw(tmp_path, "timm/test_vit")
    backbone = read_backbone(path, arch="timm/test_vit")
    written = convert(path, tmp_path / "w_d2.pth", arch="timm/test_vit", prove=proof).output
    content = torch.load(written, weights_only=True)
    check = proof(backbone)
    check(written)
    content["model"]["blocks.0.mlp.fc1.weight"][0] *= 2
    torch.save(content, written)
    with pytest.raises(InputError, match=r"do not compute the same: blocks\.\d+ is the first"):
        check(written)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"arch": "timm/test_vi"}, "did you mean 'timm/test_vit'"),
        ({"arch": "timm/hiera_tiny_224"}, "takes no images of 224×320 pixels"),
        ({}, "MODEL.NETWORK.ARCH is empty: give --arch"),
        ({"config": "detection/mask_rcnn_R18_FPN_shapes.yaml", "arch": "timm/test_vit"},
         "mask_rcnn_R18_FPN_shapes has detectron2's ResNet; a protocol for any backbone is"),
        ({"arch": "timm/test_convnext", "weights": "w.pth"}, "cannot read it as timm/test_conv"),
        ({"config": "detection/mask_rcnn_R18_FPN_shapes.yaml", "weights": "own.pth"},
         "own.pth is a timm/test_vit, and mask_rcnn_R18_FPN_shapes.* has detectron2's ResNet"),
        ({"arch": "timm/test_vit2", "weights": "own.pth"}, "says that it is a timm/test_vit, not"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path, fields: dict[str, str], sentence: str
) -> None:
    path = raw(tmp_path, "timm/test_vit")
    grey = (0.5, 0.5, 0.5)
    facts = Facts("timm/test_vit", 1000, "ce", 2, 1, "tiny", 32, grey, grey)
    save_checkpoint(tmp_path / "own.pth", torch.load(path, weights_only=True), facts)
    if "weights" in fields:
        fields = fields | {"weights": str(tmp_path / fields["weights"])}
    wanted = request(data, tmp_path / "run", **{"config": CONFIG, "seed": 7, **fields})
    with pytest.raises(InputError, match=sentence):
        run(wanted)
    assert not (tmp_path / "run").exists()
