"""Which residual network a set of tensor shapes is, and which tensors it must therefore have.

The family is what both torchvision's and detectron2's ResNet can hold: an ImageNet stem, four
stages, basic (18, 34) or bottleneck (50, 101, 152) blocks, any number of groups and any width per
group. Names are torchvision's. Shapes in, names out: no tensors, no files.
"""

import dataclasses
import re
from collections.abc import Mapping

Shape = tuple[int, ...]

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
STEM_CHANNELS = 64
_NORM = ("weight", "bias", "running_mean", "running_var")
_ARCH = re.compile(r"(?P<kind>resnet|resnext|wide_resnet)(?P<depth>[0-9]+)(?:_(?P<rest>\w+))?")
_RESNEXT = re.compile(r"(?P<groups>[0-9]+)x(?P<width>[0-9]+)d")


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

    def shapes(self) -> dict[str, Shape]:
        """Return every backbone tensor's shape by its torchvision name, without batch counters."""
        shapes: dict[str, Shape] = {}
        _add(shapes, "conv1", "bn1", (STEM_CHANNELS, 3, 7, 7))
        channels = STEM_CHANNELS
        for stage, blocks in enumerate(BLOCKS[self.depth]):
            planes = 64 * 2**stage
            outplanes = planes * 4 if self.bottleneck else planes
            for block in range(blocks):
                place = f"layer{stage + 1}.{block}."
                for number, shape in enumerate(self._block(channels, planes), 1):
                    _add(shapes, f"{place}conv{number}", f"{place}bn{number}", shape)
                if block == 0 and (stage > 0 or channels != outplanes):
                    shortcut = (outplanes, channels, 1, 1)
                    _add(shapes, f"{place}downsample.0", f"{place}downsample.1", shortcut)
                channels = outplanes
        return shapes

    def _block(self, channels: int, planes: int) -> list[Shape]:
        if not self.bottleneck:
            return [(planes, channels, 3, 3), (planes, planes, 3, 3)]
        width = planes * self.base_width // 64 * self.groups
        return [
            (width, channels, 1, 1),
            (width, width // self.groups, 3, 3),
            (planes * 4, width, 1, 1),
        ]


def layout_of(arch: str) -> Layout:
    """Return the layout of a name such as resnet50, resnext101_32x8d or wide_resnet50_2.

    Raises:
        ValueError: the name is of no network of this family.
    """
    found = _ARCH.fullmatch(arch)
    if found and int(found["depth"]) in BLOCKS:
        depth, rest = int(found["depth"]), found["rest"]
        if found["kind"] == "resnet" and rest is None:
            return Layout(depth)
        if found["kind"] == "wide_resnet" and rest and rest.isdecimal() and depth >= 50:
            return Layout(depth, 1, 64 * int(rest))
        grouped = _RESNEXT.fullmatch(rest or "") if found["kind"] == "resnext" else None
        if grouped and depth >= 50:
            return Layout(depth, int(grouped["groups"]), int(grouped["width"]))
    raise ValueError(f"{arch!r} is no ResNet-18/34/50/101/152, ResNeXt or wide ResNet")


def infer(shapes: Mapping[str, Shape]) -> Layout:
    """Return the layout of a whole backbone: nothing missing, nothing misshapen.

    ``shapes`` has torchvision names; batch counters are ignored.

    Raises:
        ValueError: it is another architecture, incomplete or misshapen; says which and why.
    """
    _check_stem(shapes.get("conv1.weight"))
    blocks = _count_blocks(shapes)
    bottleneck = any(re.fullmatch(r"layer1\.\d+\.conv3\.weight", name) for name in shapes)
    depths = [d for d, b in BLOCKS.items() if b == blocks and (d >= 50) == bottleneck]
    if not depths:
        raise ValueError(
            f"it has {', '.join(map(str, blocks))} {'bottleneck' if bottleneck else 'basic'} "
            "blocks in its stages, which is no ResNet-18, 34, 50, 101 or 152: tensors are missing "
            "or it is another architecture"
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
        if name.endswith("num_batches_tracked"):
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
            "its stem is a CIFAR one (one 3×3 convolution, stride 1, no max-pool), and "
            "detectron2's ResNet has only the ImageNet stem (7×7, stride 2, max-pool): it cannot "
            "hold these weights"
        )
    if len(shape) == 4 and shape[1:] == (3, 7, 7) and shape[0] != STEM_CHANNELS:
        raise ValueError(
            f"its stem has {shape[0]} channels ({shape[0] / STEM_CHANNELS:g}× width), and only "
            f"the ordinary {STEM_CHANNELS} are supported"
        )
    if tuple(shape) != (STEM_CHANNELS, 3, 7, 7):
        raise ValueError(
            f"conv1.weight, the stem, has shape {_text(shape)}, but a ResNet has 64×3×7×7"
        )


def _count_blocks(shapes: Mapping[str, Shape]) -> tuple[int, ...]:
    blocks: dict[int, set[int]] = {}
    for name in shapes:
        if found := re.match(r"layer(\d+)\.(\d+)\.", name):
            blocks.setdefault(int(found[1]), set()).add(int(found[2]))
    return tuple(len(blocks[stage]) for stage in sorted(blocks))


def _add(shapes: dict[str, Shape], convolution: str, norm: str, shape: Shape) -> None:
    shapes[f"{convolution}.weight"] = shape
    for statistic in _NORM:
        shapes[f"{norm}.{statistic}"] = (shape[0],)


def _text(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "()"
