"""What the checks of a preflight share: the planned run on one process, and their lengths."""

import dataclasses
import functools
from pathlib import Path

from detectron2.config import CfgNode
from torch import nn

from core.errors import InputError
from detection import weights as weight_files
from detection.cfg import set_norms
from detection.checkpointer import bare
from detection.job import Job, Request
from detection.loader import Records, training_records
from detection.trainer import Trainer, build, build_detector, first_hooks, seed_torch
from detection.weights import Weights


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long the checks are, and what passes."""

    iterations: int = 20
    overfit_steps: int = 100
    overfit_factor: float = 2.0  # by which the loss on one image falls in those steps
    images: int = 8  # evaluated
    resume_iterations: int = 10

    def check(self) -> None:
        """Raise InputError unless every check has something to do."""
        least = {"iterations": 5, "overfit_steps": 6, "images": 1, "resume_iterations": 2}
        for name, value in least.items():
            if getattr(self, name) < value:
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option} {getattr(self, name)}: take {value} or more")
        if not self.overfit_factor > 1:
            raise InputError(f"--overfit-factor {self.overfit_factor}: it must be more than 1")


class Failed(Exception):
    """A check's claim does not hold; the message has the figures."""


class NotRun(Exception):
    """A check cannot be made; the message says what is missing."""


class NothingToCheck(NotRun):
    """The run has nothing of what a check looks at, and is no worse for it."""


@dataclasses.dataclass
class Bench:
    """What the checks share: one process of the run, with its share of the batch."""

    job: Job
    request: Request
    limits: Limits
    folder: Path  # temporary
    cfg: CfgNode
    trained: Trainer | None = None  # whatever was trained last
    peak: int = 0  # bytes that the iterations took

    @functools.cached_property
    def weights(self) -> Weights | None:
        """The weights that the run starts from."""
        path = self.job.weights_file
        return weight_files.read_weights(path, self.folder / "unused.pth") if path else None

    @functools.cached_property
    def records(self) -> Records:
        """The training data."""
        return training_records(self.cfg)

    def given(self) -> Weights:
        """Return the weights.

        Raises:
            NothingToCheck: there are none.
        """
        if self.weights is None:
            raise NothingToCheck("no --weights: the run starts from random initialisation")
        return self.weights

    def trainer(self, cfg: CfgNode, records: Records) -> Trainer:
        """Return a trainer at iteration 0, with the run's weights."""
        trainer = build(cfg, records)
        if self.weights is not None:
            weight_files.load_into(bare(trainer.model), self.weights)
        trainer.register_hooks(first_hooks(cfg))
        return trainer

    def detector(self) -> tuple[nn.Module, CfgNode]:
        """Return a detector with the run's weights on CPU, and its config."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "cpu"
        set_norms(cfg, "BN")
        seed_torch(cfg.SEED)
        model = build_detector(cfg)
        weight_files.load_into(model, self.given())
        return model, cfg
