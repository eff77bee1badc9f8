"""How data sets lie on disk: one reader per lay-out, each giving a ``Source``.

N images, H×W pixels, K classes. Arrays on disk are N×H×W×3 RGB; a source holds N×3×H×W or paths.
A reader decodes nothing that it need not: files are listed here and decoded image by image.
"""

import dataclasses
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from core import shapes
from core.errors import InputError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class Request:
    """What a reader is asked for."""

    root: Path
    split: str  # as the data set names it: "train", "val" or "test"
    size: int  # side in pixels, for images that are drawn
    limit: int  # how many images will be used, 0 for all; only a hint to draw no more


@dataclasses.dataclass(frozen=True)
class Source:
    """Labels at once, images one by one."""

    images: Tensor | list[Path]  # N×3×H×W uint8, or N files
    labels: Tensor  # N int64 in 0..K-1, or N×K of 0 and 1 where an image has several
    classes: list[str]
    where: str  # the file or folder that holds them, for error sentences

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, positions: Tensor) -> "Source":
        """Return the images at ``positions``, in that order."""
        if isinstance(self.images, Tensor):
            images: Tensor | list[Path] = self.images[positions]
        else:
            images = [self.images[i] for i in positions.tolist()]
        return dataclasses.replace(self, images=images, labels=self.labels[positions])

    def decode(self, position: int) -> Tensor:
        """Return image ``position`` as stored, 3×H×W uint8 RGB.

        Raises:
            InputError: the file does not decode; the sentence names it.
        """
        if isinstance(self.images, Tensor):
            return self.images[position]
        return read_image(self.images[position])


def read_image(path: str | Path) -> Tensor:
    """Decode one image file to 3×H×W uint8 RGB (EXIF rotation ignored, as the field does).

    Raises:
        InputError: missing, truncated or not an image.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"image {path} does not decode ({reason}); replace or remove it") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def balanced_positions(labels: Tensor, limit: int) -> Tensor:
    """Return ``limit`` ascending positions with as equal a share of every class as there can be.

    The first images of each class are taken. Labels N, or N×K (then: evenly spaced). All positions
    where limit is 0 or at least N.
    """
    n = len(labels)
    if not 0 < limit < n:
        return torch.arange(n)
    if labels.dim() > 1:
        return torch.arange(limit) * n // limit
    order = torch.argsort(labels, stable=True)  # by class, then by position
    first = torch.searchsorted(labels[order], labels[order])  # where each one's class begins
    rank_in_class = torch.empty(n, dtype=torch.long)
    rank_in_class[order] = torch.arange(n) - first
    chosen = torch.argsort(rank_in_class * (int(labels.max()) + 1) + labels, stable=True)[:limit]
    return chosen.sort().values


def read_shapes(request: Request) -> Source:
    """The embedded default data, drawn from a fixed seed (``core.shapes``)."""
    labels = torch.from_numpy(shapes.labels(request.split))
    chosen = balanced_positions(labels, request.limit)
    images = shapes.images(request.split, request.size, tuple(chosen.tolist()))
    return Source(_channels_first(images), labels[chosen], list(shapes.CLASSES), "core.shapes")


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
    classes = _subfolders(reference)
    unknown = sorted(set(_subfolders(folder)) - set(classes))
    if unknown:
        raise InputError(f"{folder / unknown[0]} is a class that {reference} does not have")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = _image_files(folder / name) if (folder / name).is_dir() else []
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
    return found or (["train"] if _subfolders(root) else [])


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
    return Source(_channels_first(x), labels, [str(name) for name in names], str(path))


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


def read_cifar10(request: Request) -> Source:
    """CIFAR-10 as ``cifar-10-batches-py``, checked by torchvision's md5 sums."""
    return _read_cifar(torchvision.datasets.CIFAR10, request)


def read_cifar100(request: Request) -> Source:
    """CIFAR-100 as ``cifar-100-python``, fine labels, checked by torchvision's md5 sums."""
    return _read_cifar(torchvision.datasets.CIFAR100, request)


def _read_cifar(kind: Callable[..., Any], request: Request) -> Source:
    root = request.root
    if root.name == kind.base_folder:  # type: ignore[attr-defined]
        root = root.parent
    try:
        data = kind(str(root), train=request.split == "train")
    except RuntimeError:
        folder = root / kind.base_folder  # type: ignore[attr-defined]
        raise InputError(
            f"{folder} is missing or incomplete (files are checked by their md5 sums)"
        ) from None
    return Source(
        _channels_first(data.data), torch.tensor(data.targets), list(data.classes), str(root)
    )


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


def _channels_first(images: np.ndarray) -> Tensor:
    """N×H×W×3 array -> N×3×H×W tensor, contiguous."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")
    )
