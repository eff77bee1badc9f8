"""Read what lies in a checkpoint file, whatever its container: torch, pickle or safetensors."""

import collections
import contextlib
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convert.pickles import read_pickle
from core.errors import InputError
from models.checkpoint import load_plain, verify_file

PICKLES = (".pkl", ".pickle")


class Inert:
    """What stands in for a foreign settings object: it takes any state and keeps none."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""


class InertDict:
    """What stands in for a subclass of dict: an ordinary dict comes out of its construction."""

    def __new__(cls, *args: Any, **keywords: Any) -> Any:
        return collections.OrderedDict()


# Settings that trainers save beside the weights. They are read as stand-ins, so that no class of
# theirs is imported or run; all else that is no tensor or plain value stays refused.
_OBJECTS = (
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
)
_DICTS = (
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "mmengine.config.config.ConfigDict",
    "addict.addict.Dict",
    "easydict.EasyDict",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "detectron2.config.config.CfgNode",
    "collections.defaultdict",
)
_NUMPY: tuple[tuple[Any, str], ...] = (
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    (np.empty(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
    (np.ndarray, "numpy.ndarray"),
    (np.dtype, "numpy.dtype"),
    *((type(np.dtype(kind)), f"numpy.dtypes.{type(np.dtype(kind)).__name__}") for kind in "fdilq?"),
    *((kind, f"builtins.{kind.__name__}") for kind in (dict, list, int, float)),
)


def read(path: str | Path) -> Any:
    """Return the content of a checkpoint: nested dicts with tensors or arrays as leaves.

    Raises:
        InputError: missing, empty, truncated, corrupt, or holding code (which is not run).
    """
    path = Path(path)
    verify_file(path)
    with path.open("rb") as file:
        start = file.read(16)
    if path.suffix == ".safetensors" or _looks_like_safetensors(start):
        return _read_safetensors(path)
    if path.suffix in PICKLES and not start.startswith(b"PK"):
        return read_pickle(path)
    with _stand_ins(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a pickle protocol that torch did not write
        return load_plain(path)


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Let ``weights_only`` reading pass over known settings objects and numpy's numbers."""
    objects = ((Inert, name) for name in _OBJECTS)
    dicts = ((InertDict, name) for name in _DICTS)
    allowed: list[Any] = [*objects, *dicts, *_NUMPY]
    with torch.serialization.safe_globals(allowed):
        yield


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from None


def _looks_like_safetensors(start: bytes) -> bool:
    """Whether a file starts with a header length and a JSON object."""
    return len(start) > 9 and struct.unpack("<Q", start[:8])[0] < 10**8 and start[8:10] == b'{"'
