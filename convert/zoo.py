"""Find ``timm:NAME`` and ``torchvision:NAME`` among the weights that are already on the machine.

Nothing is ever downloaded: where the weights are not there, the error says where they would be.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
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
    return _timm(model) if library == "timm" else _torchvision(model)


def _torchvision(model: str) -> Located:
    import torch
    import torchvision

    arch, _, wanted = model.partition(".")
    try:
        weights = {w.name: w for w in torchvision.models.get_model_weights(arch)}
    except ValueError:
        raise InputError(
            f"torchvision has no model {arch!r}; one is torchvision:resnet50"
        ) from None
    if wanted and wanted not in weights:
        known = ", ".join(weights)
        raise InputError(f"torchvision's {arch} has no weights {wanted!r}; it has {known}")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    files = {
        f"{arch}.{name}": folder / weight.url.rsplit("/", 1)[-1]
        for name, weight in weights.items()
        if wanted in ("", name)
    }
    files = {name: path for name, path in files.items() if path.is_file()}
    name, path = _only(files, "torchvision", model, folder)
    settings = vars(weights[name.partition(".")[2]].transforms())
    return Located(path, f"torchvision:{name}", _convention(settings))


def _timm(model: str) -> Located:
    folder, files = hub_folder(), {}
    for repository in sorted(folder.glob(f"models--timm--{model.partition('.')[0]}*")):
        name = repository.name.removeprefix("models--timm--")
        found = [p for f in _FILES for p in sorted(repository.glob(f"snapshots/*/{f}"))]
        if found and model in (name, name.partition(".")[0]):
            files[name] = found[0]
    name, path = _only(files, "timm", model, folder)
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


def _only(files: Mapping[str, Path], library: str, model: str, folder: Path) -> tuple[str, Path]:
    if not files:
        raise InputError(
            f"the weights of {library}:{model} are not on this machine (looked in {folder}), and "
            "nothing is downloaded here: fetch them with the library itself, or give a file"
        )
    if len(files) > 1:
        names = " or ".join(f"{library}:{name}" for name in files)
        raise InputError(f"{library}:{model} could be {names}, which are all there: say which")
    return next(iter(files.items()))


def _convention(settings: dict[str, Any]) -> Convention:
    """Read mean and std, on 0…1 in RGB, from a library's settings; ImageNet's where silent."""
    mean, std = settings.get("mean"), settings.get("std")
    if not mean or not std:
        return TORCHVISION
    (r, g, b), (dr, dg, db) = ([round(float(v) * 255, 4) for v in part] for part in (mean, std))
    return Convention((r, g, b), (dr, dg, db))
