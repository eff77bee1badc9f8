"""What a reader gives: labels at once, images one by one, and what went wrong in one sentence.

N images, H×W pixels, K classes. Arrays on disk are N×H×W×3 RGB; a source holds N×3×H×W or paths.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.errors import InputError, UnreadableImage

STAT_THREADS, STAT_BLOCK = 16, 1024  # for file systems on which each file costs a round trip
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class Request:
    """What a reader is asked for."""

    root: Path
    split: str  # as the data set names it: "train", "val" or "test"
    size: int  # side in pixels, for images that are drawn
    limit: int  # how many images will be used, 0 for all; only a hint to draw no more


class Encoded(Protocol):
    """N images in a storage format of their own (``data.readers.shards``)."""

    def __len__(self) -> int: ...

    def take(self, positions: Tensor) -> "Encoded":
        """Return the images at ``positions``, in that order."""
        ...

    def joined(self, other: Any) -> "Encoded":
        """Return these images and then those of another in the same format."""
        ...

    def decode(self, position: int) -> Tensor:
        """Return an image, 3×H×W uint8 RGB; ``InputError`` names one that does not decode."""
        ...

    def blocks(self) -> np.ndarray:
        """Return the number of the file that each image lies in, N."""
        ...

    def signature(self) -> bytes:
        """Return what the images' bytes and order are known by."""
        ...


@dataclasses.dataclass(frozen=True)
class Source:
    """Labels at once, images one by one."""

    images: Tensor | list[Path] | Encoded  # N×3×H×W uint8, or N files, or N in a format
    labels: Tensor  # N int64 in 0..K-1; or N×K of 1, 0 and −1 (not evaluated): several an image
    classes: list[str]
    where: str  # the file or folder that holds them, for error sentences

    def __len__(self) -> int:
        return len(self.images)

    @functools.cached_property
    def digest(self) -> str:
        """A sha256, in hex, of labels, class names and images, wherever they lie.

        Images in memory and in shards count by their bytes, files by their size and their name
        below the folder that all of them share: none of a million files is opened.
        """
        found = hashlib.sha256(json.dumps([tuple(self.labels.shape), self.classes]).encode())
        found.update(self.labels.contiguous().flatten().numpy().data)
        if isinstance(self.images, Tensor):
            found.update(f"{tuple(self.images.shape)}".encode())
            found.update(self.images.contiguous().flatten().numpy().data)
        elif isinstance(self.images, list):
            found.update("\n".join(_names_and_sizes(self.images)).encode())
        else:
            found.update(self.images.signature())
        return found.hexdigest()

    def subset(self, positions: Tensor) -> "Source":
        """Return the images at ``positions``, in that order."""
        images: Tensor | list[Path] | Encoded
        if isinstance(self.images, Tensor):
            images = self.images[positions]
        elif isinstance(self.images, list):
            images = [self.images[i] for i in positions.tolist()]
        else:
            images = self.images.take(positions)
        return dataclasses.replace(self, images=images, labels=self.labels[positions])

    def joined(self, other: "Source") -> "Source":
        """Return these images and then those of another part of the same data set."""
        images: Any
        if isinstance(self.images, Tensor):
            images = torch.cat([self.images, other.images])  # type: ignore[list-item]
        elif isinstance(self.images, list):
            images = [*self.images, *other.images]  # type: ignore[misc]
        else:
            images = self.images.joined(other.images)
        labels = torch.cat([self.labels, other.labels])
        return dataclasses.replace(self, images=images, labels=labels)

    def decode(self, position: int) -> Tensor:
        """Return image ``position`` as stored, 3×H×W uint8 RGB.

        Raises:
            InputError: the file does not decode; the sentence names it.
        """
        if isinstance(self.images, Tensor):
            return self.images[position]
        if isinstance(self.images, list):
            return read_image(self.images[position])
        return self.images.decode(position)


def _names_and_sizes(paths: list[Path]) -> Iterator[str]:
    """Yield each file's name below their common folder and its size in bytes, -1 if missing."""
    if not paths:
        return
    names = [str(path) for path in paths]
    shared = os.path.commonpath([Path(min(names)).parent, Path(max(names)).parent])
    blocks = [paths[first : first + STAT_BLOCK] for first in range(0, len(paths), STAT_BLOCK)]
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        sizes = itertools.chain.from_iterable(pool.map(_sizes, blocks))
        for name, size in zip(names, sizes, strict=True):
            yield f"{name[len(shared) :].lstrip(os.sep)} {size}"


def _sizes(paths: list[Path]) -> list[int]:
    sizes = []
    for path in paths:
        try:
            sizes.append(path.stat().st_size)
        except OSError:
            sizes.append(-1)  # reading it will say so
    return sizes


def read_image(path: str | Path) -> Tensor:
    """Decode one image file to 3×H×W uint8 RGB (EXIF rotation ignored, as the field does).

    Raises:
        UnreadableImage: missing, truncated or not an image.
    """
    return decode_image(path, str(path))


def decode_image(file: str | Path | IO[bytes], name: str) -> Tensor:
    """Decode an image file, named or open, as ``read_image``; ``name`` is its name in sentences."""
    try:
        with Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise UnreadableImage(f"image {name} does not exist") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).split("\n")[0]
        raise UnreadableImage(
            f"image {name} does not decode ({reason}); replace or remove it"
        ) from None
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


def channels_first(images: np.ndarray) -> Tensor:
    """N×H×W×3 array -> N×3×H×W tensor, contiguous."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def subfolders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in a folder, none if it is not there."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """Return the sorted image files anywhere below a folder."""
    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")
    )


def inside(root: Path, base: str) -> Path:
    """Return ``root/base`` if it is there, else ``root``: a user may have named either of them."""
    return root / base if (root / base).is_dir() else root


@contextlib.contextmanager
def one_sentence(where: Path) -> Iterator[None]:
    """Turn whatever a missing, cut or changed file raises in the block into an ``InputError``."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the readers behind it raise their own kinds too
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        reason = reason.split(" You can use download")[0].rstrip(".")
        raise InputError(f"{where} is missing, incomplete or changed ({reason})") from None
