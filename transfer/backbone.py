"""A pretrained network as a transfer takes it: the network, its input, and its metadata.

Shapes: C_out×C_in×k×k convolution weights.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck

from core.errors import InputError
from core.seeds import torch_seeded
from models.base import Network, head_prefixes
from models.checkpoint import Checkpoint
from models.factory import create_model
from models.features import InputSpec
from models.resnet import ARCHITECTURES, Architecture, ResNet


@dataclasses.dataclass(frozen=True)
class Backbone:
    """What is evaluated. Its network has a head of one class, which nothing uses."""

    model: Network
    inputs: InputSpec
    init: str  # "ctc", "ce", "random", "moco", …: how result rows name it
    seed: int  # of the pretraining; 0 where unknown
    epoch: int | None
    sha256: str  # of the weights file
    path: str
    dataset: str = ""  # pretrained on


def from_checkpoint(checkpoint: Checkpoint, sha256: str, init: str = "") -> Backbone:
    """Make a backbone of one of this suite's own checkpoints, whatever its stem.

    Raises:
        InputError: its tensors are not those of its architecture, or not finite.
    """
    facts = checkpoint.facts
    model = create_model(facts.arch, 1)
    load_backbone(model, checkpoint.model, str(checkpoint.path))
    return Backbone(
        model,
        InputSpec(facts.mean, facts.std),
        init or facts.method,
        facts.seed,
        facts.epoch,
        sha256,
        str(checkpoint.path),
        facts.dataset,
    )


def from_tensors(
    arch: str,
    state: Mapping[str, Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    channel_order: str,
    stride_in_1x1: bool,
    sha256: str,
    path: str,
    init: str,
    origin: Mapping[str, Any] | None = None,
    spec: Architecture | None = None,
) -> Backbone:
    """Make a backbone of torchvision-named tensors, as ``convert`` recognises them.

    A network that was trained on BGR images becomes the same function of RGB ones; MSRA's stride
    in the 1×1 convolution is kept.

    Args:
        mean, std: in the channel order of the weights, on the scale 0…255.
        origin: metadata of the file: method, seed, epoch, dataset.
        spec: the structure, where ``arch`` is not one of this suite's names.

    Raises:
        InputError: tensors that are not those of the architecture, or not finite.
    """
    model: Network = (
        create_model(arch, 1) if arch in ARCHITECTURES or spec is None else ResNet(arch, spec, 1)
    )
    tensors = dict(state)
    if channel_order == "BGR":
        tensors["conv1.weight"] = tensors["conv1.weight"].flip(1)
        mean, std = mean[::-1], std[::-1]
    load_backbone(model, tensors, path)
    if stride_in_1x1:
        _move_strides(model)
    origin = origin or {}
    return Backbone(
        model,
        InputSpec([v / 255 for v in mean], [v / 255 for v in std]),
        init,
        int(origin.get("seed", 0)),
        origin.get("epoch"),
        sha256,
        path,
        str(origin.get("dataset", "")),
    )


def load_backbone(model: Network, state: Mapping[str, Tensor], path: str) -> None:
    """Load every tensor but the classifier's; nothing may be missing, left over or not finite.

    Raises:
        InputError: naming the file and the first tensor that is wrong.
    """
    own, head = model.state_dict(), head_prefixes(model)
    given = {k: v for k, v in state.items() if not k.startswith(head)}
    needed = [k for k in own if not k.startswith(head) and not k.endswith("num_batches_tracked")]
    missing = [k for k in needed if k not in given]
    extra = [k for k in given if k not in own]
    if missing or extra:
        wrong = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which it should not"
        raise InputError(
            f"{path} is no {model.arch} backbone: it {wrong} "
            f"({len(missing)} tensors missing, {len(extra)} too many)"
        )
    for key in needed:
        if given[key].shape != own[key].shape:
            raise InputError(
                f"{path}: {key} is {tuple(given[key].shape)}, but {model.arch} has "
                f"{tuple(own[key].shape)}"
            )
        if not bool(torch.isfinite(given[key]).all()):
            raise InputError(f"{path}: {key} holds NaN or infinity; the checkpoint is damaged")
    model.load_state_dict(given, strict=False)


def with_new_head(model: Network, classes: int, seed: int) -> Network:
    """Give the network a fresh classifier, drawn from ``seed`` as its architecture draws it."""
    with torch_seeded(seed, classes):
        model.reset_classifier(classes)
    return model


def _move_strides(model: Network) -> None:
    """Put each bottleneck's stride into its first 1×1 convolution, as MSRA's networks have it."""
    model.arch = f"{model.arch} (stride in the 1×1)"  # another function: features are not shared
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
