"""The probe of one checkpoint, penalty sweep included, against the paper code's way of probing.

Shapes: N images, B images of a batch, S side in pixels, D feature dimensions, K classes.

Baseline: the whole network runs forward over all training images in each of 30 epochs (batch 512,
SGD at 0.4, BatchNorm in train mode), and over the test images after each. Ours: each image goes
through the network once, then L-BFGS for every penalty of the grid and the refit. Both in float32.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.datasets import DataConfig, IndexedDataset, normalise, open_dataset
from models.features import extract
from models.resnet import ResNet, create_model
from transfer.linear import linear_probe

T = TypeVar("T")
ARCH = "resnet18_cifar_w16"
EPOCHS, BATCH, RATE = 30, 512, 0.4
REPEATS = 3  # of the short measurements; the fastest counts


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many images the measurement runs on."""

    train: int = 5000
    test: int = 2000


def measure(sizes: Sizes | None = None) -> tuple[float, float, list[str]]:
    """Return the baseline's seconds, ours, and further lines to print."""
    sizes = sizes or Sizes()
    name, train, test = _data(sizes)
    torch.manual_seed(0)
    model = create_model(ARCH, 1)
    baseline, baseline_score = _timed(lambda: _paper_code(create_model(ARCH, 1), train, test))
    ours, score = min(_timed(lambda: _ours(model, train, test)) for _ in range(REPEATS))
    bare = min(_timed(lambda: _bare_forward(model, train))[0] for _ in range(REPEATS))
    with_data = min(_timed(lambda: extract(model, train))[0] for _ in range(REPEATS))
    lines = [
        f"{name}, {len(train)} + {len(test)} images, {ARCH} (random weights), "
        f"{torch.get_num_threads()} threads",
        f"paper code's way: {EPOCHS} epochs, top-1 {baseline_score:.1f}; ours: {score:.1f}",
        f"feature extraction {with_data:.2f} s, bare forward pass {bare:.2f} s: "
        f"{100 * (with_data / bare - 1):+.0f}%",
    ]
    return baseline, ours, lines


def _data(sizes: Sizes) -> tuple[str, IndexedDataset, IndexedDataset]:
    """Return a CIFAR-10 subset where it is at hand, else the embedded data at the same size."""
    config = DataConfig(name="npz", root="cifar10", image_size=32)
    try:
        open_dataset(config, "test")
    except ValueError:
        config = DataConfig(name="shapes", image_size=32)
    train = open_dataset(dataclasses.replace(config, limit=sizes.train), "train")
    return train.name, train, open_dataset(dataclasses.replace(config, limit=sizes.test), "test")


def _ours(model: ResNet, train: IndexedDataset, test: IndexedDataset) -> float:
    learnt, tested = extract(model, train), extract(model, test)
    probe = linear_probe(
        (learnt.features, learnt.labels), (tested.features, tested.labels), len(train.classes)
    )
    return probe.score


def _paper_code(model: ResNet, train: IndexedDataset, test: IndexedDataset) -> float:
    """Probe as the released code does; the images stand in memory, which favours it."""
    (images, labels), (test_images, test_labels) = _stacked(train), _stacked(test)
    head = nn.Linear(model.num_features, len(train.classes))
    optimizer = torch.optim.SGD(head.parameters(), RATE, 0.9)
    best = 0.0
    for _ in range(EPOCHS):
        model.train()
        for chosen in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(head(_pooled(model, images[chosen], train)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        right = 0
        for first in range(0, len(test_images), BATCH):
            part = slice(first, first + BATCH)
            logits = head(_pooled(model, test_images[part], test))
            right += int((logits.argmax(1) == test_labels[part]).sum())
        best = max(best, 100 * right / len(test_images))
    return best


def _bare_forward(model: ResNet, dataset: IndexedDataset) -> None:
    """Run the network over images that stand in memory, in the fastest memory format."""
    images, _ = _stacked(dataset)
    model.eval()
    for first in range(0, len(images), 256):
        _pooled(model, images[first : first + 256], dataset)


@torch.no_grad()
def _pooled(model: ResNet, images: Tensor, dataset: IndexedDataset) -> Tensor:
    x = normalise(images, dataset.mean, dataset.std).contiguous(memory_format=torch.channels_last)
    return model.forward_head(model.forward_features(x), pre_logits=True)


def _stacked(dataset: IndexedDataset) -> tuple[Tensor, Tensor]:
    return torch.stack([dataset[i][0] for i in range(len(dataset))]), dataset.labels


def _timed(function: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result
