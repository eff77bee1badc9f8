"""Read a pickle of numpy arrays without the power to run code.

A ``.pkl`` of Caffe2, Detectron 1 or detectron2's zoo holds dicts of arrays. Only what those need
is looked up, from a table; every other name in the stream ends the reading before it is called.
"""

import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import InputError


class CodeInPickle(Exception):
    """The stream asks for a name that is not allowed; its text is that name."""


def _encode(text: str, encoding: str) -> bytes:
    """How protocols up to 2 spell bytes; codecs other than these are never looked up."""
    if encoding not in ("latin1", "latin-1", "utf-8"):
        raise CodeInPickle(f"_codecs.encode to {encoding}")
    return text.encode(encoding)


def _from_buffer(buffer: bytes, dtype: Any, shape: tuple[int, ...], order: str) -> np.ndarray:
    """How protocol 5 spells an array."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # numpy's own constructor of an array to be filled
_SCALAR = np.float64(0).__reduce__()[0]
ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise CodeInPickle(f"{module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise CodeInPickle("a persistent id")


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
        except MemoryError:
            raise InputError(f"{path} is damaged: it asks for more memory than there is") from None
        except Exception:  # a damaged stream makes the unpickler raise nearly anything
            raise InputError(f"{path} is damaged or no pickle") from None
