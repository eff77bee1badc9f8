"""Weights enter whole or not at all, and only under the convention they were trained with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import InputError
from detection import cfg as configs
from detection import weights as files
from tests.detection_tiny import CONFIG, backbone, write_backbone


@pytest.fixture(scope="module")
def cfg() -> Any:
    cfg = configs.load_cfg(CONFIG)
    configs.set_norms(cfg, "BN")
    return cfg


@pytest.fixture(scope="module")
def shapes(cfg: Any) -> dict[str, tuple[int, ...]]:
    return files.model_shapes(cfg)


def _read(path: Path) -> files.Weights:
    return files.read_weights(path, path.with_name("converted.pth"))


@pytest.mark.parametrize(("depth", "tensors"), [(50, 265), (101, 520)])
def test_the_number_of_backbone_tensors_is_the_known_one(depth: int, tensors: int) -> None:
    cfg = configs.load_cfg(
        "detection/mask_rcnn_R50_FPN_1x.yaml", ["MODEL.RESNETS.DEPTH", str(depth)]
    )
    names = [n for n in files.model_shapes(cfg) if files.backbone_name(n) and "num_b" not in n]
    assert len(names) == tensors


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.bottom_up."])
def test_all_tensors_arrive_under_any_prefix(
    tmp_path: Path, cfg: Any, shapes: dict[str, tuple[int, ...]], prefix: str
) -> None:
    from detectron2.modeling import build_model

    source = backbone()
    path = write_backbone(tmp_path / "w.pth", {prefix + k: v for k, v in source.items()})
    plain = cfg.clone()
    plain.MODEL.DEVICE = "cpu"
    model = build_model(plain)
    assert files.load_into(model, _read(path)) == len(source)
    state = model.state_dict()
    assert all(torch.equal(state[f"backbone.bottom_up.{k}"], v) for k, v in source.items())


def _without(key: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in backbone().items() if k != key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: _without("res4.1.conv2.norm.running_var"), "99 of the 100"),
        (lambda: {"stem.conv1.weight": backbone()["stem.conv1.weight"]}, "1 of the 100"),
        (lambda: backbone() | {"res4.2.conv1.weight": torch.zeros(256, 256, 3, 3)}, "no place"),
        (lambda: backbone() | {"res3.0.conv1.weight": torch.zeros(1)}, "has shape 1, but"),
        (lambda: backbone(50), "architecture"),
    ],
)
def test_a_partial_or_other_backbone_is_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], change: Any, words: str
) -> None:
    path = write_backbone(tmp_path / "w.pth", change())
    with pytest.raises(InputError, match=words) as error:
        files.match(_read(path), shapes)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("facts", "overrides", "word"),
    [
        ({}, ["MODEL.RESNETS.STRIDE_IN_1X1", "True"], "STRIDE_IN_1X1"),
        ({}, ["MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"], "PIXEL_STD"),
        ({}, ["MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]"], "PIXEL_MEAN"),
        ({}, ["INPUT.FORMAT", "BGR"], "PIXEL_MEAN"),  # the numbers stand in the order of FORMAT
        ({"mean": [122.7709, 116.7460, 104.0937]}, [], "PIXEL_MEAN"),  # CLIP's, within 1%
        ({"channel_order": "BGR"}, [], "INPUT.FORMAT"),
        ({"stride_in_1x1": True}, [], "STRIDE_IN_1X1"),
        ({"std": [1.0, 1.0, 1.0]}, [], "PIXEL_STD"),
    ],
)
def test_another_convention_is_refused(
    tmp_path: Path, facts: dict[str, Any], overrides: list[str], word: str
) -> None:
    found = _read(write_backbone(tmp_path / "w.pth", **facts))
    cfg = configs.load_cfg(CONFIG, overrides)
    with pytest.raises(InputError, match=word):
        files.check_convention(found, cfg)
    files.take_convention(cfg, found)
    files.check_convention(found, cfg)


def test_rounding_is_no_other_convention(tmp_path: Path, cfg: Any) -> None:
    mean = [0.485 * 255, 0.456 * 255, 0.406 * 255]
    std = [0.229 * 255, 0.224 * 255, 0.225 * 255]
    for ending in (4, 2):
        facts = {"mean": mean, "std": [round(value, ending) for value in std]}
        files.check_convention(_read(write_backbone(tmp_path / "w.pth", **facts)), cfg)


def test_weights_that_say_nothing_need_someone_to_vouch(tmp_path: Path, cfg: Any) -> None:
    found = _read(write_backbone(tmp_path / "w.pth", mean=None, stride_in_1x1=None))
    with pytest.raises(InputError, match="mean, stride_in_1x1") as error:
        files.check_convention(found, cfg)
    assert "--assume-convention" in str(error.value)
    files.check_convention(found, cfg, assume=True)


def test_a_raw_checkpoint_is_converted_on_the_way(
    tmp_path: Path, cfg: Any, shapes: dict[str, tuple[int, ...]]
) -> None:
    from models.resnet import create_model

    torch.manual_seed(0)
    raw = create_model("resnet18", 5).state_dict()
    torch.save(raw, tmp_path / "raw.pth")
    found = _read(tmp_path / "raw.pth")
    assert found.loadable == tmp_path / "converted.pth"
    assert len(files.match(found, shapes)) == 100
    assert torch.equal(found.tensors["res5.1.conv2.weight"], raw["layer4.1.conv2.weight"])


def test_a_truncated_file_and_code_are_refused(tmp_path: Path) -> None:
    path = write_backbone(tmp_path / "w.pth")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match="truncated"):
        _read(path)
    torch.save({"model": print}, tmp_path / "code.pth")
    with pytest.raises(InputError, match="code"):
        _read(tmp_path / "code.pth")
