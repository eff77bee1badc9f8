"""Read → find → rename → prove → write: a checkpoint becomes detectron2 weights, or back.

The written ``ckpt_d2.pth`` holds plain values only: ``{"model": {detectron2 names: tensors},
"__author__", "matching_heuristics": True, "facts"}``. detectron2 loads it as it is; the heuristics
are its suffix matching, which puts ``res2…`` under ``backbone.bottom_up.`` of a detector.

``num_batches_tracked`` is left behind: nothing in detection reads it (BatchNorm has a momentum,
FrozenBN has no such buffer), and without it the 265 tensors of a ResNet-50 are the whole network.
"""

import collections
import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert import layouts, names, networks, zoo
from convert.backbone import Backbone, read_backbone
from convert.find import relative
from convert.sources import AUTHOR, FORMATS
from core.errors import InputError
from models.checkpoint import load_plain, save_atomically

TARGETS = ("detectron2", "torchvision")
ENDING = r"\.(pth(\.tar)?|pt|pkl|pickle|ckpt|torch|tar|bin|safetensors|pyth)$"
FACTS = ("arch", "mean", "std", "channel_order", "stride_in_1x1", "source_sha256", "tensors")
SOURCE = ("source_sha256", "source_place")
Check = Callable[[Path], Any]
Prover = Callable[[Backbone], Check]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was written, and what the proof said."""

    output: Path
    facts: dict[str, Any]
    proof: Any = None


def convert(
    path: str | Path,
    output: str | Path | None = None,
    *,
    arch: str = "",
    format: str | None = None,
    prefix: str | None = None,
    to: str = "detectron2",
    drop: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    overwrite: bool = False,
    prove: Prover | None = None,
) -> Conversion:
    """Convert a checkpoint; the output gets its name only after ``prove`` has passed.

    Args:
        path: a file, or ``timm:NAME`` / ``torchvision:NAME`` (weights on this machine).
        output: where to; by default beside the source, ``ckpt_d2.pth`` or ``ckpt_torchvision.pth``.
        arch: the network's name, where the file does not say it; see ``read_backbone``.
        format: required format, a key of ``convert.sources.FORMATS``.
        prefix: which of several backbones, by its place in the file.
        to: "detectron2", or "torchvision" for the way back.
        drop: further name patterns that are no part of the backbone.
        mean: of R, G, B on 0…255, where it is not the format's usual one; ``std`` likewise.
        overwrite: replace an output that came from another source.
        prove: given the backbone, returns a check of the written file that raises InputError.
            ``detection.parity.proof`` is the one to pass; it is an argument because only
            ``detection`` may import detectron2.

    Raises:
        InputError: anything wrong with the input; then no file is left and an old one stays.
    """
    target = default_output(path, to) if output is None else Path(output)
    _check_target(target, path, to)
    source = read_backbone(
        path, arch=arch, format=format, prefix=prefix, drop=drop, mean=mean, std=std
    )
    backbone = _for_torchvision(source) if to == "torchvision" else source
    _check_overwrite(target, source, overwrite)
    facts = backbone.facts()
    check = prove(source) if prove else None
    content = _content(backbone, facts, to)
    with _folder_beside(target) as folder:
        unproved = folder / target.name
        save_atomically(content, unproved)
        del source, backbone, content  # so that the proof's two copies find the memory free
        proof = check(unproved) if check else None
        unproved.replace(target)
    return Conversion(target, facts, proof)


def load_converted(path: str | Path) -> dict[str, Any]:
    """Read and check a file that ``convert`` wrote for detectron2.

    Raises:
        InputError: damaged, not such a file, or its tensors are not those of its architecture.
    """
    content = load_plain(path)
    facts = content.get("facts") if isinstance(content, Mapping) else None
    if not isinstance(facts, Mapping) or content.get("__author__") != AUTHOR:
        raise InputError(f"{path} is no converted file; tools/convert_to_d2.py makes one of it")
    missing = [key for key in FACTS if key not in facts]
    if missing:
        raise InputError(f"{path} lacks the facts {', '.join(missing)}: convert it again")
    try:
        shapes = {key: tuple(value.shape) for key, value in content["model"].items()}
        if is_network(facts):
            networks.compare(shapes, facts["arch"])
        else:
            renamed = {names.to_torchvision(key): shape for key, shape in shapes.items()}
            layouts.compare(renamed, layouts.layout_of(facts["arch"]))
    except (ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{path}: {error}") from None
    return dict(content)


def is_network(facts: Mapping[str, Any]) -> bool:
    """Whether converted weights have a network's own names, and not detectron2's of a ResNet."""
    return "new_tensors" in facts


def default_output(path: str | Path, to: str = "detectron2") -> Path:
    """Return ``ckpt_d2.pth`` beside ``ckpt.pth``; of a library's weights, in the current folder."""
    ending = "_d2.pth" if to == "detectron2" else f"_{to}.pth"
    if str(path).startswith(zoo.PREFIXES):
        return Path(str(path).replace(":", "_") + ending)
    stem = re.sub(ENDING, "", Path(path).name)
    return Path(path).with_name(stem.removesuffix("_d2").removesuffix("_torchvision") + ending)


def _for_torchvision(backbone: Backbone) -> Backbone:
    """Check that torchvision's network computes the same; turn BGR weights into RGB ones.

    Raises:
        InputError: the stride stands in the 1×1, where torchvision's ResNet has none.
    """
    convention = backbone.convention
    if is_network(backbone.notes):
        raise InputError(f"{backbone.source_path} is a {backbone.arch}, which torchvision has not")
    if convention.stride_in_1x1 and layouts.layout_of(backbone.arch).bottleneck:
        raise InputError(
            f"{backbone.source_path}: its blocks stride in the 1×1 convolution (MSRA), and "
            "torchvision's stride in the 3×3: no renaming makes these weights torchvision's"
        )
    state = dict(backbone.state)
    if convention.channel_order == "BGR":
        state["conv1.weight"] = state["conv1.weight"].flip(1).contiguous()
    convention = dataclasses.replace(convention, channel_order="RGB", stride_in_1x1=False)
    return dataclasses.replace(backbone, state=state, convention=convention)


def _content(backbone: Backbone, facts: dict[str, Any], to: str) -> dict[str, Any]:
    content: dict[str, Any] = {"__author__": AUTHOR, "facts": facts}
    if to == "torchvision":
        return {"model": dict(backbone.state), **content}
    model = dict(backbone.state)
    if not is_network(facts):
        model = {names.to_detectron2(key): value for key, value in model.items()}
    return {"model": model, "matching_heuristics": True, **content}


def _check_target(target: Path, path: str | Path, to: str) -> None:
    if to not in TARGETS:
        raise InputError(f"cannot convert to {to!r}; known are {' and '.join(TARGETS)}")
    if target.is_dir():
        raise InputError(f"{target} is a folder; --output names a file")
    if target.suffix != ".pth":
        raise InputError(f"{target} does not end in .pth, by which detectron2 knows how to load it")
    if target.exists() and Path(path).exists() and target.samefile(path):
        raise InputError(f"{target} is the source itself; give another --output")


def _check_overwrite(target: Path, backbone: Backbone, overwrite: bool) -> None:
    """Let an existing output be replaced only if it is of the same backbone of the same file."""
    if overwrite or not target.exists():
        return
    try:
        facts = load_plain(target).get("facts", {})
        same = all(facts.get(key) == getattr(backbone, key) for key in SOURCE)
    except (InputError, AttributeError):
        same = False
    if not same:
        place = f" at {backbone.source_place}" if backbone.source_place else ""
        raise InputError(
            f"{target} exists and was not made from {backbone.source_path}{place}; move it away, "
            "give another --output, or say --overwrite"
        )


@contextlib.contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    """Give a temporary folder on the target's file system, so that a rename is atomic."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise InputError(f"{target.parent} cannot be written to: {error.strerror}") from None
    with folder as name:
        yield Path(name)


def summary(facts: Mapping[str, Any]) -> list[str]:
    """Return the lines of the report: what was found, kept and dropped."""
    groups = collections.Counter(
        relative(name, facts["source_place"]).partition(".")[0] for name in facts["dropped"]
    )
    dropped = ", ".join(f"{group}.* ({n})" if n > 1 else group for group, n in groups.items())
    counters = facts["dropped_batch_counters"]
    if counters:
        dropped += f"; {counters} num_batches_tracked (detection reads none)"
    known = [
        f"{key} {facts[key]}" for key in ("method", "epoch", "seed", "dataset") if key in facts
    ]
    source = FORMATS.get(facts["source_format"])
    lines = [
        f"format    {facts['source_format']}" + (f" ({source.about})" if source else ""),
        f"found at  {facts['source_place'] or 'top level'}",
        f"arch      {facts['arch']}",
        f"tensors   {facts['tensors']}",
        f"dropped   {dropped or 'nothing'}",
        *([f"aside     {', '.join(facts['set_aside'])}"] if facts["set_aside"] else []),
        f"input     {facts['channel_order']}; of R, G, B on 0…255: mean {_numbers(facts['mean'])}, "
        f"std {_numbers(facts['std'])}",
        f"stride    in the {'1×1 (MSRA)' if facts['stride_in_1x1'] else '3×3 (torchvision)'}",
    ]
    for title, key in (("new", "new_tensors"), ("positions", "positions"), ("note", "input_from")):
        if value := facts.get(key):
            said = f"{len(value)}, such as {value[0]}" if isinstance(value, list) else value
            lines.append(f"{title:9} {said}")
    return [*lines, f"origin    {', '.join(known)}"] if known else lines


def _numbers(values: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"
