"""Proof of a conversion: detectron2's own backbone computes what the source network computes.

Shapes: N images, S side in pixels, C channels of a stage.

The source's features come from ``models.resnet`` with the tensors as they were read; detectron2's
from its ``build_resnet_backbone`` and its own checkpointer, out of the written file, with mean,
std, channel order and stride taken from the facts in that file. So one number per stage covers the
rename, the facts, the file and the way a detector will load it.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from convert.backbone import Backbone
from convert.layouts import BLOCKS, STEM_CHANNELS, Layout, layout_of
from convert.sources import Convention
from core.errors import InputError
from detection import backbones
from models.checkpoint import load_plain
from models.factory import create_model as create_network
from models.resnet import ARCHITECTURES, Architecture, ResNet, create_model

TOLERANCE = 1e-5
FACTS = ("arch", "mean", "std", "channel_order", "stride_in_1x1")
STAGES = ("res2", "res3", "res4", "res5")


@dataclasses.dataclass(frozen=True)
class Parity:
    """What the proof found: per stage max |a − b| / max |a|, and how many tensors arrived."""

    differences: dict[str, float]
    matched: int
    expected: int
    target: str = "detectron2"

    def lines(self) -> list[str]:
        """Return the report, a line each for the tensors and the features."""
        figures = ", ".join(f"{stage} {value:.1e}" for stage, value in self.differences.items())
        return [
            f"matched   {self.matched} of {self.expected} tensors of {self.target}'s backbone",
            f"features  equal to {TOLERANCE:.0e}: relative difference {figures}",
        ]


def prove(
    converted: Mapping[str, Any] | str | Path,
    source_state: Mapping[str, Tensor],
    arch: str,
    convention: Convention | None = None,
) -> Parity:
    """Compare a converted file (or its content) with the network it came from.

    Args:
        converted: path, or the dict that such a file holds.
        source_state: the source's backbone tensors under torchvision names.
        arch: its architecture.
        convention: how images enter the source; by default what the converted file says.

    Raises:
        InputError: a tensor did not arrive, or the features of a stage differ by more than 1e-5.
    """
    if not isinstance(converted, str | Path):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "converted_d2.pth"
            torch.save(dict(converted), path)
            return prove(path, source_state, arch, convention)
    if convention is None:
        convention = convention_of(_facts(Path(converted)))
    reference = source_features(source_state, arch, convention)
    return _check_detectron2(Path(converted), reference)


def proof(backbone: Backbone) -> Callable[[Path], Parity]:
    """Return the check that ``convert.d2.convert`` wants, holding features and no weights."""
    reference = source_features(backbone.state, backbone.arch, backbone.convention)
    return lambda path: _check_detectron2(path, reference)


def proof_of_way_back(backbone: Backbone) -> Callable[[Path], Parity]:
    """The same for ``--to torchvision``: torchvision's own network must compute it."""
    reference = source_features(backbone.state, backbone.arch, backbone.convention)
    return lambda path: _check_torchvision(path, reference)


def backbone_cfg(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config keys that a detector must agree with to hold and feed these weights.

    Keys are detectron2's dotted ones. PIXEL_MEAN and PIXEL_STD are in the order of INPUT.FORMAT,
    as detectron2 wants them; the facts' mean and std are in R, G, B.

    Raises:
        InputError: the architecture is none that detectron2's ResNet can hold.
    """
    try:
        layout = layout_of(facts["arch"])
    except ValueError as error:
        raise InputError(str(error)) from None
    convention = convention_of(facts)
    return {
        "MODEL.RESNETS.DEPTH": layout.depth,
        "MODEL.RESNETS.NUM_GROUPS": layout.groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": layout.base_width,
        "MODEL.RESNETS.STRIDE_IN_1X1": convention.stride_in_1x1,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 256 if layout.bottleneck else 64,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": STEM_CHANNELS,
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.PIXEL_MEAN": list(convention.pixel_mean),
        "MODEL.PIXEL_STD": list(convention.pixel_std),
        "INPUT.FORMAT": convention.channel_order,
    }


def fixed_image() -> Tensor:
    """Return 1×3×64×96 RGB bytes: ramps and stripes, the same on every machine, not symmetric."""
    rows = torch.arange(64).reshape(1, 1, 64, 1)
    columns = torch.arange(96).reshape(1, 1, 1, 96)
    channel = torch.arange(3).reshape(1, 3, 1, 1)
    pattern = rows * (3 + channel) + columns * 2 + rows * columns // 7 + 80 * channel
    return (pattern % 256).to(torch.uint8)


def source_features(
    state: Mapping[str, Tensor], arch: str, convention: Convention
) -> dict[str, Tensor]:
    """Return the source network's maps of the fixed image, N×C×h×w by stage.

    Raises:
        InputError: the state is not that of ``arch``, or a map is not finite.
    """
    if is_network(arch):
        return backbones.own_maps(
            backbones.filled(create_network(arch, 1), state), network_image(convention)
        )
    network = source_network(state, arch, convention.stride_in_1x1)
    mean, std = (_column(values) / 255 for values in (convention.mean, convention.std))
    image = (fixed_image().double() / 255 - mean) / std
    if convention.channel_order == "BGR":
        image = image.flip(1)
    with torch.inference_mode():
        maps = network.forward_stages(image.float())
    for stage, value in maps.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"the source network's {stage} is not finite on an ordinary image")
    return maps


def source_network(state: Mapping[str, Tensor], arch: str, stride_in_1x1: bool = False) -> ResNet:
    """Build the source network around ``state``, in eval mode, sharing its memory.

    Raises:
        InputError: tensors are missing or extra.
    """
    layout = layout_of(arch)
    with torch.device("meta"):
        network = create_model(arch, 1) if arch in ARCHITECTURES else _general(layout)
    result = network.load_state_dict(dict(state), strict=False, assign=True)
    absent = [k for k in result.missing_keys if not k.startswith("fc.") and "num_batches" not in k]
    if absent or result.unexpected_keys:
        raise InputError(f"{arch}: missing {absent}, unexpected {result.unexpected_keys}")
    if stride_in_1x1 and layout.bottleneck:
        for name in ("layer2.0", "layer3.0", "layer4.0"):
            first: Any = network.get_submodule(name)
            first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
    return network.eval()


def detectron2_features(path: Path) -> tuple[dict[str, Tensor], int, int]:
    """Return the maps of detectron2's backbone out of a converted file, and (matched, expected).

    Raises:
        InputError: detectron2 left a tensor of its backbone unfilled.
    """
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import build_resnet_backbone

    facts = _facts(path)
    if is_network(facts["arch"]):
        return _network_features(path, facts)
    settings = backbone_cfg(facts)
    cfg = get_cfg()
    cfg.merge_from_list([item for pair in settings.items() for item in pair])
    cfg.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    with torch.device("meta"):
        backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    backbone.to_empty(device="cpu").eval()
    detector = nn.ModuleDict({"bottom_up": backbone})  # the names that a detector would have
    state = {k: v for k, v in detector.state_dict().items() if "num_batches" not in k}
    for value in state.values():
        value.fill_(torch.nan)
    DetectionCheckpointer(detector).load(str(path))
    unfilled = [key for key, value in state.items() if bool(torch.isnan(value).any())]
    if unfilled:
        raise InputError(
            f"detectron2 matched {len(state) - len(unfilled)} of {len(state)} backbone tensors; "
            f"unfilled is {unfilled[0]}"
        )
    with torch.inference_mode():
        return backbone(_fed(cfg)), len(state), len(state)


def detector_features(detector: nn.Module, cfg: CfgNode) -> dict[str, Tensor]:
    """Return the maps of a whole detector's backbone, fed by its config, N×C×h×w by stage.

    Args:
        detector: on CPU; put into eval mode.
        cfg: its config, of which mean, std and channel order matter here.
    """
    parts: Any = detector.eval()
    if (own := backbones.trunk(detector)) is not None:
        return backbones.own_maps(own, _fed(cfg))
    network = getattr(parts.backbone, "bottom_up", parts.backbone)
    stages = [("stem", network.stem), *zip(network.stage_names, network.stages, strict=True)]
    if "res5" not in network.stage_names:  # C4: it stands in the box head, perhaps before a norm
        blocks = [b for name, b in parts.roi_heads.res5.named_children() if name != "norm"]
        stages.append(("res5", nn.Sequential(*blocks)))
    maps = {}
    with torch.inference_mode():
        x = _fed(cfg)
        for name, stage in stages:
            x = maps[name] = stage(x)
    return {name: value for name, value in maps.items() if name in STAGES}


def is_network(arch: str) -> bool:
    """Whether an architecture is none of the ResNets that detectron2 has itself."""
    try:
        layout_of(arch)
    except ValueError:
        return True
    return False


def network_image(convention: Convention) -> Tensor:
    """Return the fixed image as a network of this convention is fed it."""
    image = (fixed_image().double() - _column(convention.mean)) / _column(convention.std)
    return (image if convention.channel_order == "RGB" else image.flip(1)).float()


def _network_features(path: Path, facts: Mapping[str, Any]) -> tuple[dict[str, Tensor], int, int]:
    """The same of a network of ``models.factory``: through detectron2's checkpointer, if it can."""
    from detectron2.checkpoint import DetectionCheckpointer

    arch, image = facts["arch"], network_image(convention_of(facts))
    tensors = load_plain(path)["model"]
    if not backbones.can_detect(arch):
        network = backbones.filled(create_network(arch, 1), tensors)
        return backbones.own_maps(network, image), len(tensors), len(tensors)
    detector = nn.ModuleDict({"bottom_up": backbones.NetworkBackbone(arch)}).eval()
    state = {k: v for k, v in detector.state_dict().items() if "num_batches" not in k}
    floating = {k: v for k, v in state.items() if v.is_floating_point()}
    for value in floating.values():
        value.fill_(torch.nan)
    DetectionCheckpointer(detector).load(str(path))
    unfilled = [key for key, value in floating.items() if bool(torch.isnan(value).any())]
    unfilled = [key for key in unfilled if key.partition("network.")[2] in tensors]
    if unfilled:
        raise InputError(f"detectron2 left {len(unfilled)} tensors unfilled, such as {unfilled[0]}")
    found: Any = detector["bottom_up"]
    return backbones.own_maps(found.network, image), len(tensors), len(tensors)


def compare(reference: Mapping[str, Tensor], maps: Mapping[str, Tensor]) -> dict[str, float]:
    """Return max |a − b| / max |a| per stage, infinite where shapes differ or b is not finite."""
    differences = {}
    for stage, a in reference.items():
        b = maps.get(stage)
        if b is None or a.shape != b.shape or not bool(torch.isfinite(b).all()):
            differences[stage] = float("inf")
            continue
        difference, scale = float((a - b).abs().max()), float(a.abs().max())
        differences[stage] = difference / scale if scale else difference
    return differences


def _check_detectron2(path: Path, reference: Mapping[str, Tensor]) -> Parity:
    maps, matched, expected = detectron2_features(path)
    return within_tolerance(Parity(compare(reference, maps), matched, expected))


def _check_torchvision(path: Path, reference: Mapping[str, Tensor]) -> Parity:
    from torchvision.models.resnet import BasicBlock, Bottleneck
    from torchvision.models.resnet import ResNet as TorchvisionResNet

    content = load_plain(path)
    facts, state = content["facts"], content["model"]
    spec = _specification(layout_of(facts["arch"]))
    with torch.device("meta"):
        network = TorchvisionResNet(
            BasicBlock if spec.block == "basic" else Bottleneck,
            list(spec.layers),
            groups=spec.groups,
            width_per_group=spec.base_width,
        )
    result = network.load_state_dict(state, strict=False, assign=True)
    absent = [k for k in result.missing_keys if not k.startswith("fc.") and "num_batches" not in k]
    if absent or result.unexpected_keys:
        raise InputError(f"torchvision: missing {absent}, unexpected {result.unexpected_keys}")
    network.eval()
    image = (fixed_image().double() - _column(facts["mean"])) / _column(facts["std"])
    with torch.inference_mode():
        x = network.maxpool(network.relu(network.bn1(network.conv1(image.float()))))
        maps = {}
        for name, stage in zip(STAGES, ("layer1", "layer2", "layer3", "layer4"), strict=True):
            x = maps[name] = getattr(network, stage)(x)
    return within_tolerance(Parity(compare(reference, maps), len(state), len(state), "torchvision"))


def within_tolerance(parity: Parity) -> Parity:
    """Return the comparison; raises InputError that names the first stage beyond TOLERANCE."""
    for stage, difference in parity.differences.items():
        if not difference <= TOLERANCE:
            raise InputError(
                f"the converted weights do not compute the same: {stage} is the first stage to "
                f"differ, by {difference:.1e} where {TOLERANCE:.0e} is allowed"
            )
    return parity


def _facts(path: Path) -> dict[str, Any]:
    content = load_plain(path)
    facts = content.get("facts") if isinstance(content, dict) else None
    if not isinstance(facts, dict) or any(key not in facts for key in FACTS):
        raise InputError(f"{path} does not say its {', '.join(FACTS)}: it is no converted file")
    return facts


def convention_of(facts: Mapping[str, Any]) -> Convention:
    """Return what the facts of a converted file say of its input."""
    (r, g, b), (dr, dg, db) = ([float(v) for v in facts[key]] for key in ("mean", "std"))
    order, stride = facts["channel_order"], bool(facts["stride_in_1x1"])
    return Convention((r, g, b), (dr, dg, db), order, stride)


def _specification(layout: Layout) -> Architecture:
    kind = "bottleneck" if layout.bottleneck else "basic"
    return Architecture(
        kind, BLOCKS[layout.depth], groups=layout.groups, base_width=layout.base_width
    )


def _general(layout: Layout) -> ResNet:
    return ResNet(layout.arch, _specification(layout), 1)


def _fed(cfg: CfgNode) -> Tensor:
    """Return the fixed image as a detector of this config feeds it to its backbone."""
    image = fixed_image().double()
    if cfg.INPUT.FORMAT == "BGR":
        image = image.flip(1)
    image = (image - _column(cfg.MODEL.PIXEL_MEAN)) / _column(cfg.MODEL.PIXEL_STD)
    return image.float()


def _column(values: Any) -> Tensor:
    """Return 1×3×1×1; float64, so that 0…1 and 0…255 arithmetic round to the same float32."""
    return torch.tensor(list(values), dtype=torch.float64).reshape(1, 3, 1, 1)
