"""A checkpoint of any known layout as one thing: a complete, finite, checked backbone.

Shapes are those of ``convert.layouts``; names are torchvision's; numbers are float32.
"""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert import layouts, networks, sources, zoo
from convert.find import find
from convert.reading import read
from convert.sources import AUTHOR, Convention
from core.errors import InputError
from core.results import sha256_of
from models.checkpoint import VERSION, is_ours
from models.factory import TIMM, canonical, check_name, untagged
from models.resnet import ARCHITECTURES

KEPT = ("method", "epoch", "seed", "dataset", "image_size", "num_classes", "config", "code")
STATED = ("arch", "mean", "std", "channel_order", "stride_in_1x1")
RESUME_FORMAT = "transfer-suite resume state"  # of training.resume
BN_EPSILON = 1e-5
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A complete, finite backbone: float32 tensors by torchvision name."""

    arch: str
    state: dict[str, Tensor]
    convention: Convention
    source_format: str
    source_place: str  # where in the file it lies: state_dict.encoder_q
    source_path: str
    source_sha256: str
    dropped: tuple[str, ...]  # places of tensors that lie beside the backbone's
    dropped_batch_counters: int  # num_batches_tracked
    set_aside: tuple[str, ...]  # what else the file holds: epoch, optimizer, momentum model, …
    origin: dict[str, Any]  # what the checkpoint says of itself: method, epoch, seed, …
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)  # of a network of --arch

    def facts(self) -> dict[str, Any]:
        """Return what is written beside the tensors; ``mean`` and ``std`` in R, G, B."""
        facts = {**vars(self), **vars(self.convention), "tensors": len(self.state), **self.origin}
        facts |= self.notes
        for key in ("state", "convention", "origin", "notes"):
            del facts[key]
        return {key: list(v) if isinstance(v, tuple) else v for key, v in facts.items()}


def read_backbone(
    path: str | Path,
    *,
    arch: str = "",
    format: str | None = None,
    prefix: str | None = None,
    drop: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Backbone:
    """Find and check the backbone in a checkpoint.

    Args:
        path: a file, or ``timm:NAME`` / ``torchvision:NAME`` (weights on this machine).
        arch: a name of ``models.factory``; "": what the file says of itself, or a ResNet, or what
            its shapes say.
        format, prefix, drop: see ``convert.find.find``.
        mean: of R, G, B on 0…255, for weights that were trained with another than their format's
            usual one; ``std`` likewise. A file that states its own is not overruled.

    Raises:
        InputError: missing, damaged, holding code, without a complete backbone, ambiguous,
            misshapen, not finite, or of an architecture that detectron2's ResNet cannot hold.
    """
    located = zoo.locate(str(path)) if str(path).startswith(zoo.PREFIXES) else None
    name, file = (located.name, located.path) if located else (str(path), Path(path))
    content = read(file)
    try:
        facts = _facts_of(content)
        declared = _declared_names(content)
        if located:
            declared.append(located.name.partition(":")[2].partition(".")[0])
        options: Any = {"format": format, "prefix": prefix, "drop": drop}
        network = _network(arch, facts, located)
        if not network:
            try:
                found = find(content, **options)
            except ValueError as error:
                network = _by_shapes(content, declared, error)
        if network:
            found = find(content, **options, families=[networks.family(network)])
        del content  # with it go optimiser states and momentum encoders
        state = dict(_checked(found.tensors))
        stated = bool(facts or located or found.normalizer or mean is not None)
        if network:
            usual, unsure = networks.usual_input(network, found)
            found.notes["input_from"] = "" if stated else unsure
        else:
            for declared_name in [*declared, *([arch] if arch else [])]:
                _check_name(declared_name, found.arch, required=format is not None)
            if found.spelling == "transformers":
                _check_config(file.with_name("config.json"))
            state = _with_statistics(state)
            if found.format == "torchvision" and not (format or located):
                _check_statistics(state)
            usual = sources.FORMATS[found.format].convention
        usual = located.convention if located else usual
        convention = _convention(usual, facts, found.normalizer, mean, std)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    return Backbone(
        arch=found.arch,
        state={key: _float32(value) for key, value in state.items()},
        convention=convention,
        source_format=name.partition(":")[0] if located else found.format,
        source_place=found.place,
        source_path=name,
        source_sha256=sha256_of(file),
        dropped=found.dropped,
        dropped_batch_counters=found.counters,
        set_aside=found.aside,
        origin={key: facts[key] for key in KEPT if key in facts},
        notes=found.notes,
    )


def _network(arch: str, facts: Mapping[str, Any], located: zoo.Located | None) -> str:
    """Return the network of ``models.factory`` that is named, "" for a ResNet or none.

    Raises:
        InputError: there is no network of that name.
        ValueError: the file says that it is another.
    """
    own = str(facts.get("arch", ""))
    if arch and own and untagged(canonical(arch)) != untagged(own):
        raise ValueError(f"it says that it is a {own}, not a {arch}")
    name = arch or own
    if not name and located and located.name.startswith("timm:"):
        name = TIMM + located.name.partition(":")[2]
    short = name.removeprefix(TIMM).partition(".")[0] if not arch else name
    with contextlib.suppress(ValueError):
        layouts.layout_of(short)
        return ""
    if not name or (not arch and name in ARCHITECTURES):
        return ""
    check_name(name)
    return canonical(name)


def _by_shapes(content: Any, declared: Sequence[str], error: ValueError) -> str:
    """Return the network of timm whose names and shapes a file without a ResNet has.

    Raises:
        ValueError: none or several that the file does not name: they are listed.
    """
    fits = networks.candidates(content) if isinstance(content, Mapping) else []
    named = [name for name in fits if name in declared]
    if len(fits) == 1 or len(named) == 1:
        return TIMM + (named or fits)[0]
    if fits:
        names = " or ".join(f"{TIMM}{name}" for name in fits)
        raise ValueError(f"its tensors are those of {names}: say which with --arch") from None
    raise error


def _checked(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Check every value and yield it as a tensor; numbers are not converted yet.

    Raises:
        ValueError: a value is no floating tensor, holds NaN or infinity, or a negative variance; or
            the stem is all zeros.
    """
    stem = True
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            value = _from_numpy(name, value)
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}, not a tensor")
        if value.dtype not in FLOATS:
            raise ValueError(f"{name} is {value.dtype}, not floating point: a quantised network?")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinity: the run that made it had diverged")
        if name.endswith("running_var") and bool((value < 0).any()):
            raise ValueError(f"{name} is negative in places: a variance cannot be")
        if value.ndim == 4 and stem and name.endswith("weight"):
            stem = False
            if not bool(value.any()):
                raise ValueError(
                    f"{name}, the stem, is all zeros: the weights were never filled in"
                )
        yield name, value.detach()


def _check_statistics(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if all norms have mean 0 and variance 1 beside weights that were trained.

    So have weights whose frozen statistics were merged into scale and bias: MSRA's, under
    torchvision's names. In a network that was never trained, scales are 1 (or 0) and biases 0.
    """

    def all_are(statistic: str, *numbers: float) -> bool:
        norms = [name.removesuffix("running_mean") for name in state if "running_mean" in name]
        values = torch.cat([state[norm + statistic] for norm in norms])
        return bool(torch.stack([(values - n).abs() < 1e-4 for n in numbers]).any(0).all())

    merged = all_are("running_mean", 0) and all_are("running_var", 1)
    if merged and not (all_are("weight", 0, 1) and all_are("bias", 0)):
        raise ValueError(
            "its running means are all 0 and its variances all 1: frozen statistics were merged "
            "into the weights, as MSRA's are; it could be torchvision or torchvision-msra, which "
            "differ in how images enter: say which with --format (torchvision | torchvision-msra)"
        )


def _from_numpy(name: str, value: np.ndarray) -> Tensor:
    """Return an array of either byte order as a tensor, without a copy where none is needed."""
    if value.dtype.kind != "f" or value.dtype.itemsize > 8:
        raise ValueError(f"{name} is an array of {value.dtype}, not of floating-point numbers")
    return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))


def _with_statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give Caffe2's affine layers the statistics that change nothing: mean 0, variance 1 − ε.

    detectron2's own loader writes variance 1 there, which is off by 5e-6 a layer and by 1e-4 in
    all; 1 − ε computes the layer's scale·x + bias. A bias of the stem's convolution goes into the
    mean, which is the same function.
    """
    full = dict(state)
    stem_bias = full.pop("conv1.bias", None)
    for name, scale in state.items():
        norm, _, statistic = name.rpartition(".")
        if statistic == "weight" and scale.dim() == 1 and f"{norm}.running_var" not in state:
            full[f"{norm}.running_mean"] = torch.zeros_like(scale)
            full[f"{norm}.running_var"] = torch.full_like(scale, 1 - BN_EPSILON)
    if stem_bias is not None:
        if stem_bias.shape != full["bn1.running_mean"].shape:
            raise ValueError("conv1_b, the stem's bias, is misshapen")
        full["bn1.running_mean"] = full["bn1.running_mean"] - stem_bias
    return full


def _float32(value: Tensor) -> Tensor:
    """Return float32 numbers that own no more memory than they need."""
    value = value.to(torch.float32).contiguous()
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole else value.clone()


def _facts_of(content: Any) -> dict[str, Any]:
    """Return what one of our own files, a checkpoint or a converted one, says of itself.

    Raises:
        ValueError: it is of a newer version, or does not say how images enter.
    """
    if not isinstance(content, Mapping):
        return {}
    if content.get("format") == RESUME_FORMAT:
        raise ValueError("it is a resume state: give one of the run's checkpoints/ instead")
    if not is_ours(content) and content.get("__author__") != AUTHOR:
        return {}
    if content.get("version", 0) > VERSION:
        raise ValueError(f"it has version {content['version']}, newer than {VERSION}: update")
    facts = content.get("facts")
    facts = dict(facts) if isinstance(facts, Mapping) else {}
    if absent := [key for key in STATED if key not in facts]:
        raise ValueError(f"its facts lack {', '.join(absent)}: it is damaged")
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


def _check_name(declared: str, arch: str, required: bool) -> None:
    """Raise ValueError if a checkpoint calls itself a network that its tensors are not."""
    reason = sources.reason(sources.LOOKALIKES, [declared])
    if reason and not (required and "--format" in reason):
        raise ValueError(f"it calls itself {declared}, which {reason}")
    try:
        same = layouts.layout_of(declared).arch == arch
    except ValueError:
        return  # a name of someone's own says nothing
    if not same:
        raise ValueError(f"it calls itself {declared}, but is a {arch}")


def _check_config(path: Path) -> None:
    """Raise ValueError if Hugging Face's settings beside the weights put strides elsewhere."""
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in ("downsample_in_first_stage", "downsample_in_bottleneck"):
        if isinstance(settings, Mapping) and settings.get(key):
            raise ValueError(f"{path.name} beside it says {key}: it strides where no ResNet does")


def _convention(
    usual: Convention,
    facts: Mapping[str, Any],
    normalizer: Mapping[str, Any],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Convention:
    """Return how images enter: as a file of ours states, as the user says, or as is usual.

    A normalisation beside the backbone states it too; it gets images on 0…1, or on 0…255 where its
    mean is above 1.
    """
    given = mean is not None or std is not None
    if facts:
        if given:
            raise ValueError("it states its own mean and std, which are not overruled")
        mean, std, order = facts["mean"], facts["std"], facts["channel_order"]
        stride = bool(facts["stride_in_1x1"])
        usual = dataclasses.replace(usual, channel_order=order, stride_in_1x1=stride)
    elif normalizer and not given:
        mean, std = (normalizer[key].flatten().tolist() for key in sorted(normalizer))
        scale = 1 if max(mean) > 1 else 255
        mean, std = ([round(value * scale, 4) for value in values] for values in (mean, std))
    elif not given:
        return usual
    try:
        (a, b, c), (x, y, z) = (map(float, values or ()) for values in (mean, std))
        if not (0 <= min(a, b, c) and max(a, b, c) <= 255 and min(x, y, z) >= 1):
            raise ValueError
        if usual.channel_order not in ("RGB", "BGR"):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"mean {mean} and std {std} (--mean, --std) are not three numbers each on the scale "
            "0…255, or its channel order is damaged; ImageNet's are 123.675 116.28 103.53 and "
            "58.395 57.12 57.375"
        ) from None
    return dataclasses.replace(usual, mean=(a, b, c), std=(x, y, z))
