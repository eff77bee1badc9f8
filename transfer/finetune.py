"""Fine-tuning: a new head on the pretrained network, all weights trained, through the one loop.

Shapes: B images of a batch, S side in pixels, D feature dimensions, K classes.

Rate and weight decay are chosen on the official val split or on a part held out of train; the
chosen recipe then trains on all of train (and val) and is tested once.
"""

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import dist
from core.errors import InputError, UnreadableImage
from data.datasets import DataConfig, IndexedDataset
from models.base import Network, head_prefixes
from models.checkpoint import Facts, atomic_file, save_checkpoint
from models.features import NonFiniteFeatures, all_unreadable, check_readable, extract
from training import resume
from training.loop import Hooks, LoopConfig, NonFiniteLoss, Objective, Stage, train
from training.schedule import SCHEDULES
from transfer.backbone import Backbone, with_new_head
from transfer.data import Splits, SteppedDataset, fit_and_held_out, joined
from transfer.metrics import HELD_OUT_METRICS, METRICS

CHUNKS = 20  # a recipe given in steps is saved, and can be resumed, about so many times


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """A recipe; ``lr`` and ``weight_decay`` are grids where they have several values."""

    steps: int = 5000
    epochs: int = 0  # over the training images; above 0 it stands in place of ``steps``
    lr: list[float] = dataclasses.field(default_factory=lambda: [0.1, 0.01, 0.001, 0.0001])
    weight_decay: list[float] = dataclasses.field(default_factory=lambda: [0.0, 1e-5, 1e-4, 1e-3])
    head_lr_factor: float = 1.0  # the head's rate over the backbone's
    schedule: str = "cosine_step"  # cosine_step, multistep or constant
    milestones: list[int] = dataclasses.field(default_factory=list)  # multistep: epochs
    gamma: float = 0.1  # multistep: the rate's factor at each milestone
    held_out: float = 0.2  # share of train that a grid is chosen on, without an official val split


class FineTune(Objective):
    """Cross-entropy of a network with a new head (one sigmoid a class for N×K labels)."""

    def __init__(self, model: Network, stage: Stage, head_lr_factor: float) -> None:
        super().__init__()
        self.model: Network = model
        self.stage, self.head_lr_factor = stage, head_lr_factor

    def stages(self) -> list[Stage]:
        """Return the single stage."""
        return [self.stage]

    def forward(self, images: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Return ``{"loss_ce"}`` of B×3×S×S images."""
        logits = self.model(images).float()  # B×K
        if labels.ndim == 2:
            labelled = (labels >= 0).float()  # −1: not labelled for this class
            losses = F.binary_cross_entropy_with_logits(
                logits, (labels == 1).float(), weight=labelled, reduction="none"
            )
            return {"loss_ce": losses.sum(1).mean()}
        return {"loss_ce": F.cross_entropy(logits, labels)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the backbone's parameters and the classifier's, which has a rate of its own."""
        prefixes, named = head_prefixes(self.model), list(self.model.named_parameters())
        head = [p for name, p in named if name.startswith(prefixes)]
        body = [p for name, p in named if not name.startswith(prefixes)]
        return [{"params": body}, {"params": head, "lr_factor": self.head_lr_factor}]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A chosen, retrained and tested network."""

    score: float  # on the test split, %
    lr: float
    weight_decay: float
    steps: int
    images: int  # that the final training ran on
    tried: list[dict[str, float | None]]  # lr, weight_decay, held-out score (None: diverged)


@dataclasses.dataclass(frozen=True)
class Job:
    """What all trainings of one fine-tuning share."""

    backbone: Backbone
    config: FinetuneConfig
    loop: LoopConfig
    data: DataConfig
    seed: int
    device: torch.device
    fingerprint: str
    resume: bool


def finetune(job: Job, splits: Splits, run_dir: Path) -> Tuned:
    """Choose on held-out images, train on all of them, test once.

    One rate and one weight decay are used as they are. Each training has a folder of
    its own below ``run_dir``; one that is finished is not run again when ``job.resume``.

    Raises:
        InputError: a config that cannot be run, images that cannot be read (counted; those of test
            before the start), or every rate of the grid diverged.
        NonFiniteLoss: the chosen recipe diverged in the final training.
        Stopped: a signal asked to stop; all is saved.
    """
    check(job.config)
    check_readable(splits.test, job.device, job.loop.batch_size, job.data.workers)
    grid = list(itertools.product(job.config.lr, job.config.weight_decay))
    tried: list[dict[str, float | None]] = []
    if len(grid) > 1:
        fit, held = fit_and_held_out(splits, job.config.held_out, job.data)
        for lr, decay in grid:
            folder = run_dir / f"grid_lr{lr:g}_wd{decay:g}"
            score = _train_and_score(job, fit, held, lr, decay, folder, held_out=True)
            tried.append({"lr": lr, "weight_decay": decay, "held_out": score})
    lr, decay = _best(tried) if tried else grid[0]
    everything = splits.train
    if splits.val is not None:
        everything = joined(splits.train, splits.val, job.data)
    score = _train_and_score(job, everything, splits.test, lr, decay, run_dir / "final")
    if score is None:
        raise NonFiniteLoss(f"the final training diverged at lr {lr:g}, weight decay {decay:g}")
    return Tuned(score, lr, decay, total_steps(job, everything), len(everything), tried)


def check(config: FinetuneConfig) -> None:
    """Validate the ranges of values.

    Raises:
        InputError: naming the key and what would be right.
    """
    if not config.lr or not config.weight_decay or min(config.lr) <= 0:
        raise InputError("finetune.lr and finetune.weight_decay need a value each, lr above 0")
    if min(config.weight_decay) < 0:
        raise InputError("finetune.weight_decay must not be negative")
    if config.epochs < 0 or (config.epochs == 0 and config.steps < 1):
        raise InputError("finetune.steps must be at least 1, or finetune.epochs above 0")
    if config.schedule not in SCHEDULES:
        raise InputError(
            f"finetune.schedule {config.schedule!r} is not one of {', '.join(SCHEDULES)}"
        )
    if config.milestones and config.epochs == 0:
        raise InputError("finetune.milestones are epochs: set finetune.epochs, not steps")
    if not 0 < config.held_out < 1:
        raise InputError(f"finetune.held_out is {config.held_out}; it must lie between 0 and 1")


def total_steps(job: Job, dataset: IndexedDataset) -> int:
    """Return the optimiser steps of one training on ``dataset``."""
    if job.config.epochs:
        return job.config.epochs * max(len(dataset) // job.loop.batch_size, 1)
    return job.config.steps


def _best(tried: list[dict[str, float | None]]) -> tuple[float, float]:
    """Return the rate and decay with the highest held-out score; ties: the first of the grid."""
    valid = [t for t in tried if t["held_out"] is not None]
    if not valid:
        raise InputError("every rate of finetune.lr diverged; add smaller ones")
    chosen = max(valid, key=lambda t: t["held_out"] or 0.0)
    return float(chosen["lr"] or 0.0), float(chosen["weight_decay"] or 0.0)


def _train_and_score(
    job: Job,
    learn: IndexedDataset,
    evaluated: IndexedDataset,
    lr: float,
    decay: float,
    folder: Path,
    held_out: bool = False,
) -> float | None:
    """Train with one rate and decay and return the score on ``evaluated``; None if it diverged."""
    done, fingerprint = folder / "score.json", f"{job.fingerprint} lr {lr} wd {decay}"
    before = dist.from_main(lambda: _finished(done, fingerprint) if job.resume else None)
    if before is not None:
        return before["score"]
    model = with_new_head(copy.deepcopy(job.backbone.model), len(learn.classes), job.seed)
    dataset, epochs = _stretched(job, learn)
    stage = Stage(
        "finetune", epochs, lr, decay, job.config.schedule,
        milestones=tuple(job.config.milestones), gamma=job.config.gamma,
    )  # fmt: skip
    metric = (HELD_OUT_METRICS if held_out else METRICS)[evaluated.metric]
    score: float | None = None

    def save_weights(epoch: int) -> None:
        if epoch == epochs and not held_out:
            _save(job, model, learn, folder / "finetuned.pth")

    def evaluate(epoch: int) -> dict[str, float]:
        nonlocal score
        score = metric(predict(model, evaluated, job), evaluated.labels)
        return {evaluated.metric: score}

    if dist.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{folder.name}: lr {lr:g}, weight decay {decay:g}, {len(learn)} images", flush=True)
    try:
        train(
            FineTune(model.requires_grad_(True), stage, job.config.head_lr_factor),
            dataset,  # type: ignore[arg-type]
            dataclasses.replace(job.loop, batch_size=dataset.batch_size),
            folder,
            Hooks(save_weights, evaluate),
            seed=job.seed,
            device=job.device,
            workers=job.data.workers,
            resume_run=dist.from_main(lambda: job.resume and resume.is_there(folder)),
            recipe={"weights, data and recipe": job.fingerprint, "lr": lr, "weight_decay": decay},
        )
        if score is None:  # cut between the last step and this
            evaluate(epochs)
    except (NonFiniteLoss, NonFiniteFeatures):
        score = None
    except UnreadableImage as error:
        raise all_unreadable(error, learn) from None
    if dist.is_main():
        with atomic_file(done) as file:
            found = {"lr": lr, "weight_decay": decay, "score": score, "fingerprint": fingerprint}
            file.write(json.dumps(found).encode())
        for state in (folder / resume.FILE, folder / resume.PREVIOUS):
            state.unlink(missing_ok=True)  # finished: it would only fill the disk
    dist.barrier()
    return score


def _finished(file: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the record of a finished training, None if there is none.

    Raises:
        InputError: it is of another training.
    """
    if not file.exists():
        return None
    before: dict[str, Any] = json.loads(file.read_text())
    if before.get("fingerprint") != fingerprint:
        raise InputError(
            f"{file.parent} holds a finished training of other weights, another seed, recipe or "
            "data: give another --output"
        )
    return before


def _save(job: Job, model: Network, learnt: IndexedDataset, path: Path) -> None:
    """Write the fine-tuned network, head included, as a checkpoint of this suite."""
    backbone = job.backbone
    facts = Facts(
        arch=model.arch,
        num_classes=len(learnt.classes),
        method=f"{backbone.init}+finetuned",
        epoch=backbone.epoch or 0,
        seed=job.seed,
        dataset=learnt.name,
        image_size=learnt.image_size,
        mean=(*backbone.inputs.mean,),  # type: ignore[arg-type]
        std=(*backbone.inputs.std,),  # type: ignore[arg-type]
    )
    save_checkpoint(path, model.state_dict(), facts)


def predict(model: Network, dataset: IndexedDataset, job: Job) -> Tensor:
    """Return logits of every image, N×K in the order of the data set, on every rank."""
    return extract(
        _Logits(model), dataset, job.device, job.loop.batch_size,
        workers=job.data.workers, inputs=job.backbone.inputs,
    ).features  # fmt: skip


class _Logits(nn.Module):
    """Shows logits where ``extract`` looks for pooled features."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def forward_features(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(features)


def _stretched(job: Job, dataset: IndexedDataset) -> tuple[SteppedDataset, int]:
    """Return a data set and epochs for the loop that make exactly the recipe's steps."""
    batch_size = min(job.loop.batch_size, len(dataset))
    if job.config.epochs:
        epochs, steps = job.config.epochs, len(dataset) // batch_size
    else:
        total = job.config.steps
        epochs = max(n for n in range(1, min(CHUNKS, total) + 1) if total % n == 0)
        steps = total // epochs
    return SteppedDataset(dataset, steps, batch_size, job.backbone.inputs), epochs
