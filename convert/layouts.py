"""The ResNet family: is a subtree of a file a complete ResNet, and which?

The family is what both torchvision's and detectron2's ResNet can hold: an ImageNet stem, four
stages, basic (18, 34) or bottleneck (50, 101, 152) blocks, any number of groups and any width per
group. ``match`` is what ``convert.find`` asks for each subtree; another family is another such
function. Names and shapes in and out, no numbers.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import torch

from convert.names import COUNTER, TO_TORCHVISION
from convert.sources import REFUSALS, reason
from models.resnet import Architecture, ResNet

Shape = tuple[int, ...]

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
STEM_CHANNELS = 64
ANCHORS = {  # one name that identifies each spelling
    "torchvision": "layer1.0.conv1.weight",
    "detectron2": "res2.0.conv1.weight",
    "caffe2": "res2_0_branch2a_w",
    "numbered": "4.0.conv1.weight",
    "transformers": "encoder.stages.0.layers.0.layer.0.convolution.weight",
}
_ARCH = re.compile(
    r"resnet(?P<plain>\d+)|resnext(?P<grouped>\d+)_(?P<groups>\d+)x(?P<width>\d+)d"
    r"|wide_resnet(?P<wide>\d+)_(?P<factor>\d+)",
    re.ASCII,
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One member of the family; ``base_width`` is the width per group at 64 planes."""

    depth: int
    groups: int = 1
    base_width: int = 64

    @property
    def bottleneck(self) -> bool:
        """Whether its blocks are 1×1, 3×3, 1×1 convolutions rather than two 3×3."""
        return self.depth >= 50

    @property
    def arch(self) -> str:
        """Its name, as torchvision and timm write it."""
        if self.groups > 1:
            return f"resnext{self.depth}_{self.groups}x{self.base_width}d"
        if self.base_width != 64:
            return f"wide_resnet{self.depth}_{self.base_width / 64:g}"
        return f"resnet{self.depth}"

    @property
    def spec(self) -> Architecture:
        """The same as ``models.resnet`` takes it."""
        kind, blocks = "bottleneck" if self.bottleneck else "basic", BLOCKS[self.depth]
        return Architecture(kind, blocks, groups=self.groups, base_width=self.base_width)

    @functools.lru_cache  # noqa: B019  # there are few layouts
    def shapes(self) -> Mapping[str, Shape]:
        """Return every backbone tensor's shape by its torchvision name, without batch counters."""
        with torch.device("meta"):
            state = ResNet(self.arch, self.spec, 1).state_dict()
        names = [name for name in state if not name.startswith("fc.") and COUNTER not in name]
        return {name: tuple(state[name].shape) for name in names}


@dataclasses.dataclass(frozen=True)
class Match:
    """A subtree that is a complete backbone; the subtree's names are without its prefix."""

    arch: str
    spelling: str
    tensors: dict[str, str]  # torchvision's name → the subtree's
    counters: tuple[str, ...]  # the subtree's num_batches_tracked, which nothing needs
    values: Mapping[str, Any] | None = None  # tensors, where they are not the subtree's own
    beside: tuple[str, ...] = ()  # patterns of what may lie beside it, as sources.HEADS
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further facts


def match(subtree: Mapping[str, Any]) -> Match | None:
    """Return which complete ResNet a subtree holds, or None if it does not look like one.

    Args:
        subtree: tensors or arrays by name; what else lies in it (heads, other networks) is ignored.

    Raises:
        ValueError: it looks like a ResNet, but is incomplete, misshapen, or of a kind that
            detectron2's ResNet cannot hold; the text says which.
    """
    spelling = next((s for s, anchor in ANCHORS.items() if anchor in subtree), None)
    if spelling is None:
        return None
    if refused := reason(REFUSALS, subtree):
        raise ValueError(f"it has {refused}")
    rename = TO_TORCHVISION[spelling]
    tensors: dict[str, str] = {}
    for name in subtree:
        if name in rename and tensors.setdefault(rename[name], name) != name:
            raise ValueError(f"{name} and {tensors[rename[name]]} are the same tensor")
    counters = tuple(tensors.pop(name) for name in list(tensors) if name.endswith(COUNTER))
    shapes = {known: _shape(name, subtree[name]) for known, name in tensors.items()}
    if spelling == "caffe2":
        for name in [name for name in shapes if name.endswith(".bias")]:  # affine, no statistics
            for statistic in ("running_mean", "running_var"):
                shapes.setdefault(name.replace("bias", statistic), shapes[name])
        if "conv1_b" in subtree:  # the stem's bias, which becomes part of its statistics
            tensors["conv1.bias"] = "conv1_b"
    return Match(infer(shapes).arch, spelling, tensors, counters)


def layout_of(arch: str) -> Layout:
    """Return the layout of a name such as resnet50, resnext101_32x8d or wide_resnet50_2.

    Raises:
        ValueError: the name is of no network of this family.
    """
    if found := _ARCH.fullmatch(arch):
        depth = int(found["plain"] or found["grouped"] or found["wide"])
        if depth in BLOCKS and (found["plain"] or depth >= 50):
            width = int(found["width"] or 64 * int(found["factor"] or 1))
            return Layout(depth, int(found["groups"] or 1), width)
    raise ValueError(f"{arch!r} is no ResNet-18/34/50/101/152, ResNeXt or wide ResNet")


def infer(shapes: Mapping[str, Shape]) -> Layout:
    """Return the layout of a whole backbone: nothing missing, nothing misshapen.

    ``shapes`` has torchvision names; batch counters are ignored.

    Raises:
        ValueError: it is another architecture, incomplete or misshapen; says which and why.
    """
    _check_stem(shapes.get("conv1.weight"))
    places = {tuple(name.split(".")[:2]) for name in shapes if name.startswith("layer")}
    blocks = tuple(sum(stage == f"layer{n}" for stage, _ in places) for n in range(1, 5))
    bottleneck = any(re.fullmatch(r"layer1\.\d+\.conv3\.weight", name) for name in shapes)
    depths = [d for d, b in BLOCKS.items() if b == blocks and (d >= 50) == bottleneck]
    if not depths:
        raise ValueError(
            f"it has {', '.join(str(n) for n in blocks if n)} "
            f"{'bottleneck' if bottleneck else 'basic'} blocks in its stages, which is no "
            "ResNet-18, 34, 50, 101 or 152: tensors are missing or it is another architecture"
        )
    layout = Layout(depths[0])
    width = shapes.get("layer1.0.conv2.weight", (64, 64, 3, 3))
    if bottleneck and len(width) == 4 and width[1] > 0 and width[0] % width[1] == 0:
        layout = Layout(depths[0], width[0] // width[1], width[1])
    compare(shapes, layout)
    return layout


def compare(shapes: Mapping[str, Shape], layout: Layout) -> None:
    """Raise ValueError, naming a tensor, unless ``shapes`` are exactly those of a layout."""
    expected = layout.shapes()
    missing = [name for name in expected if name not in shapes]
    if missing:
        statistics = all("running_" in name for name in missing)
        why = " (no BatchNorm statistics: a GroupNorm network?)" if statistics else ""
        raise ValueError(
            f"{len(missing)} of the {len(expected)} tensors of a {layout.arch} are missing, "
            f"such as {missing[0]}{why}"
        )
    for name, shape in shapes.items():
        if name.endswith(COUNTER):
            continue
        if name not in expected:
            raise ValueError(f"{name} has no place in a {layout.arch}")
        if tuple(shape) != expected[name]:
            raise ValueError(
                f"{name} has shape {_text(shape)}, but a {layout.arch} has {_text(expected[name])}"
            )


def _check_stem(shape: Shape | None) -> None:
    if shape is None:
        raise ValueError("conv1.weight, the stem, is missing")
    if len(shape) == 4 and shape[2:] == (3, 3):
        raise ValueError(
            "it has a CIFAR stem (one 3×3 convolution, stride 1, no max-pool), and detectron2's "
            "ResNet has only the ImageNet stem (7×7, stride 2, max-pool): it cannot hold these "
            "weights; for detection, pretrain with arch resnet18 or resnet50"
        )
    if tuple(shape) != (STEM_CHANNELS, 3, 7, 7):
        wide = len(shape) == 4 and shape[1:] == (3, 7, 7)
        width = f" ({shape[0] / STEM_CHANNELS:g}× width)" if wide else ""
        raise ValueError(
            f"conv1.weight, the stem, has shape {_text(shape)}{width}, but a ResNet has 64×3×7×7"
        )


def _shape(name: str, value: Any) -> Shape:
    if not hasattr(value, "shape"):
        raise ValueError(f"{name} is a {type(value).__name__}, not a tensor")
    if isinstance(value, torch.Tensor) and (value.is_meta or value.layout != torch.strided):
        raise ValueError(f"{name} is a {value.layout} tensor on {value.device}: no numbers")
    return tuple(value.shape)


def _text(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "()"
