"""detectron2's backbone, fed from a converted file, computes torchvision's features; else an error.

Shapes: N images, C channels of a stage; the fixed image is 1×3×64×96.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from convert import layouts, names
from convert.backbone import Backbone
from convert.sources import AUTHOR, MSRA, TORCHVISION, Convention
from core.errors import InputError
from detection import parity

State = dict[str, Tensor]
UNSAID: tuple[Any, ...] = ("", "", "", "", (), (), 0, {})  # what a proof does not need to know


def network(arch: str) -> nn.Module:
    """A torchvision network in eval mode whose BatchNorms all do something."""
    with torch.device("meta"):
        model = getattr(torchvision.models, arch)(num_classes=3)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(5)
    for key, value in model.state_dict().items():
        if value.dim() == 4:
            value.normal_(0, math.sqrt(2 / value[:, 0].numel()), generator=generator)
        elif key.endswith("num_batches_tracked"):
            value.zero_()
        elif key.endswith(("running_var", "weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        else:
            value.normal_(0, 0.2, generator=generator)
    return model.eval()


def backbone_state(model: nn.Module) -> State:
    return {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith("fc.") and "num_batches" not in key
    }


def torchvision_features(model: Any, image: Tensor) -> State:
    with torch.no_grad():
        x = model.maxpool(model.relu(model.bn1(model.conv1(image))))
        maps = {}
        for number in range(1, 5):
            x = maps[f"res{number + 1}"] = getattr(model, f"layer{number}")(x)
    return maps


def content(state: State, arch: str, convention: Convention = TORCHVISION) -> dict[str, Any]:
    facts = {
        "arch": arch,
        "mean": list(convention.mean),
        "std": list(convention.std),
        "channel_order": convention.channel_order,
        "stride_in_1x1": convention.stride_in_1x1,
    }
    model = {names.to_detectron2(key): value for key, value in state.items()}
    return {"model": model, "__author__": AUTHOR, "matching_heuristics": True, "facts": facts}


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return network("resnet18")


@pytest.fixture(scope="module")
def large() -> nn.Module:
    return network("resnet50")


@pytest.fixture(scope="module")
def check(small: nn.Module) -> Callable[[Path], parity.Parity]:
    backbone = Backbone("resnet18", backbone_state(small), TORCHVISION, *UNSAID)
    return parity.proof(backbone)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_detectron2_computes_torchvisions_features(
    arch: str, tmp_path: Path, large: nn.Module
) -> None:
    """Reference: torchvision's module and its own normalisation of 0…1, in place of our network."""
    model = large if arch == "resnet50" else network(arch)
    image = torchvision.transforms.functional.normalize(
        parity.fixed_image().float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    reference = torchvision_features(model, image)
    state = backbone_state(model)
    torch.save(content(state, arch), tmp_path / "c_d2.pth")
    maps, matched, expected = parity.detectron2_features(tmp_path / "c_d2.pth")
    assert matched == expected == len(layouts.layout_of(arch).shapes()) == len(state)
    for stage, value in reference.items():
        assert float((maps[stage] - value).abs().max() / value.abs().max()) < 1e-5


def swap(content: dict[str, Any]) -> None:
    model = content["model"]
    a, b = "res2.0.conv2.weight", "res2.1.conv2.weight"
    model[a], model[b] = model[b], model[a]


def transpose(content: dict[str, Any]) -> None:
    model = content["model"]
    model["stem.conv1.weight"] = model["stem.conv1.weight"].transpose(2, 3).contiguous()


def statistics(content: dict[str, Any]) -> None:
    model = content["model"]
    key = "res5.1.conv2.norm.running_var"
    model[key] = model[key] * (1 + 1e-3)


def fact(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["facts"].update(values)


@pytest.mark.parametrize(
    "harm",
    [
        swap,
        transpose,
        statistics,
        fact(channel_order="BGR"),
        fact(std=[1.0, 1.0, 1.0]),
        fact(std=[57.375, 57.12, 58.395]),
        fact(mean=[103.53, 116.28, 123.675]),
    ],
)
def test_a_wrong_tensor_or_fact_fails_the_proof(
    small: nn.Module, check: Any, harm: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    converted = content(backbone_state(small), "resnet18")
    harm(converted)
    torch.save(converted, tmp_path / "harmed_d2.pth")
    with pytest.raises(InputError, match="do not compute the same: res"):
        check(tmp_path / "harmed_d2.pth")


def test_an_unharmed_file_passes_the_proof(small: nn.Module) -> None:
    state = backbone_state(small)
    report = parity.prove(content(state, "resnet18"), state, "resnet18")
    assert (report.matched, report.expected) == (100, 100)
    assert list(report.differences) == ["res2", "res3", "res4", "res5"]
    assert max(report.differences.values()) < 1e-5
    assert "100 of 100" in report.lines()[0]


@pytest.mark.parametrize(
    ("key", "instead"),
    [("stem.conv1.weight", None), ("res5.1.conv2.norm.running_mean", torch.zeros(7))],
)
def test_a_tensor_that_detectron2_would_skip_fails_the_proof(
    small: nn.Module, check: Any, key: str, instead: Tensor | None, tmp_path: Path
) -> None:
    """Whether it is absent or misshapen: detectron2 itself only warns."""
    converted = content(backbone_state(small), "resnet18")
    del converted["model"][key]
    if instead is not None:
        converted["model"][key] = instead
    torch.save(converted, tmp_path / "harmed_d2.pth")
    with pytest.raises(InputError, match=f"matched 99 of 100.*{key}"):
        check(tmp_path / "harmed_d2.pth")


def test_no_match_at_all_fails_the_proof(small: nn.Module, check: Any, tmp_path: Path) -> None:
    converted = {**content({}, "resnet18"), "model": {"x.y": torch.ones(2)}}
    torch.save(converted, tmp_path / "harmed_d2.pth")
    with pytest.raises(InputError, match="matched 0 of 100"):
        check(tmp_path / "harmed_d2.pth")


def test_the_stride_convention_is_part_of_the_proof(large: nn.Module, tmp_path: Path) -> None:
    """A ResNet-50 fits either way; only the features tell (test_d2 has one that passes)."""
    state = backbone_state(large)
    backbone = Backbone("resnet50", state, MSRA, *UNSAID)
    check = parity.proof(backbone)
    converted = content(state, "resnet50", MSRA)
    converted["facts"]["stride_in_1x1"] = False
    torch.save(converted, tmp_path / "msra_d2.pth")
    with pytest.raises(InputError, match="res3 is the first"):
        check(tmp_path / "msra_d2.pth")


def test_a_source_that_overflows_is_refused(small: nn.Module) -> None:
    state = backbone_state(small)
    state["layer2.0.bn1.weight"] = torch.full_like(state["layer2.0.bn1.weight"], 3e38)
    with pytest.raises(InputError, match="not finite on an ordinary image"):
        parity.source_features(state, "resnet18", TORCHVISION)


def test_the_source_network_copies_no_weight(small: nn.Module) -> None:
    state = backbone_state(small)
    built = parity.source_network(state, "resnet18").state_dict()
    assert all(built[key].data_ptr() == value.data_ptr() for key, value in state.items())


@pytest.mark.parametrize("change", [{"layer1.0.conv1.weight": None}, {"extra": torch.ones(1)}])
def test_the_source_network_takes_its_own_tensors_only(small: nn.Module, change: Any) -> None:
    state = {k: v for k, v in {**backbone_state(small), **change}.items() if v is not None}
    with pytest.raises(InputError, match=r"missing .* unexpected"):
        parity.source_network(state, "resnet18")


@pytest.mark.parametrize(
    "arch",
    ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
     "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2"],
)  # fmt: skip
def test_the_config_keys_build_a_backbone_of_exactly_these_shapes(arch: str) -> None:
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import build_resnet_backbone

    facts = content({}, arch)["facts"]
    cfg = get_cfg()
    cfg.merge_from_list([part for pair in parity.backbone_cfg(facts).items() for part in pair])
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    with torch.device("meta"):
        theirs = build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()
    shapes = {names.to_torchvision(key): tuple(value.shape) for key, value in theirs.items()}
    assert layouts.infer(shapes).arch == arch


def test_the_config_keys_carry_the_convention_in_channel_order() -> None:
    keys = parity.backbone_cfg(content({}, "resnet50", MSRA)["facts"])
    assert keys["INPUT.FORMAT"] == "BGR"
    assert keys["MODEL.PIXEL_MEAN"] == [103.53, 116.28, 123.675]
    assert keys["MODEL.PIXEL_STD"] == [1.0, 1.0, 1.0]
    assert keys["MODEL.RESNETS.STRIDE_IN_1X1"] is True
    with pytest.raises(InputError, match="resnet18_cifar"):
        parity.backbone_cfg(content({}, "resnet18_cifar")["facts"])


def test_a_whole_detector_takes_every_tensor(small: nn.Module, tmp_path: Path) -> None:
    """The file is meant for a detector, where the backbone lies under backbone.bottom_up."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    converted = content(backbone_state(small), "resnet18")
    torch.save(converted, tmp_path / "r18_d2.pth")
    cfg = get_cfg()
    settings = parity.backbone_cfg(converted["facts"])
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.DEVICE = "cpu"
    detector = build_model(cfg)
    DetectionCheckpointer(detector).load(str(tmp_path / "r18_d2.pth"))
    loaded = detector.backbone.bottom_up.state_dict()
    for key, value in converted["model"].items():
        assert torch.equal(loaded[key], value), key


def test_a_file_that_does_not_say_its_convention_cannot_be_proved(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "silent.pth")
    with pytest.raises(InputError, match="does not say its arch, mean, std"):
        parity.prove(tmp_path / "silent.pth", {}, "resnet18")


def test_what_is_missing_misshapen_or_not_finite_differs_infinitely() -> None:
    a = {"res2": torch.ones(1, 2), "res3": torch.ones(1, 2), "res4": torch.ones(1, 2)}
    b = {"res3": torch.ones(1, 3), "res4": torch.tensor([[1.0, torch.nan]])}
    assert set(parity.compare(a, b).values()) == {math.inf}
    zero, one = {"res2": torch.zeros(3)}, {"res2": torch.full((3,), 0.5)}
    assert parity.compare(zero, one) == {"res2": 0.5}
    assert parity.compare(one, zero) == {"res2": 1.0}
