"""The checkpoint format: clean weights plus plain facts; atomic to write, safe to read.

``epoch_0200.pth`` holds what later steps need: ``{"format", "version", "facts", "model"}``, plain
tensors and plain values, readable with ``weights_only=True``. ``resume.pth`` holds what only the
same training needs. Nothing here ever unpickles code.
"""

import argparse
import collections
import dataclasses
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import InputError, NonFiniteLoss
from core.files import atomic_file as atomic_file  # re-exported: who saves needs both

FORMAT = "transfer-suite checkpoint"
VERSION = 1
SAFE_CLASSES: list[Any] = [argparse.Namespace, collections.OrderedDict]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a checkpoint says of itself; everything a later step would otherwise have to guess."""

    arch: str  # a key of models.resnet.ARCHITECTURES
    num_classes: int
    method: str  # "random", "ce", "ctc"
    epoch: int  # epochs finished; 0 is the initialisation
    seed: int
    dataset: str
    image_size: int  # side of the training crop, pixels
    mean: tuple[float, float, float]  # of RGB in 0..1
    std: tuple[float, float, float]
    channel_order: str = "RGB"
    stride_in_1x1: bool = False  # torchvision's convention: the stride stands in the 3×3
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # the resolved pretrain config
    code: str = ""  # git commit


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    facts: Facts
    model: dict[str, Tensor]  # torchvision key names
    path: Path


def save_checkpoint(path: str | Path, model: dict[str, Tensor], facts: Facts) -> None:
    """Write weights and facts atomically; keys are cleaned of wrapper prefixes, tensors are on CPU.

    Raises:
        NonFiniteLoss: a weight is not finite (nothing is written).
        InputError: the disk is full (an older file of that name stays as it was).
    """
    clean = {}
    for key, value in model.items():
        key = key.removeprefix("module.").removeprefix("_orig_mod.")
        clean[key] = value.detach().to("cpu", copy=True).contiguous()
    assert_finite(clean)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "facts": dataclasses.asdict(facts),
        "model": clean,
    }
    save_atomically(content, path)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read one of our checkpoints.

    Raises:
        InputError: missing, truncated, not ours, holds code, or of a newer version.
    """
    path = Path(path)
    content = load_plain(path)
    if not is_ours(content):
        raise InputError(
            f"{path} is not a checkpoint of this suite; a foreign one enters through "
            "tools/convert_to_d2.py"
        )
    if content["version"] > VERSION:
        raise InputError(f"{path} has version {content['version']}, newer than {VERSION}: update")
    names = {field.name for field in dataclasses.fields(Facts)}
    facts = {key: value for key, value in content["facts"].items() if key in names}
    facts["mean"], facts["std"] = tuple(facts["mean"]), tuple(facts["std"])
    return Checkpoint(Facts(**facts), content["model"], path)


def is_ours(content: Any) -> bool:
    """Whether an object read from a file has this suite's checkpoint format."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def load_plain(path: str | Path, map_location: str | torch.device = "cpu") -> Any:
    """Read a ``.pth`` of tensors and plain values; code in a pickle is refused, never run.

    Raises:
        InputError: missing, truncated or corrupt (checksums are checked), or holding code.
    """
    path = Path(path)
    verify_file(path)
    try:
        with torch.serialization.safe_globals(SAFE_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported" in str(error) or "weights_only" in str(error):
            raise InputError(
                f"{path} holds code or foreign objects besides tensors, which is never loaded "
                f"({_offender(error)}); save it again as a plain state_dict"
            ) from None
        raise InputError(f"{path} is damaged or no torch checkpoint: {error}") from None
    except (
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OSError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} is damaged or no torch checkpoint: {reason}") from None


def verify_file(path: str | Path) -> None:
    """Check that a file exists, is not empty and, for zip-format files, that every checksum holds.

    Raises:
        InputError: it does not.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if not is_zip:
        return
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip() or _hidden_entry(archive)
    except Exception:  # zipfile's kinds, and whatever a changed header leads it to
        raise InputError(f"{path} is truncated or damaged: copy or save it again") from None
    if bad is not None:
        raise InputError(f"{path} is corrupt ({bad} is not as written): copy or save it again")


def _hidden_entry(archive: zipfile.ZipFile) -> str | None:
    """Return a file that a flipped bit marks as a folder: torch would read memory in its place."""
    marked = (e.filename for e in archive.infolist() if e.external_attr & 0x10 and e.file_size)
    return next(marked, None)


def save_atomically(content: Any, path: str | Path) -> None:
    """``torch.save`` to a temporary file beside ``path``, flushed to disk, then renamed over it."""
    with atomic_file(path) as file:
        torch.save(content, file)


def newest_valid(paths: list[Path], read: Callable[[Path], Any]) -> tuple[Path, Any] | None:
    """Return the first of ``paths`` (newest first) that reads without an error, and its content."""
    for path in paths:
        try:
            return path, read(path)
        except InputError:
            continue
    return None


def assert_finite(model: dict[str, Tensor]) -> None:
    """Raise NonFiniteLoss, naming the tensor, if a floating tensor holds NaN or infinity."""
    for key, value in model.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NonFiniteLoss(f"{key} is not finite; nothing was saved")


def _offender(error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)|add_safe_globals\(\[([\w.]+)\]", str(error))
    return found.group(1) or found.group(2) if found else "an object that is no tensor"
