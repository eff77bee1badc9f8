"""Any data set of the catalogue as shards: large tar files that ``data.readers.shards`` reads.

The bytes of image files are copied, images in memory become PNG; so every image, label and index is
that of the data set itself. webdataset reads the shards too.
"""

import dataclasses
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from torch import Tensor

from core.errors import InputError
from core.files import atomic_file
from core.progress import Progress
from core.seeds import shuffled
from data.datasets import DataConfig, IndexedDataset, open_dataset, splits_of
from data.readers import shards
from data.source import IMAGE_ENDINGS


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """What to pack, and how."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    images_per_shard: int = 1000  # about 100 MB of ImageNet's files
    mixed: bool = False  # write in a fixed random order (other indices): for data.shuffle shards


def pack(config: PackConfig, output: Path) -> dict[str, int]:
    """Write all splits of a data set below ``output`` and index them; return images per split.

    All of it is written beside ``output`` first, so that an interrupted packing leaves no half.

    Raises:
        InputError: bad data, several labels an image, an ``output`` that is not empty, a full disk.
    """
    if config.images_per_shard < 1:
        raise InputError(f"images_per_shard is {config.images_per_shard}; it must be at least 1")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is there already; choose another folder, or remove it")
    datasets = {split: open_dataset(config.data, split) for split in splits_of(config.data)}
    for dataset in datasets.values():
        if dataset.labels.dim() > 1:
            raise InputError(f"{dataset.name} has several labels an image; shards hold one")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".packing.") as temporary:
        content = Path(temporary) / "content"
        for split, dataset in datasets.items():
            _write_split(dataset, content / split, config)
        classes = next(iter(datasets.values())).classes
        with atomic_file(content / shards.ABOUT) as file:
            text = json.dumps({"dataset": config.data.name, "classes": classes}, indent=1)
            file.write(text.encode())
        for split in datasets:
            shards.read_shards(shards.Request(content, split, 0, 0))  # writes the index
        content.replace(output)
    return {split: len(dataset) for split, dataset in datasets.items()}


def _write_split(dataset: IndexedDataset, folder: Path, config: PackConfig) -> None:
    n, per_shard = len(dataset), config.images_per_shard
    order = shuffled(n, 0) if config.mixed else range(n)
    with Progress(n, f"pack {folder.name}") as bar:
        for number, first in enumerate(range(0, n, per_shard)):
            with (
                atomic_file(folder / f"{number:06d}.tar") as file,
                tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
            ):
                for position in range(first, min(first + per_shard, n)):
                    for name, content in _sample(dataset, int(order[position])):
                        info = tarfile.TarInfo(name)  # no time, no owner: the same bytes each time
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
                    bar.update()


def _sample(dataset: IndexedDataset, position: int) -> Iterator[tuple[str, bytes]]:
    """Yield the members of a sample: its image as it is stored, and its label."""
    images, key = dataset.source.images, f"{position:09d}"
    if isinstance(images, list):
        ending = images[position].suffix.lower()
        dataset.source.decode(position)  # else a damaged file would be noticed days later
        if ending in IMAGE_ENDINGS:
            yield f"{key}{ending}", images[position].read_bytes()
        else:
            yield f"{key}.png", _png(dataset.source.decode(position))
    else:
        yield f"{key}.png", _png(dataset.source.decode(position))
    yield f"{key}.cls", str(int(dataset.labels[position])).encode()


def _png(image: Tensor) -> bytes:
    """3×H×W uint8 -> the bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "png")
    return file.getvalue()
