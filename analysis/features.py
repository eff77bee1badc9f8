"""Features of a data set under a run's network (``models.features``), and its images as X.

Shapes: ``N`` images, ``D`` embedding, ``S`` side of the network's images, ``s`` side of X.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import InputError
from data.datasets import DataConfig, IndexedDataset, evaluation_loader, normalise, open_dataset
from models.base import Network
from models.checkpoint import Checkpoint
from models.factory import create_model
from models.features import CACHE_DIR, InputSpec, cached

BLOCK = 512  # images that are read at a time


@dataclasses.dataclass(frozen=True)
class Extraction:
    """How features are computed; none of it changes them beyond rounding."""

    batch_size: int = 256  # images a step
    amp: str = "none"  # autocast of the forward pass: none, bf16, fp16, auto (models.amp)
    workers: int = 0  # processes that decode images
    cache: bool = True  # keep features under runs/.cache, named by a hash of their content


def network_of(checkpoint: Checkpoint) -> Network:
    """Return the network in a checkpoint.

    Raises:
        InputError: its tensors are not those of its architecture.
    """
    model = create_model(checkpoint.facts.arch, checkpoint.facts.num_classes)
    try:
        model.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{checkpoint.path} does not fit its own architecture: {reason}") from None
    return model


def open_as(config: DataConfig, checkpoint: Checkpoint, split: str) -> IndexedDataset:
    """Open a split at the network's own resolution, unless the config asks for another."""
    size = config.image_size or checkpoint.facts.image_size
    dataset = open_dataset(dataclasses.replace(config, image_size=size), split)
    if dataset.labels.dim() != 1:
        raise InputError(f"{dataset.name} has several labels an image; a timeline needs one")
    return dataset


def features_of(
    checkpoint: Checkpoint, dataset: IndexedDataset, device: torch.device, how: Extraction
) -> Tensor:
    """Return the pooled features of every image in order of its index, N×D float32 on the CPU.

    Images are normalised by the mean and std that the network was trained with, whatever the data
    set. Computed once per (weights, images, transform, resolution).

    Raises:
        InputError: images that cannot be read (named, none left out), features that are not finite.
    """
    facts = checkpoint.facts
    found = cached(
        network_of(checkpoint),
        dataset,
        device,
        how.batch_size,
        how.amp,
        how.workers,
        inputs=InputSpec(facts.mean, facts.std),
        folder=CACHE_DIR if how.cache else None,
    )
    return found.features.float()


def pixels_of(dataset: IndexedDataset, rows: Tensor, side: int, workers: int = 0) -> Tensor:
    """Return the evaluation views of some images as vectors X, n×(3·s·s), normalised.

    Images larger than ``side`` are averaged down to it (own choice: the paper's images are 32 px).

    Args:
        rows: n ascending positions.
        side: s; 0 keeps the network's resolution.
    """
    wanted = torch.zeros(len(dataset), dtype=torch.bool)
    wanted[rows] = True
    parts = []
    for images, _, index in evaluation_loader(dataset, BLOCK, workers):
        images = normalise(images[wanted[index]], dataset.mean, dataset.std)
        if len(images):
            if side and images.shape[-1] > side:
                images = F.adaptive_avg_pool2d(images, side)
            parts.append(images.flatten(1))
    return torch.cat(parts)


def effective_rank(features: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values of centred features; 1..D.

    How many directions the features really use. All equal features have rank 0 here, by
    definition. Source: Roy and Vetterli, EUSIPCO 2007, definition 1 (there without centring).
    """
    centred = features.double() - features.double().mean(0)
    gram = centred.T @ centred if len(centred) > centred.shape[1] else centred @ centred.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = singular.sum()
    if total <= 1e-9 * max(1.0, float(features.double().norm())):
        return 0.0
    share = singular / total
    return float(torch.special.entr(share).sum().exp())


def feature_norm(features: Tensor) -> float:
    """Return the mean Euclidean norm of a feature vector."""
    return float(features.double().norm(dim=1).mean())
