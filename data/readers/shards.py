"""Shards: images in few large tar files, as webdataset writes them, with a stable index each.

N images, K classes. A sample is the members that share a name up to its first dot: ``KEY.jpg`` (or
another image) with ``KEY.cls``, a number, or ``KEY.json`` with ``"label"``. Image i is the i-th of
the shards in the order of their names, so shards are a storage format and nothing else: an order
depends on (seed, epoch), a memory bank's row on i, whatever the number of workers and ranks.

That needs random access, which webdataset's streams do not give. So the headers are read once into
an index beside the shards, and an image is one read at its offset: nothing is ever extracted.
"""

import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import InputError
from core.files import atomic_file
from core.progress import Progress
from data.source import IMAGE_ENDINGS, Request, Source, decode_image

VERSION = 1
SPLITS = ("train", "val", "test")
ABOUT = "shards.json"  # written with the shards: {"dataset": name, "classes": [names]}
BLOCK = 512  # bytes of a tar header
LABEL_BYTES = 1 << 20  # at most so many in a .cls or .json
COLUMNS = ("shard", "offset", "size", "label")  # per image


@dataclasses.dataclass(frozen=True)
class ShardedImages:
    """N encoded images, each so many bytes at an offset of a shard (a file's N columns)."""

    shards: list[Path]
    digests: list[str]  # sha256 of each shard
    shard: Tensor  # N, position in ``shards``
    offset: Tensor  # N, bytes
    size: Tensor  # N, bytes

    def __len__(self) -> int:
        return len(self.shard)

    def take(self, positions: Tensor) -> "ShardedImages":
        """Return the images at ``positions``, in that order."""
        columns = {name: getattr(self, name)[positions] for name in ("shard", "offset", "size")}
        return dataclasses.replace(self, **columns)

    def joined(self, other: "ShardedImages") -> "ShardedImages":
        """Return these images and then those of another split."""
        return ShardedImages(
            [*self.shards, *other.shards],
            [*self.digests, *other.digests],
            torch.cat([self.shard, other.shard + len(self.shards)]),
            torch.cat([self.offset, other.offset]),
            torch.cat([self.size, other.size]),
        )

    def read(self, position: int) -> bytes:
        """Return the encoded image; the shard is opened for one read, so any process can do it."""
        path, size = self.shards[int(self.shard[position])], int(self.size[position])
        try:
            with path.open("rb", buffering=0) as file:
                content = os.pread(file.fileno(), size, int(self.offset[position]))
        except OSError as error:
            raise InputError(f"shard {path} cannot be read: {error.strerror}") from None
        if len(content) != size:
            raise InputError(f"shard {path} ends inside image {self.name(position)}; copy it again")
        return content

    def decode(self, position: int) -> Tensor:
        """Return the image, 3×H×W uint8 RGB; one that does not decode is named."""
        content = self.read(position)
        try:
            return decode_image(io.BytesIO(content), "")
        except InputError:
            path = self.shards[int(self.shard[position])]
            return decode_image(io.BytesIO(content), f"{self.name(position)} in shard {path}")

    def name(self, position: int) -> str:
        """Return an image's name in its shard: the headers are read again, for a sentence."""
        path, offset = self.shards[int(self.shard[position])], int(self.offset[position])
        try:
            with tarfile.open(path, "r:") as tar:
                return next(info.name for info in tar if info.offset_data == offset)
        except (OSError, tarfile.TarError, StopIteration):
            return f"at byte {offset}"

    def blocks(self) -> np.ndarray:
        """Return each image's shard, N."""
        return self.shard.numpy()

    def signature(self) -> bytes:
        """Return what the images' bytes and order are known by."""
        columns = [getattr(self, name).numpy().tobytes() for name in ("shard", "offset", "size")]
        return "".join(self.digests).encode() + b"".join(columns)


def read_shards(request: Request) -> Source:
    """``root/{train,val,test}/*.tar``, ``root/{train,val,test}-*.tar``, or ``root/*.tar`` as train.

    The index of a split is made on first use, ``root/SPLIT.index.npz``, and says so if a shard has
    changed since. Class names are those of ``root/shards.json``, else numbers.

    Raises:
        InputError: a truncated or changed shard, a sample without image or label, a name that
            stands twice, a label that is no number; the sentence names shard and member.
    """
    shards = split_shards(request.root, request.split)
    if not shards:
        raise InputError(f"{request.root} holds no shards (*.tar) of {request.split}")
    index = _index(request.root, request.split, shards)
    names = about(request.root).get("classes")
    if names is None:
        reference = split_shards(request.root, "train")
        train = _index(request.root, "train", reference) if reference else index
        names = [str(k) for k in range(int(train["label"].max()) + 1)]
    if int(index["label"].max()) >= len(names):
        raise InputError(
            f"{request.root} has a label {int(index['label'].max())} in {request.split}, but "
            f'{len(names)} classes; write their names as {ABOUT}: {{"classes": [...]}}'
        )
    shard, offset, size, label = (torch.from_numpy(index[name]) for name in COLUMNS)
    images = ShardedImages(shards, [str(d) for d in index["digests"]], shard, offset, size)
    return Source(images, label.long(), [str(name) for name in names], str(request.root))


def shard_splits(root: Path) -> list[str]:
    """Return which of train, val, test have shards."""
    return [split for split in SPLITS if split_shards(root, split)]


def split_shards(root: Path, split: str) -> list[Path]:
    """Return a split's shards in the order of their names, numbers in them counting as numbers."""
    named = {name: [*root.glob(f"{name}/*.tar"), *root.glob(f"{name}-*.tar")] for name in SPLITS}
    found = named[split]
    if split == "train" and not any(named.values()):
        found = list(root.glob("*.tar"))
    return sorted((path for path in found if not path.name.startswith(".")), key=_in_order)


def about(root: Path) -> dict[str, Any]:
    """Return what ``shards.json`` says, {} where there is none.

    Raises:
        InputError: it is not an object with a list of class names.
    """
    path = root / ABOUT
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(name, str) for name in content["classes"]):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f'{path} must be JSON with "classes", a list of names') from None
    return content


def _in_order(path: Path) -> list[tuple[str, int]]:
    return [(text, int(part or 0)) for text, part in re.findall(r"(\D*)(\d*)", path.name)]


def _index(root: Path, split: str, shards: list[Path]) -> dict[str, np.ndarray]:
    """Return a split's index from its file, or make both."""
    path = root / f"{split}.index.npz"
    if path.exists():
        index = _load(path)
        if _unchanged(path, index, root, shards):
            return index
        changed = "have the same content as when it was made"
        warnings.warn(f"{path}: shards that were touched {changed}", stacklevel=2)
    else:
        index = _make(shards)
    stats = [shard.stat() for shard in shards]
    index |= {
        "version": np.array(VERSION),
        "names": np.array([str(shard.relative_to(root)) for shard in shards]),
        "bytes": np.array([stat.st_size for stat in stats]),
        "mtime_ns": np.array([stat.st_mtime_ns for stat in stats]),
    }
    try:
        with atomic_file(path) as file:
            columns: Any = index
            np.savez(file, **columns)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        warnings.warn(f"{path} cannot be written: shards are indexed at each start", stacklevel=2)
    return index


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as content:
            index = dict(content)
        if int(index["version"]) != VERSION or len({len(index[name]) for name in COLUMNS}) != 1:
            raise ValueError
    except Exception:  # numpy and zipfile each have several kinds
        raise InputError(f"{path} is damaged or of another version; remove it") from None
    return index


def _unchanged(path: Path, index: dict[str, np.ndarray], root: Path, shards: list[Path]) -> bool:
    """Whether no shard was touched since; False: touched or copied, but of the same content.

    Raises:
        InputError: shards are more, fewer or others: the images would have other indices.
    """
    anew = f"remove {path} to index them anew, and start runs on them afresh"
    names = [str(shard.relative_to(root)) for shard in shards]
    for name in sorted(set(names) ^ set(index["names"].tolist())):
        what = "was not there" if name in names else "was still there"
        raise InputError(f"{root / name} {what} when the shards were indexed; {anew}")
    touched = False
    for shard, size, mtime, digest in zip(
        shards, index["bytes"], index["mtime_ns"], index["digests"], strict=True
    ):
        stat = shard.stat()
        same = stat.st_size == size
        if same and stat.st_mtime_ns != mtime:
            touched, same = True, _sha256(shard) == digest
        if not same:
            raise InputError(f"shard {shard} has changed since the shards were indexed; {anew}")
    return not touched


def _make(shards: list[Path]) -> dict[str, np.ndarray]:
    """Read the headers of all shards: the columns of their images, and each shard's sha256."""
    rows: list[tuple[int, int, int, int]] = []
    digests: dict[str, Path] = {}
    with Progress(len(shards), "index shards") as bar:
        for number, shard in enumerate(shards):
            rows += [(number, *sample) for sample in _samples(shard)]
            twin = digests.setdefault(_sha256(shard), shard)
            if twin != shard:
                raise InputError(f"shards {twin} and {shard} have the same content; remove one")
            bar.update()
    columns = np.array(rows, dtype=np.int64).T
    index = dict(zip(COLUMNS, columns, strict=True))
    return index | {"digests": np.array(list(digests))}


def _samples(shard: Path) -> list[tuple[int, int, int]]:
    """Return (offset, bytes, label) of each image of a shard, in the order of the images."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    seen: set[str] = set()
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                if info.isdir() or info.name.rsplit("/", 1)[-1].startswith("."):
                    continue
                if not info.isreg() or info.issparse():
                    raise InputError(f"{info.name} in shard {shard} is a link or no plain file")
                key, ending = _split_name(info.name)
                if info.name in seen or (ending in IMAGE_ENDINGS and key in images):
                    raise InputError(f"{info.name} stands twice in shard {shard}: keys are unique")
                seen.add(info.name)
                if ending in IMAGE_ENDINGS:
                    images[key] = (info.name, info.offset_data, info.size)
                elif ending == ".cls" or (ending == ".json" and f"{key}.cls" not in seen):
                    label = _label(tar, info, shard)
                    if label is not None:
                        labels[key] = label
            _check_end(shard, tar.offset)
    except InputError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"shard {shard} is truncated, damaged or no .tar ({reason})") from None
    if not images:
        raise InputError(f"shard {shard} holds no images ({', '.join(IMAGE_ENDINGS)})")
    for key, (name, _, _) in images.items():
        if key not in labels:
            raise InputError(
                f"{name} in shard {shard} has no label; it needs {key}.cls, a number, or "
                f'{key}.json with "label"'
            )
    lonely = next((key for key in labels if key not in images and f"{key}.cls" in seen), None)
    if lonely is not None:
        raise InputError(f"{lonely}.cls in shard {shard} has no image beside it")
    return [(offset, size, labels[key]) for key, (_, offset, size) in images.items()]


def _label(tar: tarfile.TarFile, info: tarfile.TarInfo, shard: Path) -> int | None:
    """Return the label in a .cls or .json member, None where a .json has none."""
    file = tar.extractfile(info)
    text = file.read(LABEL_BYTES) if file is not None else b""
    value: Any = text.decode("utf-8", "replace").strip()
    if info.name.lower().endswith(".json"):
        try:
            content = json.loads(value)
        except ValueError:
            raise InputError(f"{info.name} in shard {shard} is not JSON") from None
        if not isinstance(content, dict) or "label" not in content:
            return None
        value = content["label"]
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,9}", str(value)):
        raise InputError(f"{info.name} in shard {shard} holds {value!r}, not a label 0, 1, 2, …")
    return int(value)


def _split_name(name: str) -> tuple[str, str]:
    """Split ``folder/KEY.ENDING`` at the first dot of the last part, as webdataset does."""
    folder, _, last = name.rpartition("/")
    key, dot, ending = last.partition(".")
    return (f"{folder}/{key}" if folder else key), (dot + ending).lower()


def _check_end(shard: Path, offset: int) -> None:
    """A shard ends with empty blocks; without them it was cut between two members."""
    with shard.open("rb") as file:
        file.seek(offset)
        if file.read(BLOCK) != bytes(BLOCK):
            raise tarfile.ReadError(f"no end mark after byte {offset}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
