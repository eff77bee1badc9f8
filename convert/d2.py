"""Read → recognise → rename → prove → write: a checkpoint becomes detectron2 weights, or back.

The written ``ckpt_d2.pth`` holds plain values only: ``{"model": {detectron2 names: tensors},
"__author__", "matching_heuristics": True, "facts"}``. detectron2 loads it as it is; the heuristics
are its suffix matching, which puts ``res2…`` under ``backbone.bottom_up.`` of a detector.

``num_batches_tracked`` is left behind: nothing in detection reads it (BatchNorm has a momentum,
FrozenBN has no such buffer), and without it the 265 tensors of a ResNet-50 are the whole network.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert import layouts, names, zoo
from convert.backbone import Backbone, read_backbone
from convert.sources import AUTHOR, BY_NAME, WRAPPERS, Convention
from core.errors import InputError
from models.checkpoint import load_plain, save_atomically

TARGETS = ("detectron2", "torchvision")
SUFFIXES = (".pth.tar", ".pth", ".pt", ".pkl", ".pickle", ".ckpt", ".torch", ".tar", ".bin",
            ".safetensors", ".pyth")  # fmt: skip
FACTS = ("arch", "mean", "std", "channel_order", "stride_in_1x1", "source_sha256", "tensors")


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
    format: str | None = None,
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
        format: insist on a format of ``convert.sources``.
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
    source = read_backbone(path, format=format, drop=drop, mean=mean, std=std)
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
    if not is_converted(content):
        raise InputError(f"{path} is no converted file; tools/convert_to_d2.py makes one of it")
    facts = content["facts"]
    missing = [key for key in FACTS if key not in facts]
    if missing:
        raise InputError(f"{path} lacks the facts {', '.join(missing)}: convert it again")
    try:
        shapes = {names.to_torchvision(k): tuple(v.shape) for k, v in content["model"].items()}
        layouts.compare(shapes, layouts.layout_of(facts["arch"]))
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: {error}") from None
    return content


def is_converted(content: Any) -> bool:
    """Whether an object read from a file is what ``convert`` writes for detectron2."""
    if not isinstance(content, Mapping) or content.get("__author__") != AUTHOR:
        return False
    model = content.get("model")
    return (
        isinstance(content.get("facts"), Mapping)
        and isinstance(model, Mapping)
        and "stem.conv1.weight" in model
    )


def default_output(path: str | Path, to: str = "detectron2") -> Path:
    """Return ``ckpt_d2.pth`` beside ``ckpt.pth``; of a library's weights, in the current folder."""
    ending = "_d2.pth" if to == "detectron2" else f"_{to}.pth"
    if str(path).startswith(zoo.PREFIXES):
        return Path(str(path).replace(":", "_") + ending)
    path = Path(path)
    stem = path.name
    for suffix in SUFFIXES:
        if stem.endswith(suffix):
            stem = stem.removesuffix(suffix)
            break
    return path.with_name(stem.removesuffix("_d2").removesuffix("_torchvision") + ending)


def _for_torchvision(backbone: Backbone) -> Backbone:
    """Check that torchvision's network computes the same; turn BGR weights into RGB ones.

    Raises:
        InputError: the stride stands in the 1×1, where torchvision's ResNet has none.
    """
    convention = backbone.convention
    if convention.stride_in_1x1 and layouts.layout_of(backbone.arch).bottleneck:
        raise InputError(
            f"{backbone.source_path}: its blocks stride in the 1×1 convolution (MSRA), and "
            "torchvision's stride in the 3×3: no renaming makes these weights torchvision's"
        )
    if convention.channel_order == "RGB":
        return dataclasses.replace(
            backbone, convention=dataclasses.replace(convention, stride_in_1x1=False)
        )
    stem = backbone.state["conv1.weight"].flip(1).contiguous()
    return dataclasses.replace(
        backbone,
        state={**backbone.state, "conv1.weight": stem},
        convention=Convention(convention.mean, convention.std),
    )


def _content(backbone: Backbone, facts: dict[str, Any], to: str) -> dict[str, Any]:
    content: dict[str, Any] = {"__author__": AUTHOR, "facts": facts}
    if to == "torchvision":
        return {"model": dict(backbone.state), **content}
    model = {names.to_detectron2(key): value for key, value in backbone.state.items()}
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
    """Let an existing output be replaced only if it came from the same source."""
    if overwrite or not target.exists():
        return
    try:
        facts = load_plain(target).get("facts", {})
        same = facts.get("source_sha256") == backbone.source_sha256
    except (InputError, AttributeError):
        same = False
    if not same:
        raise InputError(
            f"{target} exists and was not made from {backbone.source_path}; move it away, give "
            "another --output, or say --overwrite"
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
    """Return the lines that tell a reader what was recognised, kept and dropped."""
    groups = _grouped(facts["dropped"], facts["source_prefix"])
    dropped = ", ".join(groups) if groups else "nothing"
    if facts["dropped_batch_counters"]:
        dropped += f"; {facts['dropped_batch_counters']} num_batches_tracked (detection reads none)"
    known = [
        f"{key} {facts[key]}" for key in ("method", "epoch", "seed", "dataset") if key in facts
    ]
    source = BY_NAME.get(facts["source_format"])
    lines = [
        f"format    {facts['source_format']}" + (f" ({source.about})" if source else ""),
        f"arch      {facts['arch']}",
        f"tensors   {facts['tensors']}",
        f"dropped   {dropped}",
        *([f"aside     {', '.join(facts['set_aside'])}"] if facts["set_aside"] else []),
        f"input     {facts['channel_order']}; of R, G, B on 0…255: mean {_numbers(facts['mean'])}, "
        f"std {_numbers(facts['std'])}",
        f"stride    in the {'1×1 (MSRA)' if facts['stride_in_1x1'] else '3×3 (torchvision)'}",
    ]
    return [*lines, f"origin    {', '.join(known)}"] if known else lines


def _numbers(values: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


def _grouped(dropped: Sequence[str], prefix: str) -> list[str]:
    """Shorten names to the module they belong to and a count: ``module.encoder_k.* (161)``."""
    counts: dict[str, int] = {}
    for name in dropped:
        parts = name.split(".")
        wrappers = sum(part in WRAPPERS for part in parts)
        inside = ".".join(part for part in parts if part not in WRAPPERS).startswith(prefix)
        depth = wrappers + 1 + (prefix.count(".") if inside else 0)
        start = ".".join(parts[:depth]) + (".*" if len(parts) > depth else "")
        counts[start] = counts.get(start, 0) + 1
    return [f"{name} ({count})" if name.endswith("*") else name for name, count in counts.items()]
