"""Readers of lay-outs that are no one's in particular: drawn images, folders, ``.npz`` files.

N images, H×W pixels, K classes. Arrays on disk are N×H×W×3 RGB.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from core.errors import InputError
from data.shapes import images as shapes
from data.source import (
    Request,
    Source,
    balanced_positions,
    channels_first,
    image_files,
    subfolders,
)


def read_shapes(request: Request) -> Source:
    """The embedded default data, drawn from a fixed seed (``data.shapes``)."""
    labels = torch.from_numpy(shapes.labels(request.split))
    chosen = balanced_positions(labels, request.limit)
    images = shapes.images(request.split, request.size, tuple(chosen.tolist()))
    return Source(
        channels_first(images), labels[chosen], list(shapes.CLASSES), "data.shapes.images"
    )


def read_folder(request: Request) -> Source:
    """``root/{train,val,test}/CLASS/*.jpg``, or ``root/CLASS/*.jpg`` as the only split, train.

    Classes are the sorted folder names of the train split, wherever there is one.

    Raises:
        InputError: no images, an empty class, or a class that the train split lacks.
    """
    splits = folder_splits(request.root)
    single = splits == ["train"] and not (request.root / "train").is_dir()
    folder = request.root if single else request.root / request.split
    reference = request.root / "train" if "train" in splits and not single else folder
    classes = subfolders(reference)
    unknown = sorted(set(subfolders(folder)) - set(classes))
    if unknown:
        raise InputError(f"{folder / unknown[0]} is a class that {reference} does not have")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = image_files(folder / name) if (folder / name).is_dir() else []
        if not files and folder == reference:
            raise InputError(f"class folder {folder / name} holds no images; remove or fill it")
        paths.extend(files)
        labels.extend([label] * len(files))
    if not paths:
        raise InputError(f"{folder} holds no images in class folders (CLASS/*.jpg)")
    return Source(paths, torch.tensor(labels), classes, str(folder))


def folder_splits(root: Path) -> list[str]:
    """Return which of train, val, test an image folder has; a folder of classes is all train."""
    found = [split for split in ("train", "val", "test") if (root / split).is_dir()]
    return found or (["train"] if subfolders(root) else [])


def read_npz(request: Request) -> Source:
    """One ``.npz`` of ``x_train y_train x_test y_test classes``, and ``x_val y_val`` if it likes.

    x is N×H×W×3 uint8, y is N integers in 0..K-1, classes K names. Nothing in it is unpickled.

    Raises:
        InputError: damaged, pickled, or with other keys, shapes or label values.
    """
    path = npz_file(request.root)
    x, y, names = _npz_arrays(
        path, [f"x_{request.split}", f"y_{request.split}", "classes"], "x_train y_train classes"
    )
    if x.ndim != 4 or x.shape[3] != 3 or x.dtype != np.uint8:
        raise InputError(
            f"{path}: x_{request.split} is {x.dtype} {x.shape}; it must be uint8 N×H×W×3"
        )
    if y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise InputError(f"{path}: y_{request.split} must be {len(x)} integers, one per image")
    if len(y) == 0 or y.min() < 0 or y.max() >= len(names):
        raise InputError(
            f"{path}: labels of y_{request.split} must lie in 0..{len(names) - 1}, one per class"
        )
    labels = torch.from_numpy(y.astype(np.int64))
    return Source(channels_first(x), labels, [str(name) for name in names], str(path))


def npz_splits(root: Path) -> list[str]:
    """Return which of train, val, test an ``.npz`` has."""
    path = npz_file(root)
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (zipfile.BadZipFile, OSError):
        raise InputError(f"{path} is damaged or no .npz file") from None
    return [split for split in ("train", "val", "test") if f"x_{split}.npy" in names]


def npz_file(root: Path) -> Path:
    """Return ``root`` itself, or the only ``.npz`` file in it."""
    if root.is_file():
        return root
    files = sorted(root.glob("*.npz"))
    if len(files) != 1:
        raise InputError(f"{root} holds {len(files)} .npz files; name the one that is meant")
    return files[0]


def _npz_arrays(path: Path, keys: Sequence[str], needed: str) -> list[np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as content:
            missing = [key for key in keys if key not in content.files]
            if missing:
                raise InputError(f"{path} has no key {missing[0]!r}; it must hold {needed}")
            return [content[key] for key in keys]
    except InputError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{path} cannot be read as .npz: {str(error).splitlines()[0]}") from None
