"""Trains toy CTC runs on 1, 2 and 4 processes and saves what test_objectives.py compares.

    python tests/ctc_on_ranks.py OUTPUT

Everything is in float64 and without BatchNorm, so that one process and many can agree. The
processes are forked, so that torch is imported once.
"""

import dataclasses
import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core import dist
from pretrain import losses
from pretrain.negatives import Drawer
from pretrain.objectives import CTC, CrossEntropy, PreservationTerm
from pretrain.recipe import CEConfig, CTCConfig, StageConfig
from training.loop import Hooks, LoopConfig, Objective, Trainer
from training.resume import Position

WORLDS = (1, 2, 4)
N, CLASSES, B, SIDE, STEPS = 45, 3, 8, 4, 3
STAGES = {"stage1": StageConfig(1, 0.1, 1e-3), "stage2": StageConfig(1, 0.05, 5e-4)}
SMALL = CTCConfig(**STAGES, num_negatives=12, dim1=6, dim2=5, tau1=0.2, tau2=0.3)

LARGE = CTCConfig(num_negatives=5000)
SHARDED = dataclasses.replace(SMALL, bank_sharding="sharded")

RUNS: dict[str, CTCConfig | None] = {
    "ce": None,
    "nce": dataclasses.replace(SMALL, bank_refresh=True),
    "infonce_shared": dataclasses.replace(SMALL, estimator="infonce", negatives="shared"),
    "replaced": dataclasses.replace(SMALL, num_negatives=60),
    "all": dataclasses.replace(SMALL, num_negatives=0),
    "nce_sharded": dataclasses.replace(SHARDED, bank_refresh=True),
    "replaced_sharded": dataclasses.replace(SHARDED, num_negatives=60),
    "all_sharded": dataclasses.replace(SHARDED, num_negatives=0, estimator="infonce"),
    "shared_sharded": dataclasses.replace(SHARDED, negatives="shared", estimator="infonce"),
    "one_negative_sharded": dataclasses.replace(SHARDED, num_negatives=1),
}


class ToyNetwork(nn.Module):
    """Convolution, ReLU, mean, linear: the calls of models.resnet's networks, without BatchNorm."""

    num_features = head_hidden_size = 7

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(3, self.num_features, 3)
        self.fc = nn.Linear(self.num_features, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)

    def forward_features(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = features.mean(dim=(2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def data() -> tuple[Tensor, Tensor]:
    """Return N×3×S×S images and N labels."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(N, 3, SIDE, SIDE, generator=generator).double()
    return images, torch.arange(N) % CLASSES


def joined_batch(step: int) -> Tensor:
    """Return the B indices of all ranks; image 4 stands in it twice, on two ranks."""
    index = torch.randperm(N, generator=torch.Generator().manual_seed(100 + step))[:B]
    index[0] = index[-1] = 4
    return index


class DoubleCTC(CTC):
    """CTC in float64 from the moment a stage's modules are built."""

    def enter_stage(self, number: int) -> None:
        super().enter_stage(number)
        self.double()


def build(config: CTCConfig | None) -> Objective:
    _, labels = data()
    if config is None:
        objective: Objective = CrossEntropy(ToyNetwork(), CEConfig(StageConfig(2, 0.1, 1e-3)))
    else:
        objective = DoubleCTC(ToyNetwork(), labels, config, seed=3)
    return objective.double()


def train(config: CTCConfig | None) -> dict[str, Any]:
    """Train STEPS steps in each stage; return the joined losses, and the state after each stage."""
    images, labels = data()
    objective = build(config)
    trainer = Trainer(objective, LoopConfig(), Path(), 0, torch.device("cpu"))
    share = slice(dist.rank(), N, dist.world_size())

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for index in torch.arange(N)[share].split(4):
            yield images[index], labels[index], index

    hooks = Hooks(batches=batches)
    position, history = Position(), []
    trainer._build_stage(0)
    size = B // dist.world_size()
    for _ in objective.stages():
        trainer.enter(position, hooks)
        for _ in range(STEPS):
            own = joined_batch(position.iteration)[dist.rank() * size :][:size]
            values = trainer.step(images[own], labels[own], own, 0.1, position)
            history.append({name: dist.all_mean(value) for name, value in values.items()})
        stage_state = {key: value.clone() for key, value in objective.state_dict().items()}
        history.append(stage_state)
        position.epoch, position.step = position.epoch + 1, 0
    return {"history": history, "checks": check_negatives(objective, labels)}


def check_negatives(objective: Objective, labels: Tensor) -> dict[str, Tensor]:
    """Return L_IPS and its gradient, the same by the formula, and all ranks' negatives."""
    term = getattr(objective, "term", None)
    if not isinstance(term, PreservationTerm):
        return {}
    rank, size = dist.rank(), B // dist.world_size()
    mine = slice(rank * size, rank * size + size)
    index = torch.arange(B)[mine]
    generator = torch.Generator().manual_seed(5)
    both = torch.randn(2, B, term.config.dim2, generator=generator).double()
    v, t = (x[mine].clone().requires_grad_() for x in torch.nn.functional.normalize(both, dim=2))
    kernel = term.loss(v, t, labels[index], index, 77)
    kernel_gradient = torch.autograd.grad(kernel, (v, t))
    listed = all_negatives(term, labels[index])[mine]
    contrast = torch.cat([index[:, None], listed], dim=1)
    formula = torch.zeros((), dtype=torch.float64)
    for embedding, bank, log_z in zip((v, t), (term.frozen_bank, term.bank), term.log_z):
        formula = (
            formula
            + losses.preservation_loss(
                embedding,
                bank.sample(torch.arange(N)),
                contrast,
                term.config.tau2,
                estimator=term.config.estimator,
                log_z=log_z,
                share=listed.shape[1] / N,
            ).mean()
        )
    formula_gradient = torch.autograd.grad(formula, (v, t))
    return {
        "kernel": torch.cat([kernel[None].detach(), *map(torch.flatten, kernel_gradient)]),
        "formula": torch.cat([formula[None].detach(), *map(torch.flatten, formula_gradient)]),
        "negatives": dist.gather_rows(listed),
    }


def all_negatives(term: PreservationTerm, labels: Tensor) -> Tensor:
    """Return the bank rows of the negatives of all ranks' images, sorted, B×K."""
    drawn, bank = term.draw(labels, 77), term.bank
    counted = drawn.counted(0, len(drawn.rows), None, torch.float64) > 0
    times = torch.zeros(len(counted), N, dtype=torch.long)  # each row drawn for each image
    for image, own in enumerate(counted):
        rows = drawn.rows[own] * bank.world + bank.rank
        times[image] = torch.bincount(rows, minlength=N)
    times = dist.all_sum(times) if bank.sharded else dist.gather_rows(times)
    return torch.stack([torch.arange(N).repeat_interleave(one) for one in times])


def large_pool() -> Tensor:
    """Return how many negatives all ranks' shards hold of two images, where P is 20,000."""
    rank, world, labels = dist.rank(), dist.world_size(), torch.arange(25_000) % 10
    classes = labels[rank::world].to(torch.int32)
    drawn = Drawer(LARGE, labels, 1).draw(3, torch.tensor([4, 5]), classes, rank, world)
    return dist.all_sum(drawn.counted(0, len(drawn.rows), None, torch.float64).sum(dim=1)).long()


def on_rank(rank: int, ranks: int, port: int, output: Path) -> None:
    """Be one of the processes."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in group.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init("cpu")
    results: dict[str, Any] = {name: train(config) for name, config in RUNS.items()}
    results["large pool"] = large_pool()
    torch.save(results, output / f"world{ranks}_rank{rank}.pt")
    dist.shutdown()


def main(output: Path) -> None:
    torch.set_num_threads(1)
    processes = []
    for ranks in WORLDS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(ranks):
            arguments = (rank, ranks, port, output)
            processes.append(
                multiprocessing.get_context("fork").Process(None, on_rank, args=arguments)
            )
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
