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
from models import user_file

FORMAT = "transfer-suite checkpoint"
VERSION = 1
SAFE_CLASSES: list[Any] = [argparse.Namespace, collections.OrderedDict]
# What files of other kinds start with, and what they are. Safetensors start with a length of eight
# bytes, which may look like anything, and a brace, by which they are left out of the comparison.
OTHER_KINDS = (
    (rb"\s*<(!doctype|html|head|\?xml)", "a web page: the download did not give the file itself"),
    (rb"version https://git-lfs", "a Git LFS pointer: fetch the file itself with git lfs pull"),
    (rb"\s*[\[{]\s*[\"\[{\]}]", "a JSON text: give the file that holds the tensors"),
    (
        rb"\x08[\x01-\x20][\x12\x1a\x22\x2a\x32\x3a\x42]",
        "an ONNX model: give what it was made from",
    ),
    (rb"\x89HDF\r\n", "an HDF5 file (Keras, MATLAB), which is not read"),
    (rb"\x93NUMPY", "a NumPy array: give the checkpoint that it was taken from"),
    (rb".{257}ustar", "a tar archive: unpack it first"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf", "a compressed file: unpack it first"),
)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a checkpoint says of itself; everything a later step would otherwise have to guess."""

    arch: str  # a name of models.factory; of a user's file with its full path
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
    if user_file.is_name(facts["arch"]) and not Path(facts["arch"]).is_absolute():
        raise InputError(
            f"{path}: its facts name the file of its network by a relative path, "
            f"{facts['arch']}, which this suite does not write; no such code is run"
        )
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
    except Exception as error:  # a damaged stream makes the unpickler raise nearly anything
        raise InputError(f"{path} {_reason(error)}") from None


def verify_file(path: str | Path) -> None:
    """Check that a file exists, is no other kind of file, and that a zip's checksums hold.

    Raises:
        InputError: missing, empty, of another kind (which is named), truncated or corrupt.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    with path.open("rb") as file:
        start = file.read(512)
    for pattern, kind in OTHER_KINDS:
        if start[8:9] != b"{" and re.match(pattern, start, re.DOTALL | re.IGNORECASE):
            raise InputError(f"{path} is {kind}")
    if not start.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
            bad = archive.testzip() or _hidden_entry(archive)
    except Exception:  # zipfile's kinds, and whatever a changed header leads it to
        raise InputError(f"{path} is truncated or damaged: copy or save it again") from None
    if bad is not None:
        raise InputError(f"{path} is corrupt ({bad} is not as written): copy or save it again")
    if "constants.pkl" in names:
        raise InputError(f"{path} is a TorchScript archive: save its state_dict() with torch.save")
    if "data.pkl" not in names:
        raise InputError(f"{path} is a zip archive that torch.save did not write")


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


def _reason(error: Exception) -> str:
    """Say why torch did not read a file, without its advice to read it unsafely."""
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)|add_safe_globals\(\[([\w.]+)\]", text)
    if found or "unrecognized function" in text or "Can only " in text:
        offender = found.group(1) or found.group(2) if found else "an object that is no tensor"
        return (
            "holds code or foreign objects besides tensors, which is never loaded "
            f"({offender}); save it again as a plain state_dict"
        )
    first = text.strip().partition("\n")[0]
    if not first or "weights_only" in text or isinstance(error, pickle.UnpicklingError):
        return "is damaged or no torch checkpoint"
    return f"is damaged or no torch checkpoint: {first}"
