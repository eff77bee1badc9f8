"""Pooled features of a frozen network: every image exactly once, addressed by index, cached.

Shapes: N images of the data set, B images of a batch, S side in pixels, D feature dimensions,
W ranks.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import dist
from core.config import ROOT
from core.errors import InputError
from core.progress import Progress
from data.datasets import IndexedDataset, evaluation_loader, normalise
from models import amp as amp_module
from models import checkpoint
from models.base import head_prefixes

VERSION = 1  # of the cache: raise it when extraction changes in a way that changes features
CACHE_DIR = ROOT / "runs" / ".cache" / "features"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
GATHER_ROWS = 8192  # features that travel between ranks at a time
NAMED_FAILURES = 5  # unreadable images that an error names; all are counted


class NonFiniteFeatures(InputError):
    """Features hold NaN or infinity: the weights are spoilt, or a training has diverged."""


@dataclasses.dataclass(frozen=True)
class Features:
    """What a frozen network makes of one split."""

    features: Tensor  # N×D, float32 or float16, on the CPU
    labels: Tensor  # N, or N×K where an image has several
    index: Tensor  # N: 0..N-1, row i belongs to image i of the data set

    def __len__(self) -> int:
        return len(self.features)


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What a network expects its images to be."""

    mean: Sequence[float]  # of RGB, in 0..1
    std: Sequence[float]

    def apply(self, images: Tensor) -> Tensor:
        """Return uint8 RGB images, …×3×S×S, as the network wants them (float32)."""
        return normalise(images, self.mean, self.std)


def extract(
    model: nn.Module,
    dataset: IndexedDataset,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    amp: str = "none",
    workers: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    inputs: InputSpec | None = None,
    description: str = "",
) -> Features:
    """Return the pooled features of the evaluation view of every image, on every rank.

    The network runs in eval mode and without gradients; its parameters, buffers and training
    flags are afterwards what they were. The result does not depend on the batch size, the number
    of workers or of ranks (beyond the rounding of float32 sums).

    Args:
        model: has ``forward_features`` and ``forward_head(…, pre_logits=True)``.
        batch_size: images a step on this rank.
        amp: precision of the forward pass, a word of ``models.amp``.
        dtype: what the features are stored in.
        inputs: mean and std that the network was trained with; None: the data set's own.
        description: heads the progress line; "": no progress is shown.

    Raises:
        InputError: images that cannot be read (named and counted; nothing is left out silently).
        NonFiniteFeatures: an InputError too.
    """
    device = torch.device(device)
    spec = inputs or InputSpec(dataset.mean, dataset.std)
    precision = amp_module.resolve(amp, device)
    model.to(device)
    loader = evaluation_loader(dataset, batch_size, workers, dist.rank(), dist.world_size())
    quiet = not (description and dist.is_main())
    rows, indices, failure = [], [], None
    with evaluation_mode(model), Progress(len(loader), description, quiet=quiet) as bar:
        try:
            for images, _, index in loader:
                x = spec.apply(images.to(device, non_blocking=True))
                x = x.contiguous(memory_format=torch.channels_last)
                with amp_module.autocast(precision, device):
                    pooled = model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
                rows.append(pooled.float().to("cpu", dtype))  # B×D
                indices.append(index)
                bar.update()
        except InputError as error:
            failure = error
    _raise_on_every_rank(failure, dataset, device)
    features = _assemble(rows, indices, len(dataset), device)
    _check_finite(features, dataset)
    return Features(features, dataset.labels, torch.arange(len(dataset)))


def cached(
    model: nn.Module,
    dataset: IndexedDataset,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    amp: str = "none",
    workers: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    inputs: InputSpec | None = None,
    description: str = "",
    folder: str | Path | None = CACHE_DIR,
) -> Features:
    """Return ``extract``'s result, read from ``folder`` where the same has been computed before.

    The key is a hash of content: backbone weights, images or file list, labels, transform,
    resolution, normalisation and number format. So a changed checkpoint, transform or data set
    is never served old features. Writes are atomic; a damaged file is computed anew. The folder
    may be deleted at any time. None: no cache.
    """
    compute = {"batch_size": batch_size, "amp": amp, "workers": workers, "dtype": dtype}
    compute |= {"inputs": inputs, "description": description}
    if folder is None:
        return extract(model, dataset, device, **compute)  # type: ignore[arg-type]
    device = torch.device(device)
    spec = inputs or InputSpec(dataset.mean, dataset.std)
    arithmetic = amp_module.resolve(amp, device)
    path = Path(folder) / f"{cache_key(model, dataset, spec, dtype, arithmetic)}.pth"
    features = _read_cache(path, len(dataset))
    hits = dist.all_sum(torch.tensor(float(features is not None), device=device)).item()
    if features is not None and hits == dist.world_size():  # else all ranks must compute
        return Features(features, dataset.labels, torch.arange(len(dataset)))
    result = extract(model, dataset, device, **compute)  # type: ignore[arg-type]
    if dist.is_main():
        checkpoint.save_atomically({"features": result.features}, path)
    dist.barrier()
    return result


def cache_key(
    model: nn.Module, dataset: IndexedDataset, spec: InputSpec, dtype: torch.dtype, arithmetic: str
) -> str:
    """Return the sha256, in hex, of everything that features depend on."""
    parts = {
        "version": VERSION,
        "weights": weights_signature(model),
        "dataset": dataset_signature(dataset),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "dtype": str(dtype),
        "arithmetic": arithmetic,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def weights_signature(model: nn.Module) -> str:
    """Return a sha256 of the architecture and of all weights and buffers but the classifier's."""
    name = f"{getattr(model, 'arch', type(model).__name__)}{getattr(model, 'code', '')}"
    digest, head = hashlib.sha256(f"{name}\n".encode()), head_prefixes(model)
    for key, value in sorted(model.state_dict().items()):
        if not key.startswith(head) and not key.endswith("num_batches_tracked"):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


def dataset_signature(dataset: IndexedDataset) -> str:
    """Return a sha256 of a split's content and evaluation transform.

    Files also count by their place and time of change: a cache must not outlive an image.
    """
    images = dataset.source.images
    view = [dataset.name, dataset.split, dataset.image_size, dataset.resize_ratio, dataset.digest]
    digest = hashlib.sha256(json.dumps(view).encode())
    for path in images if isinstance(images, list) else ():
        try:
            digest.update(f"{path} {path.stat().st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{path} missing\n".encode())  # reading it will say so
    return digest.hexdigest()


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run a block with the network in eval mode and without gradients; then restore every flag."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def unreadable(dataset: IndexedDataset) -> list[str]:
    """Return what is wrong with each image of a split that cannot be read, in order."""
    found = []
    for index in range(len(dataset)):
        try:
            dataset[index]
        except InputError as error:
            found.append(str(error))
    return found


def all_unreadable(failure: InputError, dataset: IndexedDataset) -> InputError:
    """Return an error that counts all images of a split that cannot be read, and names the first.

    Args:
        failure: what was met; it alone is said where the images decode by now.
    """
    found = unreadable(dataset) or [str(failure)]
    named = "; ".join(found[:NAMED_FAILURES])
    more = f"; and {len(found) - NAMED_FAILURES} more" if len(found) > NAMED_FAILURES else ""
    return InputError(
        f"{len(found)} of the {len(dataset)} images of {dataset.name} {dataset.split} cannot be "
        f"read, and none is left out silently: {named}{more}"
    )


def check_readable(
    dataset: IndexedDataset, device: torch.device, batch_size: int = 256, workers: int = 0
) -> None:
    """Decode every image once, each rank its share: a long training must not find out at its end.

    Raises:
        InputError: on every rank, as ``extract``.
    """
    failure = None
    try:
        if not isinstance(dataset.source.images, Tensor):
            for _ in evaluation_loader(
                dataset, batch_size, workers, dist.rank(), dist.world_size()
            ):
                pass
    except InputError as error:
        failure = error
    _raise_on_every_rank(failure, dataset, device)


def _raise_on_every_rank(
    failure: InputError | None, dataset: IndexedDataset, device: torch.device
) -> None:
    """Raise on all ranks if one has failed: a rank that waits in a gather would never learn it."""
    if dist.all_sum(torch.tensor(float(failure is not None), device=device)).item() == 0:
        return
    raise all_unreadable(failure or InputError("another process has met them"), dataset)


def _assemble(
    rows: list[Tensor], indices: list[Tensor], total: int, device: torch.device
) -> Tensor:
    """Put this and every other rank's rows where their index says: N×D on every rank."""
    mine = torch.cat(rows) if rows else torch.zeros(0)
    index = torch.cat(indices) if indices else torch.zeros(0, dtype=torch.long)
    if dist.world_size() > 1:
        mine, index = _gather(mine, index, total, device)
    counts = torch.bincount(index, minlength=total)
    if len(index) != total or bool((counts != 1).any()):
        raise RuntimeError(f"{len(index)} features came back for {total} images")
    features = torch.empty(total, mine.shape[1], dtype=mine.dtype)
    features[index] = mine
    return features


def _gather(mine: Tensor, index: Tensor, total: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Join the shares of all ranks, a block at a time; shares may differ by one row."""
    width = dist.broadcast_object(mine.shape[-1])  # the first rank has image 0
    share = -(-total // dist.world_size())  # rows of the largest share
    padded = torch.zeros(share, width)
    numbers = torch.full((share,), -1)
    if len(index):
        padded[: len(index)], numbers[: len(index)] = mine.float(), index
    rows, row_numbers = [], []
    for first in range(0, share, GATHER_ROWS):
        part = slice(first, first + GATHER_ROWS)
        rows.append(dist.gather_rows(padded[part].to(device)).cpu())
        row_numbers.append(dist.gather_rows(numbers[part].to(device)).cpu())
    joined, joined_numbers = torch.cat(rows), torch.cat(row_numbers)
    real = joined_numbers >= 0
    return joined[real].to(mine.dtype), joined_numbers[real]


def _check_finite(features: Tensor, dataset: IndexedDataset) -> None:
    bad = (~torch.isfinite(features).all(1)).nonzero().flatten()
    if len(bad):
        raise NonFiniteFeatures(
            f"{len(bad)} of the {len(features)} features of {dataset.name} {dataset.split} hold "
            f"NaN or infinity (first: image {int(bad[0])}); are the weights sound, and the mean "
            "and std those they were trained with?"
        )


def _read_cache(path: Path, total: int) -> Tensor | None:
    if not path.exists():
        return None
    try:
        content: Any = checkpoint.load_plain(path)
        features = content["features"]
    except (InputError, KeyError, TypeError):
        return None
    return features if len(features) == total else None


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
