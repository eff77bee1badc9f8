"""A checkpoint of any known format as one thing: a complete, finite, checked backbone.

Shapes are those of ``convert.layouts``; names are torchvision's; numbers are float32.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert import layouts, zoo
from convert.reading import read
from convert.recognise import Recognition, recognise
from convert.refusals import reason_of_name
from convert.sources import AUTHOR, Convention
from core.errors import InputError
from core.results import sha256_of
from models.checkpoint import VERSION, is_ours
from models.resnet import ARCHITECTURES

KEPT = ("method", "epoch", "seed", "dataset", "image_size", "num_classes", "config", "code")
STATED = ("arch", "mean", "std", "channel_order", "stride_in_1x1")
BN_EPSILON = 1e-5
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A recognised, complete, finite backbone: float32 tensors by torchvision name."""

    arch: str
    state: dict[str, Tensor]
    convention: Convention
    source_format: str
    source_prefix: str  # what stood before the backbone's names, wrappers aside
    source_path: str
    source_sha256: str
    dropped: tuple[str, ...]  # names of tensors that stood beside the backbone's
    aside: tuple[str, ...]  # what else the file held: epoch, optimizer, momentum model, …
    counters: int  # num_batches_tracked that were left behind
    origin: dict[str, Any]  # what the checkpoint says of itself: method, epoch, seed, …

    def facts(self) -> dict[str, Any]:
        """Return what is written beside the tensors; ``mean`` and ``std`` in R, G, B."""
        return {
            "arch": self.arch,
            "mean": list(self.convention.mean),
            "std": list(self.convention.std),
            "channel_order": self.convention.channel_order,
            "stride_in_1x1": self.convention.stride_in_1x1,
            "source_format": self.source_format,
            "source_prefix": self.source_prefix,
            "source_path": self.source_path,
            "source_sha256": self.source_sha256,
            "tensors": len(self.state),
            "dropped": list(self.dropped),
            "dropped_batch_counters": self.counters,
            "set_aside": list(self.aside),
            **self.origin,
        }


def read_backbone(
    path: str | Path,
    *,
    format: str | None = None,
    drop: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Backbone:
    """Read, recognise and check a checkpoint of any known format.

    ``mean`` and ``std`` of R, G, B on 0…255 are for weights that were trained with others than
    their format's usual ones; a file that states its own is not overruled.

    Raises:
        InputError: missing, damaged, holding code, unrecognised, ambiguous, incomplete, misshapen,
            not finite, or of an architecture that detectron2's ResNet cannot hold.
    """
    located = zoo.locate(str(path)) if str(path).startswith(zoo.PREFIXES) else None
    name, file = (located.name, located.path) if located else (str(path), Path(path))
    content = read(file)
    try:
        facts = _facts_of(content)
        _check_declared(facts.get("arch"))
        names_given = [*_declared_names(content), *(_library_name(located.name) if located else [])]
        found = recognise(content, format, drop)
        del content  # with it go optimiser states and momentum encoders
        state = _as_tensors(found)
        layout = layouts.infer({key: tuple(value.shape) for key, value in state.items()})
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    for declared in names_given:
        _check_name(declared, layout.arch, name, insisted=format is not None)
    convention = located.convention if located else found.source.convention
    convention = _convention(facts, convention, name)
    if mean is not None or std is not None:
        convention = _overridden(convention, mean, std, stated="mean" in facts)
    return Backbone(
        arch=layout.arch,
        state={key: _float32(value) for key, value in state.items()},
        convention=convention,
        source_format=found.source.name if located is None else name.partition(":")[0],
        source_prefix=found.prefix,
        source_path=name,
        source_sha256=sha256_of(file),
        dropped=found.dropped,
        aside=found.aside,
        counters=found.counters,
        origin={key: facts[key] for key in KEPT if key in facts},
    )


def _as_tensors(found: Recognition) -> dict[str, Tensor]:
    """Check every value and return it as a tensor; numbers are not converted yet.

    Raises:
        ValueError: a value is no floating tensor, holds NaN or infinity, or a negative variance.
    """
    state: dict[str, Tensor] = {}
    for name, value in found.tensors.items():
        if isinstance(value, np.ndarray):
            value = _from_numpy(name, value)
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}, not a tensor")
        if value.dtype not in FLOATS:
            raise ValueError(f"{name} is {value.dtype}, not floating point: a quantised network?")
        if value.device.type == "meta" or value.layout != torch.strided:
            raise ValueError(f"{name} is a {value.layout} tensor on {value.device}: no numbers")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinity: the run that made it had diverged")
        if name.endswith("running_var") and bool((value < 0).any()):
            raise ValueError(f"{name} is negative in places: a variance cannot be")
        state[name] = value.detach()
    return _with_statistics(state, found) if found.style == "caffe2" else state


def _from_numpy(name: str, value: np.ndarray) -> Tensor:
    """Return an array of either byte order as a tensor, without a copy where none is needed."""
    if value.dtype.kind != "f" or value.dtype.itemsize > 8:
        raise ValueError(f"{name} is an array of {value.dtype}, not of floating-point numbers")
    return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))


def _with_statistics(state: dict[str, Tensor], found: Recognition) -> dict[str, Tensor]:
    """Give Caffe2's affine layers the statistics that change nothing: mean 0, variance 1 − ε.

    detectron2's own loader writes variance 1 there, which is off by 5e-6 a layer and by 1e-4 in
    all; 1 − ε computes the layer's scale·x + bias. A bias of the stem's convolution goes into the
    mean, which is the same function.
    """
    full = dict(state)
    for name, scale in state.items():
        norm, _, statistic = name.rpartition(".")
        if statistic == "weight" and scale.dim() == 1 and f"{norm}.running_var" not in state:
            full[f"{norm}.running_mean"] = torch.zeros_like(scale)
            full[f"{norm}.running_var"] = torch.full_like(scale, 1 - BN_EPSILON)
    if found.stem_bias is not None and "bn1.running_mean" in full:
        bias = torch.as_tensor(np.array(found.stem_bias), dtype=torch.float32)
        if bias.shape != full["bn1.running_mean"].shape or not bool(torch.isfinite(bias).all()):
            raise ValueError("conv1_b, the stem's bias, is misshapen or not finite")
        full["bn1.running_mean"] = full["bn1.running_mean"] - bias
    return full


def _float32(value: Tensor) -> Tensor:
    """Return float32 numbers that own no more memory than they need."""
    value = value.to(torch.float32).contiguous()
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole else value.clone()


def _facts_of(content: Any) -> dict[str, Any]:
    """What one of our own files, a checkpoint or a converted one, says of itself.

    Raises:
        ValueError: it is of a newer version, or does not say how images enter.
    """
    if not isinstance(content, Mapping):
        return {}
    if is_ours(content) and content.get("version", 0) > VERSION:
        raise ValueError(f"it has version {content['version']}, newer than {VERSION}: update")
    facts = content.get("facts")
    if not is_ours(content) and content.get("__author__") != AUTHOR:
        return {}
    facts = facts if isinstance(facts, Mapping) else {}
    absent = [key for key in STATED if key not in facts]
    if absent:
        raise ValueError(f"its facts lack {', '.join(absent)}: it is damaged")
    facts = dict(facts)
    if is_ours(content):  # models.checkpoint.Facts has RGB on 0…1
        for key in ("mean", "std"):
            facts[key] = [round(float(value) * 255, 4) for value in facts[key]]
    return facts


def _declared_names(content: Any) -> list[str]:
    """The architectures that a checkpoint calls itself: ``arch``, ``args.model`` and the like."""
    if not isinstance(content, Mapping):
        return []
    settings = [content, content.get("facts")]
    for key in ("args", "opt", "hyper_parameters", "config"):
        value = content.get(key)
        settings.append(vars(value) if isinstance(value, argparse.Namespace) else value)
    found = [s.get(k) for s in settings if isinstance(s, Mapping) for k in ("arch", "model")]
    return [name for name in found if isinstance(name, str)]


def _library_name(name: str) -> list[str]:
    return [name.partition(":")[2].partition(".")[0]]


def _check_name(declared: str, arch: str, name: str, insisted: bool) -> None:
    """Raise InputError if a checkpoint calls itself a network that its tensors are not."""
    reason = reason_of_name(declared)
    if reason and not (insisted and "--format" in reason):
        raise InputError(f"{name}: it calls itself {declared}, which {reason}")
    try:
        same = layouts.layout_of(declared).arch == arch
    except ValueError:
        return  # a name of someone's own says nothing
    if not same:
        raise InputError(f"{name}: it calls itself {declared}, but is a {arch}")


def _convention(facts: Mapping[str, Any], otherwise: Convention, name: str) -> Convention:
    if "mean" not in facts:
        return otherwise
    damaged = f"{name}: its facts about mean, std and channel order are damaged"
    try:
        mean, std = (tuple(float(v) for v in facts[key]) for key in ("mean", "std"))
        order, stride = facts["channel_order"], facts["stride_in_1x1"]
    except (KeyError, TypeError, ValueError):
        raise InputError(damaged) from None
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or order not in ("RGB", "BGR"):
        raise InputError(damaged)
    return Convention((*mean,), (*std,), order, bool(stride))


def _overridden(
    convention: Convention,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    stated: bool,
) -> Convention:
    """Return the convention with the user's mean and std in place of the format's usual ones."""
    if stated:
        raise InputError("--mean, --std: this checkpoint states its own, which are not overruled")
    if mean is None or std is None or len(mean) != 3 or len(std) != 3:
        raise InputError("--mean and --std go together, three numbers each")
    if min(std) < 1 or min(mean) < 0 or max(mean) > 255:
        raise InputError(
            f"--mean {list(mean)} --std {list(std)} are not on the scale 0…255 (ImageNet's are "
            "123.675 116.28 103.53 and 58.395 57.12 57.375)"
        )
    (a, b, c), (x, y, z) = mean, std
    return dataclasses.replace(convention, mean=(a, b, c), std=(x, y, z))


def _check_declared(arch: Any) -> None:
    """Refuse one of our own architectures that detectron2 cannot hold, by its name."""
    spec = ARCHITECTURES.get(arch) if isinstance(arch, str) else None
    if spec is None or spec.stem == "imagenet":
        return
    if spec.block == "preactivation":
        why = "is a pre-activation Wide ResNet of three stages with a CIFAR stem"
    elif len(spec.layers) != 4:
        why = f"has {len(spec.layers)} stages and a CIFAR stem"
    else:
        why = "has a CIFAR stem (3×3, stride 1, no max-pool)"
    raise ValueError(
        f"{arch} {why}, and detectron2's ResNet has only four post-activation stages behind a "
        "7×7 stem: it cannot hold these weights; for detection, pretrain with arch resnet18 or "
        "resnet50"
    )
