"""Readers of data sets that torchvision knows: its lay-outs and checks, without its downloads.

N images, H×W pixels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import datasets

from data.source import Request, Source, channels_first, one_sentence

AIRCRAFT, CARS, FLOWERS, FOOD = "fgvc-aircraft-2013b", "stanford_cars", "flowers-102", "food-101"


def read_cifar10(request: Request) -> Source:
    """CIFAR-10 as ``cifar-10-batches-py``; every file must have its md5 sum."""
    return _read_cifar(datasets.CIFAR10, request)


def read_cifar100(request: Request) -> Source:
    """CIFAR-100 as ``cifar-100-python``, fine labels; every file must have its md5 sum."""
    return _read_cifar(datasets.CIFAR100, request)


def read_stl10(request: Request) -> Source:
    """STL-10 as ``stl10_binary``, the labelled images; every file must have its md5 sum."""
    root = _above(request.root, datasets.STL10.base_folder)
    with one_sentence(root / datasets.STL10.base_folder):
        data = datasets.STL10(str(root), split=request.split)
        labels = torch.from_numpy(np.asarray(data.labels, dtype=np.int64))
        return Source(torch.from_numpy(data.data), labels, list(data.classes), str(root))


def read_svhn(request: Request) -> Source:
    """SVHN's cropped digits, ``train_32x32.mat`` and ``test_32x32.mat``, without the extra part."""
    with one_sentence(request.root):
        data = datasets.SVHN(str(request.root), split=request.split)
        images = torch.from_numpy(np.ascontiguousarray(data.data))  # N×3×32×32
        classes = [str(digit) for digit in range(10)]
        return Source(images, torch.from_numpy(data.labels), classes, str(request.root))


def read_aircraft(request: Request) -> Source:
    """FGVC-Aircraft, the 100 variants."""
    return _read_files(datasets.FGVCAircraft, AIRCRAFT, request)


def read_cars(request: Request) -> Source:
    """Stanford Cars, the 196 models."""
    return _read_files(datasets.StanfordCars, CARS, request)


def read_flowers102(request: Request) -> Source:
    """Oxford Flowers-102; the label files must have their md5 sums."""
    return _read_files(datasets.Flowers102, FLOWERS, request)


def read_food101(request: Request) -> Source:
    """Food-101."""
    return _read_files(datasets.Food101, FOOD, request)


def _read_cifar(kind: Any, request: Request) -> Source:
    root = _above(request.root, kind.base_folder)
    with one_sentence(root / kind.base_folder):
        data = kind(str(root), train=request.split == "train")
        images, labels = channels_first(data.data), torch.tensor(data.targets)
        return Source(images, labels, list(data.classes), str(root))


def _read_files(kind: Callable[..., Any], base: str, request: Request) -> Source:
    """Read a data set of image files, which torchvision lists and nobody decodes here."""
    root = _above(request.root, base)
    with one_sentence(root / base):
        data = kind(str(root), split=request.split, loader=str)  # items are (path, label)
        items = [data[i] for i in range(len(data))]
        labels = torch.tensor([int(label) for _, label in items])
        paths = [Path(path) for path, _ in items]
        return Source(paths, labels, [str(name) for name in data.classes], str(root / base))


def _above(root: Path, base: str) -> Path:
    """Return the folder that holds ``base``, where a user may have named either of them."""
    return root.parent if root.name == base and not (root / base).exists() else root
