"""The linear probe as the paper's code runs it, for comparison only; its faults are kept.

Shapes: N images, B images of a batch, S side in pixels, D feature dimensions, K classes.

The faults of the released CIFAR code: BatchNorm is in train mode, so that the "frozen"
network normalises by the batch and its statistics drift; and the best epoch is chosen on the
test split. What the code's lr 0.4, 30 epochs and batch 512 leave open is own choice here:
momentum 0.9, no weight decay, a constant rate.
"""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import dist
from core.errors import InputError
from core.progress import Progress
from core.seeds import torch_seeded
from data.datasets import EpochSampler, IndexedDataset, evaluation_loader, training_loader
from models.features import InputSpec, check_readable, evaluation_mode
from transfer.metrics import METRICS


@dataclasses.dataclass(frozen=True)
class ReleasedConfig:
    """The released code's figures."""

    epochs: int = 30
    lr: float = 0.4
    batch_size: int = 512
    momentum: float = 0.9  # own choice
    weight_decay: float = 0.0  # own choice


def released_probe(
    model: nn.Module,
    train: IndexedDataset,
    test: IndexedDataset,
    config: ReleasedConfig,
    inputs: InputSpec,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> list[float]:
    """Return the test score after each epoch, %; the released protocol reports their maximum.

    Works on a copy: the network that is passed in stays as it is, to the last buffer.

    Args:
        model: has ``forward_features`` and ``forward_head(…, pre_logits=True)``.
        train: its (epoch, index) items are augmented as it was opened.

    Raises:
        InputError: several processes, images that cannot be read, or a loss that is not finite.
    """
    if dist.world_size() > 1:
        raise InputError(
            "the released protocol runs in one process: start it without tools/launch.py"
        )
    device = torch.device(device)
    network = copy.deepcopy(model).to(device).train().requires_grad_(False)
    with torch_seeded(seed):
        head = nn.Linear(network.head_hidden_size, len(train.classes)).to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(
        head.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
    )
    for part in (train, test):
        check_readable(part, device, workers=workers)
    batch_size = min(config.batch_size, len(train))
    sampler = EpochSampler(len(train), batch_size, seed)
    loader = training_loader(train, sampler, workers)
    scores = []
    with Progress(config.epochs, "released probe") as bar:
        for epoch in range(config.epochs):
            sampler.set_epoch(epoch)
            for images, labels, _ in loader:
                features = _features(network, inputs.apply(images.to(device)))
                loss = _loss(head(features), labels.to(device))
                if not torch.isfinite(loss):
                    raise InputError(f"the released probe diverged in epoch {epoch + 1}: lower lr")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scores.append(_score(network, head, test, inputs, batch_size, device, workers))
            bar.update(1, test=scores[-1])
    return scores


@torch.no_grad()
def _features(network: nn.Module, images: Tensor) -> Tensor:
    return network.forward_head(network.forward_features(images), pre_logits=True)  # type: ignore[operator]


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, (labels == 1).float())
    return F.cross_entropy(logits, labels)


def _score(
    network: nn.Module,
    head: nn.Module,
    test: IndexedDataset,
    inputs: InputSpec,
    batch_size: int,
    device: torch.device,
    workers: int,
) -> float:
    logits, labels = [], []
    with evaluation_mode(network):
        for images, targets, _ in evaluation_loader(test, batch_size, workers):
            logits.append(head(_features(network, inputs.apply(images.to(device)))).cpu())
            labels.append(targets)
    return METRICS[test.metric](torch.cat(logits), torch.cat(labels))
