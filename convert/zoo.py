"""Find ``timm:NAME`` and ``torchvision:NAME`` among the weights that are already on the machine.

Nothing is ever downloaded: where the weights are not there, the error says where they would be.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from convert.sources import TORCHVISION, Convention
from core.errors import InputError

PREFIXES = ("timm:", "torchvision:")
_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclasses.dataclass(frozen=True)
class Located:
    """Weights of a library: their file, the name that says all, and how images enter."""

    path: Path
    name: str  # e.g. "torchvision:resnet50.IMAGENET1K_V2"
    convention: Convention


def locate(name: str) -> Located:
    """Return where the weights of ``timm:NAME`` or ``torchvision:NAME`` lie.

    ``torchvision:resnet50`` serves if only one of its weights is there, else
    ``torchvision:resnet50.IMAGENET1K_V2`` says which; likewise ``timm:resnet50.a1_in1k``.

    Raises:
        InputError: unknown name, weights not on this machine, or several of them.
    """
    library, _, model = name.partition(":")
    if library == "torchvision":
        return _torchvision(model)
    if library == "timm":
        return _timm(model)
    raise InputError(f"{name!r} names no library; write timm:NAME or torchvision:NAME")


def _torchvision(model: str) -> Located:
    import torch
    import torchvision

    arch, _, wanted = model.partition(".")
    try:
        weights = list(torchvision.models.get_model_weights(arch))
    except ValueError:
        raise InputError(
            f"torchvision has no model {arch!r}; one is torchvision:resnet50"
        ) from None
    if wanted and wanted not in [w.name for w in weights]:
        known = ", ".join(w.name for w in weights)
        raise InputError(f"torchvision's {arch} has no weights {wanted!r}; it has {known}")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    found = [
        (w, folder / w.url.rsplit("/", 1)[-1])
        for w in weights
        if wanted in ("", w.name) and (folder / w.url.rsplit("/", 1)[-1]).is_file()
    ]
    names = [f"torchvision:{arch}.{w.name}" for w, _ in found]
    weight, path = _only(found, names, f"torchvision:{model}", folder)
    transform = weight.transforms()
    return Located(path, f"torchvision:{arch}.{weight.name}", _convention(vars(transform)))


def _timm(model: str) -> Located:
    folder = hub_folder()
    pattern = f"models--timm--{model}" if "." in model else f"models--timm--{model}*"
    found = []
    for repository in sorted(folder.glob(pattern)):
        name = repository.name.removeprefix("models--timm--")
        if name.partition(".")[0] != model.partition(".")[0]:
            continue
        files = [p for f in _FILES for p in sorted(repository.glob(f"snapshots/*/{f}"))]
        if files:
            found.append((name, files[0]))
    names = [f"timm:{name}" for name, _ in found]
    name, path = _only(found, names, f"timm:{model}", folder)
    config: dict[str, Any] = {}
    settings = path.parent / "config.json"
    if settings.is_file():
        try:
            config = json.loads(settings.read_text(encoding="utf-8")).get("pretrained_cfg", {})
        except (ValueError, AttributeError, OSError):
            raise InputError(f"{settings} is damaged: it is not timm's config.json") from None
    return Located(path, f"timm:{name}", _convention(config))


def hub_folder() -> Path:
    """Return the folder in which huggingface_hub, and so timm, keeps what it has downloaded."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(variable):
            return Path(value).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(home).expanduser() / "hub"


def _only(found: list[Any], names: list[str], wanted: str, folder: Path) -> Any:
    if not found:
        raise InputError(
            f"the weights of {wanted} are not on this machine (looked in {folder}), and nothing is "
            "downloaded here: fetch them with the library itself, or give a file"
        )
    if len(found) > 1:
        raise InputError(f"{wanted} could be {' or '.join(names)}, which are all there: say which")
    return found[0]


def _convention(settings: dict[str, Any]) -> Convention:
    """Read mean and std, on 0…1 in RGB, from a library's settings; ImageNet's where silent."""
    mean, std = settings.get("mean"), settings.get("std")
    if not mean or not std:
        return TORCHVISION
    (r, g, b), (dr, dg, db) = ([round(float(v) * 255, 4) for v in part] for part in (mean, std))
    return Convention((r, g, b), (dr, dg, db))
