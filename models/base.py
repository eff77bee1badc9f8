"""What every network of this suite can be asked, in timm's words.

Shapes: N images, S side in pixels, C channels of a map, D pooled features, K classes.
"""

import dataclasses
import math
from typing import Any

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Map:
    """One map that a network gives on its way, N×C×h×w."""

    name: str
    channels: int
    stride: int  # pixels of the image to one of the map, on each side
    index: int  # its place among all that the network gives


@dataclasses.dataclass(frozen=True)
class Description:
    """What is known of an architecture before any weights are."""

    name: str
    source: str  # "own" (models.resnet), "timm", or "file"
    num_features: int  # channels of the last map
    head_hidden_size: int  # D, the width of ``forward_head(…, pre_logits=True)``
    maps: tuple[
        Map, ...
    ]  # the last one of each stride, fine to coarse; () if there are only vectors
    mean: tuple[float, float, float]  # of RGB in 0…1, as its usual weights were trained
    std: tuple[float, float, float]
    image_size: int  # side in pixels that its usual weights were trained at
    patch: int = 0  # side of a patch in pixels; 0: it has none

    @property
    def kind(self) -> str:
        """``pyramid`` (maps of several strides), ``plain`` (of one stride) or ``vector``."""
        return ("vector", "plain", "pyramid")[min(len(self.maps), 2)]


class Network(nn.Module):
    """The interface. timm's networks have all of it but ``arch`` and ``forward_stages``."""

    arch: str  # the name that it was created by
    num_features: int
    head_hidden_size: int

    def forward_features(self, x: Tensor) -> Any:
        """Map N×3×S×S normalised images to what ``forward_head`` takes."""
        raise NotImplementedError

    def forward_head(self, x: Any, pre_logits: bool = False) -> Tensor:
        """Pool to N×D (``pre_logits``), or go on to logits, N×K."""
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        """Return the last layer, N×D to N×K."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new last layer in place, drawn from torch's global generator."""
        raise NotImplementedError


def stride_of(size: int, side: int) -> int:
    """Return the stride of a map of ``side`` rows of an image of ``size``: exact, or a power of 2.

    A network without padding gives a few rows less than its stride says (147 of 299 at 2).
    """
    return size // side if size % side == 0 else 2 ** round(math.log2(size / side))


def sync_batch_norm(model: nn.Module) -> nn.Module:
    """Return the network with its BatchNorms synchronised over ranks.

    timm's norms hold an activation too, which torch's own conversion would drop.
    """
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return how the names of the classifier's tensors begin: ``("fc.",)``; () without one."""
    classifiers: Any = model.get_classifier()  # type: ignore[operator]
    if not isinstance(classifiers, tuple | list | nn.ModuleList):
        classifiers = [classifiers]
    wanted = {id(module) for module in classifiers if module is not None}
    return tuple(f"{name}." for name, module in model.named_modules() if id(module) in wanted)
