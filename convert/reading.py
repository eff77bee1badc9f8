"""Read what lies in a checkpoint file, whatever its container: torch, pickle or safetensors.

Nothing is run: torch's files are read with ``weights_only``, and pickles of numpy arrays (Caffe2,
Detectron 1, detectron2's zoo) by an unpickler that looks names up in a table. Settings and logs
that trainers save beside the weights are read as empty stand-ins.
"""

import collections
import contextlib
import pickle
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.errors import InputError
from models.checkpoint import load_plain, verify_file

PICKLES = (".pkl", ".pickle")


class CodeInPickle(Exception):
    """The stream asks for a name that is not allowed; its text is that name."""


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


OBJECTS = (
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",  # HistoryBuffer holds its methods; Inert looks nothing up
)
DICTS = (
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
ARRAYS = {  # numpy 1 and 2 call the same things differently
    f"numpy.{core}.multiarray.{name}": made.__reduce__()[0]
    for core in ("core", "_core")
    for name, made in (("_reconstruct", np.empty(0)), ("scalar", np.float64(0)))
} | {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
DTYPES = {f"numpy.dtypes.{type(np.dtype(k)).__name__}": type(np.dtype(k)) for k in "fdilq?"}


def read(path: str | Path) -> Any:
    """Return the content of a checkpoint: nested dicts with tensors or arrays as leaves.

    Raises:
        InputError: missing, empty, of another kind, truncated, corrupt, or holding code (which is
            not run).
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


def read_pickle(path: str | Path) -> Any:
    """Return the dicts, lists, numbers, strings and numpy arrays that a pickle holds.

    Strings of Python 2 are read as latin-1, as every reader of Caffe2's pickles does.

    Raises:
        InputError: it holds anything else (nothing of which has been run), or is damaged.
    """
    with Path(path).open("rb") as file:
        try:
            return _Restricted(file, encoding="latin1").load()
        except CodeInPickle as error:
            raise InputError(
                f"{path} holds code or foreign objects besides arrays, which is never loaded "
                f"({error}); save it again as a plain dict of numpy arrays"
            ) from None
        except Exception:  # a damaged stream makes the unpickler raise nearly anything
            raise InputError(f"{path} is damaged or no pickle") from None


def _encode(text: str, encoding: str) -> bytes:
    """How protocols up to 2 spell bytes; codecs other than these are never looked up."""
    if encoding not in ("latin1", "latin-1", "utf-8"):
        raise CodeInPickle(f"_codecs.encode to {encoding}")
    return text.encode(encoding)


def _from_buffer(buffer: bytes, dtype: Any, shape: tuple[int, ...], order: str) -> np.ndarray:
    """How protocol 5 spells an array."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


class _Restricted(pickle.Unpickler):
    allowed = ARRAYS | {
        "numpy.core.numeric._frombuffer": _from_buffer,
        "numpy._core.numeric._frombuffer": _from_buffer,
        "_codecs.encode": _encode,
        "collections.OrderedDict": collections.OrderedDict,
    }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise CodeInPickle(f"{module}.{name}")
        return self.allowed[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Any:
        raise CodeInPickle("a persistent id")


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Let ``weights_only`` reading pass over known settings objects and numpy's numbers."""
    allowed: list[Any] = [(thing, name) for name, thing in (ARRAYS | DTYPES).items()]
    allowed += [(Inert, name) for name in OBJECTS] + [(InertDict, name) for name in DICTS]
    allowed += [dict, list, int, float]
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
