"""A network of a user's own: ``path/to/file.py:function``, called without arguments.

The function returns an ``nn.Module`` whose forward maps N×3×S×S images to one of

* a map, N×C×h×w, or a list, tuple or dict of maps from fine to coarse: detection and transfer
* a vector, N×D: transfer only

Features are the vector, or the mean of the last map. The module may say how its images enter by
attributes ``mean`` and ``std`` (of RGB in 0…1; default ImageNet's) and ``image_size`` (224).
Its tensors keep their names behind ``body.``; the classifier added to it is ``fc``.
"""

import functools
import hashlib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.config import ROOT
from core.errors import InputError
from models.base import Description, Map, Network, stride_of

PATTERN = re.compile(r"(?P<path>.+\.py):(?P<function>\w+)")
SIZE = 224  # pixels; of a network that does not say its own


def is_name(name: str) -> bool:
    """Whether a name is that of a function in a file."""
    return PATTERN.fullmatch(name) is not None


def canonical(name: str) -> str:
    """Return the name with the file's full path."""
    path, function = _split(name)
    return f"{path}:{function}"


def load_function(name: str) -> Callable[[], nn.Module]:
    """Import the file and return its function.

    Raises:
        InputError: no such file or function, or the file fails while it is imported.
    """
    path, function = _split(name)
    spec = importlib.util.spec_from_file_location(f"user_file_{code_of(name)[:12]}", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except Exception as error:
        raise _failed(path, function, error) from None
    found = getattr(module, function, None)
    if not callable(found):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(f"{path} has no function {function}; it has {', '.join(names) or 'none'}")
    return found


def code_of(name: str) -> str:
    """Return the sha256 of the file, in hex: what its networks compute may change with it."""
    path = _split(name)[0]
    if not path.is_file():
        raise InputError(f"arch {name!r}: {path} does not exist")
    return hashlib.sha256(path.read_bytes()).hexdigest()


class FileNetwork(Network):
    """A user's module with pooling and a classifier behind it."""

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        self.arch = canonical(name)
        self.code = code_of(name)
        self.num_features = self.head_hidden_size = _widths(name, self.code)[-1]
        self.body = _build(name)
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map N×3×S×S normalised images to the last map, N×C×h×w, or to the vector, N×D."""
        return _outputs(self.body(x))[-1]

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """Map N×3×S×S normalised images to the maps that ``describe`` names."""
        outputs = _outputs(self.body(x))
        return {f"map{i}": value for i, value in enumerate(outputs) if value.ndim == 4}

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average a map to N×D (``pre_logits``), or go on to logits, N×K."""
        pooled = x.mean((2, 3)) if x.ndim == 4 else x
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×S×S normalised images to logits, N×K."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new last layer in place."""
        self.fc = nn.Linear(self.num_features, num_classes)


def describe(
    name: str, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Description:
    """Return what the user's network gives for a black image; ``mean``, ``std``: the default."""
    body, outputs = _probe(name)
    size = int(getattr(body, "image_size", SIZE))
    maps = tuple(
        Map(f"map{i}", value.shape[1], stride_of(size, value.shape[-1]), i)
        for i, value in enumerate(outputs)
        if value.ndim == 4
    )
    width = outputs[-1].shape[1]
    mean, std = (tuple(getattr(body, key, usual)) for key, usual in (("mean", mean), ("std", std)))
    return Description(canonical(name), "file", width, width, maps, mean, std, size)


@functools.cache
def _widths(name: str, code: str) -> list[int]:
    """Return the channels of each output; ``code`` only tells versions of the file apart."""
    return [value.shape[1] for value in _probe(name)[1]]


def _build(name: str) -> nn.Module:
    path, function = _split(name)
    create = load_function(name)
    try:
        body = create()
    except Exception as error:
        raise _failed(path, function, error) from None
    if not isinstance(body, nn.Module):
        raise InputError(
            f"{path}: {function} returned a {type(body).__name__}, not a torch.nn.Module"
        )
    return body


def _probe(name: str) -> tuple[nn.Module, list[Tensor]]:
    """Return a network of the function and its outputs; torch's generator stays where it is."""
    path, function = _split(name)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        body = _build(name).eval()
        size = int(getattr(body, "image_size", SIZE))
        try:
            return body, _outputs(body(torch.zeros(1, 3, size, size)))
        except Exception as error:
            raise _failed(path, function, error) from None


def _outputs(value: Any) -> list[Tensor]:
    if isinstance(value, Mapping):
        value = list(value.values())
    outputs = list(value) if isinstance(value, Sequence) else [value]
    if not outputs or not all(isinstance(o, Tensor) and o.ndim in (2, 4) for o in outputs):
        raise TypeError("its output must be a map N×C×h×w, a list or dict of maps, or a vector N×D")
    return outputs


def _split(name: str) -> tuple[Path, str]:
    """Return the full path and the function; a relative path is below the current folder or ROOT.

    Raises:
        InputError: the name is not ``FILE.py:FUNCTION``.
    """
    match = PATTERN.fullmatch(name)
    if match is None:
        raise InputError(f"arch {name!r} is not of the form path/to/file.py:function")
    path = Path(match["path"]).expanduser()
    if not path.is_absolute() and not path.exists():
        path = ROOT / path
    return path.resolve(), match["function"]


def _failed(path: Path, function: str, error: Exception) -> InputError:
    text = " ".join(str(error).split())
    return InputError(f"{path}: {function} fails with {type(error).__name__}: {text[:300]}")
