"""Residual networks with torchvision's key names; ImageNet and CIFAR stems; features and head.

Shapes: N images, S side in pixels, D channels of the last stage, K classes.
"""

import dataclasses
import difflib
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from core.errors import InputError
from models.base import Network


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The numbers that make one network of the family."""

    block: str  # a key of BLOCKS
    layers: tuple[int, ...]  # blocks per stage
    stem: str = "imagenet"  # "imagenet": 7×7/2 and max-pool/2; "cifar": 3×3/1, no pool
    width: int = 64  # planes of the first stage; doubles with each further one
    stem_width: int = 0  # channels after the stem; 0 means ``width``
    groups: int = 1
    base_width: int = 64  # ResNeXt: width per group at 64 planes

    @property
    def num_features(self) -> int:
        """D, the channels of the last stage."""
        return self.channels(len(self.layers) - 1)

    def channels(self, stage: int) -> int:
        """Return the channels of the map after a stage, counted from 0."""
        return self.width * 2**stage * BLOCKS[self.block].expansion


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice, as in Wide Residual Networks (arXiv 1605.07146, figure 1)."""

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(activated)
        out = self.conv1(activated)
        return identity + self.conv2(self.relu(self.bn2(out)))


BLOCKS: dict[str, type[Any]] = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
    "preactivation": PreActivationBlock,
}

ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture("basic", (2, 2, 2, 2)),
    "resnet34": Architecture("basic", (3, 4, 6, 3)),
    "resnet50": Architecture("bottleneck", (3, 4, 6, 3)),
    "resnet101": Architecture("bottleneck", (3, 4, 23, 3)),
    "resnet152": Architecture("bottleneck", (3, 8, 36, 3)),
    "resnext50_32x4d": Architecture("bottleneck", (3, 4, 6, 3), groups=32, base_width=4),
    "resnext101_32x8d": Architecture("bottleneck", (3, 4, 23, 3), groups=32, base_width=8),
    "resnext101_64x4d": Architecture("bottleneck", (3, 4, 23, 3), groups=64, base_width=4),
    "resnext152_32x8d": Architecture("bottleneck", (3, 8, 36, 3), groups=32, base_width=8),
    "resnet18_cifar": Architecture("basic", (2, 2, 2, 2), "cifar"),
    "resnet34_cifar": Architecture("basic", (3, 4, 6, 3), "cifar"),
    "resnet50_cifar": Architecture("bottleneck", (3, 4, 6, 3), "cifar"),
    "resnet18_cifar_w16": Architecture("basic", (2, 2, 2, 2), "cifar", 16),
    "resnet18_cifar_w32": Architecture("basic", (2, 2, 2, 2), "cifar", 32),
    # the released CTC code's networks: three stages, D = 512 and 256 at 32×32
    "resnext32_16x4d": Architecture(
        "bottleneck", (5, 5, 5), "cifar", 32, stem_width=32, groups=16, base_width=4
    ),
    "wrn_28_4": Architecture("preactivation", (4, 4, 4), "cifar", 64, stem_width=16),
}


class ResNet(Network):
    """A residual network that gives features and logits by separate calls.

    Keys of the four-stage networks equal torchvision's, so that their weights are
    interchangeable. Weights start as torchvision's do: He initialisation by fan-out
    (arXiv 1512.03385 by way of 1502.01852), BatchNorm at weight 1 and bias 0.
    """

    def __init__(self, arch: str, spec: Architecture, num_classes: int) -> None:
        super().__init__()
        self.arch = arch
        self.num_features = self.head_hidden_size = spec.num_features
        self.num_stages = len(spec.layers)
        channels = spec.stem_width or spec.width
        if spec.stem == "imagenet":
            self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, 2, 1)
        else:
            self.conv1 = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
            self.maxpool = nn.Identity()
        preactivation = spec.block == "preactivation"
        # a pre-activation network has its only bare norm at the end
        self.bn1 = nn.BatchNorm2d(spec.num_features if preactivation else channels)
        self.preactivation = preactivation
        self.relu = nn.ReLU(inplace=True)
        for number, blocks in enumerate(spec.layers):
            planes = spec.width * 2**number
            stage, channels = _make_stage(spec, channels, planes, blocks, 1 if number == 0 else 2)
            self.add_module(f"layer{number + 1}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.num_features, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def zero_init_residual(self) -> None:
        """Start every residual branch at zero: the weight of its last BatchNorm becomes 0.

        Each block is the identity at first, so that deep networks bear a high rate with a short
        warm-up (arXiv 1706.02677, section 5.1). A pre-activation branch ends in a convolution,
        which is what becomes 0 there.
        """
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, PreActivationBlock):
                nn.init.zeros_(module.conv2.weight)

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """Map N×3×S×S images to the maps after each stage, ``{"res2": N×C×h×w, …}``.

        The names are detectron2's. Of a pre-activation network the last map is normalised.
        """
        x = self.conv1(x)
        if not self.preactivation:
            x = self.relu(self.bn1(x))
        x = self.maxpool(x)
        maps = {}
        for number in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{number}")(x)
            if self.preactivation and number == self.num_stages:
                x = self.relu(self.bn1(x))
            maps[f"res{number + 1}"] = x
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Map N×3×S×S normalised images to the last stage's map, N×D×h×w."""
        return self.forward_stages(x)[f"res{self.num_stages + 1}"]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool an N×D×h×w map to N×D (``pre_logits``), or go on to logits, N×K."""
        pooled = torch.flatten(self.avgpool(features), 1)
        return pooled if pre_logits else self.fc(pooled)

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new last layer in place, drawn as torch draws linear layers."""
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×S×S normalised images to logits, N×K."""
        return self.forward_head(self.forward_features(x))


def create_model(arch: str, num_classes: int) -> ResNet:
    """Build a randomly initialised network by its name.

    Raises:
        InputError: unknown ``arch``; the sentence names the nearest.
    """
    return ResNet(arch, find_architecture(arch), num_classes)


def find_architecture(arch: str) -> Architecture:
    """Return what a name stands for.

    Raises:
        InputError: unknown ``arch``; the sentence names the nearest.
    """
    if arch not in ARCHITECTURES:
        close = difflib.get_close_matches(arch, ARCHITECTURES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(ARCHITECTURES)}"
        raise InputError(f"arch {arch!r} is unknown; {hint}")
    return ARCHITECTURES[arch]


def _make_stage(
    spec: Architecture, inplanes: int, planes: int, blocks: int, stride: int
) -> tuple[nn.Sequential, int]:
    block = BLOCKS[spec.block]
    outplanes = planes * block.expansion
    downsample: nn.Module | None = None
    if stride != 1 or inplanes != outplanes:
        convolution = nn.Conv2d(inplanes, outplanes, 1, stride, bias=False)
        if spec.block == "preactivation":
            downsample = convolution
        else:
            downsample = nn.Sequential(convolution, nn.BatchNorm2d(outplanes))
    options = {"groups": spec.groups, "base_width": spec.base_width}
    layers = [block(inplanes, planes, stride, downsample, **options)]
    layers += [block(outplanes, planes, **options) for _ in range(blocks - 1)]
    return nn.Sequential(*layers), outplanes
