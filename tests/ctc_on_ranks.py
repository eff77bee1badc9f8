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
from pretrain.objectives import CTC, CrossEntropy
from pretrain.recipe import CEConfig, CTCConfig, StageConfig
from pretrain.terms import PreservationTerm
from training.loop import Hooks, LoopConfig, Objective, Trainer
from training.resume import Position

WORLDS = (1, 2, 4)
N, CLASSES, B, SIDE, STEPS = 45, 3, 8, 4, 3
STAGES = {"stage1": StageConfig(1, 0.1, 1e-3), "stage2": StageConfig(1, 0.05, 5e-4)}
SMALL = CTCConfig(**STAGES, num_negatives=12, dim1=6, dim2=5, tau1=0.2, tau2=0.3)

RUNS: dict[str, CTCConfig | None] = {
    "ce": None,
    "nce": dataclasses.replace(SMALL, bank_refresh=True),
    "infonce_shared": dataclasses.replace(SMALL, estimator="infonce", negatives="shared"),
    "replaced_ema": dataclasses.replace(SMALL, num_negatives=60, z="ema", z_decay=0.6),
    "all": dataclasses.replace(SMALL, num_negatives=0, other_class_only=False),
    "all_sharded": dataclasses.replace(
        SMALL,
        num_negatives=0,
        other_class_only=False,
        bank_sharding="sharded",
        bank_refresh=True,
        z="ema",
    ),
    "infonce_sharded": dataclasses.replace(
        SMALL, num_negatives=0, estimator="infonce", bank_sharding="sharded"
    ),
    "nce_sharded": dataclasses.replace(SMALL, bank_sharding="sharded", strata=4),
    "shared_sharded": dataclasses.replace(
        SMALL,
        bank_sharding="sharded",
        strata=4,
        negatives="shared",
        estimator="infonce",
        num_negatives=40,
    ),
}


class ToyNetwork(nn.Module):
    """Convolution, ReLU, mean, linear: the calls of models.resnet's networks, without BatchNorm."""

    num_features = 7

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
    return {"history": history, "checks": check_negatives(objective, images, labels)}


def check_negatives(objective: Objective, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return what L_IPS is by the kernel, and by the formula on the negatives of all ranks."""
    term = getattr(objective, "term", None)
    if not isinstance(term, PreservationTerm) or not term.settings.sharded:
        return {}
    options, rank, world = term.options, dist.rank(), dist.world_size()
    if not options.negatives:
        return {}
    index = torch.arange(rank * 3, rank * 3 + 3)
    generator = torch.Generator().manual_seed(rank)
    v, t = (
        torch.nn.functional.normalize(
            torch.randn(3, options.dim, generator=generator).double(), dim=1
        ).requires_grad_()
        for _ in range(2)
    )
    kernel = term.contrast(v, t, labels[index], index, 77)
    kernel_gradient = torch.autograd.grad(kernel, (v, t))
    everyone = dist.gather_rows(index)
    windows = term.drawer.draw(77, everyone, labels[everyone], term.groups)
    mine = torch.cat([part.listed() for part in windows], dim=1) * world + rank  # of all N rows
    listed = torch.cat(list(dist.gather_rows(mine[None])), dim=1)[rank * 3 : rank * 3 + 3]
    assert (labels[listed] != labels[index, None]).all()
    contrast = torch.cat([index[:, None], listed], dim=1)
    formula = torch.zeros((), dtype=torch.float64)
    banks = (term.frozen_bank, term.bank)
    for embedding, bank, log_z in zip((v, t), banks, term.log_z, strict=True):
        whole = bank.sample(torch.arange(N))
        formula = (
            formula
            + losses.preservation_loss(
                embedding,
                whole,
                contrast,
                options.temperature,
                estimator=options.estimator,
                log_z=log_z,
                share=listed.shape[1] / N,
            ).mean()
        )
    formula_gradient = torch.autograd.grad(formula, (v, t))
    return {
        "kernel": torch.cat([kernel[None].detach(), *map(torch.flatten, kernel_gradient)]),
        "formula": torch.cat([formula[None].detach(), *map(torch.flatten, formula_gradient)]),
        "negatives": torch.tensor(listed.shape[1]),
    }


def on_rank(rank: int, ranks: int, port: int, output: Path) -> None:
    """Be one of the processes."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in group.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init("cpu")
    results = {name: train(config) for name, config in RUNS.items()}
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
