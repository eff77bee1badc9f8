"""What a pretraining optimises: cross-entropy, or CTC in its two stages.

Shapes: B images a rank and step, N training images, C channels and features, S side in pixels.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import dist
from core.errors import InputError
from core.loop import Objective
from core.schedule import SCHEDULES, Stage
from pretrain.losses import ESTIMATORS
from pretrain.memory import DTYPES
from pretrain.terms import BankOptions, InstanceTerm, PreservationOptions, PreservationTerm


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """How long and at which rate a stage trains."""

    epochs: int = 200
    lr: float = 0.05  # base rate, for the whole batch of all ranks as it is
    weight_decay: float = 5e-4
    schedule: str = "cosine_epoch"  # cosine_epoch (the released code's), cosine_step, multistep, …
    warmup_epochs: float = 0.0
    end_factor: float = 0.0  # a cosine ends at lr × end_factor
    milestones: list[int] = dataclasses.field(default_factory=list)  # multistep: epochs
    gamma: float = 0.1  # multistep: factor at each milestone

    def stage(self, name: str) -> Stage:
        """Return it under a name.

        Raises:
            InputError: a value that cannot be.
        """
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.epochs < 0 or self.lr < 0 or self.weight_decay < 0:
            raise InputError(f"{name}: epochs, lr and weight_decay must not be negative")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Stage(name, **(fields | {"milestones": tuple(self.milestones)}))


@dataclasses.dataclass(frozen=True)
class CEConfig:
    """Cross-entropy. The defaults are the "vanilla" CIFAR-100 recipe of the CTC code."""

    stage: StageConfig = dataclasses.field(
        default_factory=lambda: StageConfig(200, 0.05, 5e-4, warmup_epochs=5, end_factor=0.1)
    )
    label_smoothing: float = 0.0  # 0: none, as released


@dataclasses.dataclass(frozen=True)
class CTCConfig:
    """CTC (arXiv 2203.03871). The defaults are the CIFAR-100 recipe "for transferability".

    Where they deviate from the released code, the key says so and names the released value.
    """

    stage1: StageConfig = dataclasses.field(default_factory=lambda: StageConfig(200, 0.05, 1e-3))
    stage2: StageConfig = dataclasses.field(default_factory=lambda: StageConfig(100, 0.005, 5e-4))
    # stage 1: cross-entropy + alpha × L_IAS
    alpha: float = 0.5  # 0: plain cross-entropy, without projection and bank
    tau1: float = 0.1
    m1: float = 0.9  # momentum of the bank
    dim1: int = 128  # of the embedding
    train_projection: bool = True  # released: false (it is missing from the optimiser there)
    # stage 2: cross-entropy + beta × L_IPS
    beta: float = 1.0  # 0: plain cross-entropy at stage 2's schedule, a control
    tau2: float = 0.1
    m2: float = 0.9
    dim2: int = 128
    estimator: str = "nce"  # nce (released) or infonce (the poster's: softmax over 1 + K)
    num_negatives: int = 16384  # K; 0: every image of another class
    negatives: str = "per_sample"  # per_sample (released) or shared by the batch
    pool: int = 0  # bank rows that one step's negatives come from; 0: all (released), else ≥ K
    strata: int = 0  # draw K/S from each S-th part of the images; 0: 1 (released), sharded: ranks
    replacement: str = "auto"  # auto (released: only if K exceeds the others), always, never
    other_class_only: bool = True  # false: negatives are all images but the image itself
    bank_refresh: bool = False  # stage 2's banks start as the frozen network's embeddings
    z: str = "fixed"  # fixed by the first stage-2 batch (released), or ema
    z_decay: float = 0.99  # ema: share of the old Z that each step keeps
    # the banks
    bank_dtype: str = "fp32"  # fp32 (released), bf16 or fp16
    bank_sharding: str = "replicated"  # whole on every rank, or sharded over the ranks


CHOICES = {
    "estimator": ESTIMATORS,
    "negatives": ("per_sample", "shared"),
    "replacement": ("auto", "always", "never"),
    "z": ("fixed", "ema"),
    "bank_dtype": tuple(DTYPES),
    "bank_sharding": ("replicated", "sharded"),
}


class CrossEntropy(Objective):
    """Cross-entropy alone: {"loss_ce"}.

    Args:
        model: with ``forward_features`` and ``forward_head``, as core.resnet's.
    """

    def __init__(self, model: nn.Module, config: CEConfig) -> None:
        super().__init__()
        if not 0 <= config.label_smoothing < 1:
            raise InputError(f"ce.label_smoothing {config.label_smoothing} must be in [0, 1)")
        self.model, self.config = model, config

    def stages(self) -> list[Stage]:
        return [self.config.stage.stage("ce")]

    def forward(self, images: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        logits = self.model(images)
        return {"loss_ce": cross_entropy(logits, labels, self.config.label_smoothing)}


class CTC(Objective):
    """Contrastive temporal coding: {"loss_ce", "loss_ias"}, then {"loss_ce", "loss_ips"}.

    ``term`` is the loss beside cross-entropy in the stage entered last: an InstanceTerm, a
    PreservationTerm, or None where its weight is 0. Stage 1's projection and bank end with it.

    Args:
        model: with ``num_features``, ``forward_features`` and ``forward_head``.
        labels: N int64, the class of every training image.
        seed: of projections, banks and negatives.

    Raises:
        InputError: a setting that cannot be, or more negatives than there are without replacement.
    """

    model: Any
    term: InstanceTerm | PreservationTerm | None

    def __init__(self, model: nn.Module, labels: Tensor, config: CTCConfig, seed: int = 0) -> None:
        super().__init__()
        if labels.dim() != 1:
            raise InputError("CTC needs one class per image; this data set has several")
        check(config)
        self.model, self.config, self.seed = model, config, seed
        self.labels = labels.cpu()
        check_negatives(config, self.labels)
        self.term = None
        self.step = 0

    def stages(self) -> list[Stage]:
        return [self.config.stage1.stage("ctc1"), self.config.stage2.stage("ctc2")]

    def enter_stage(self, number: int) -> None:
        config = self.config
        weight = (config.alpha, config.beta)[number]
        if weight == 0:
            self.term = None
        elif number == 0:
            self.term = InstanceTerm(
                self.model.num_features,
                config.dim1,
                config.tau1,
                config.m1,
                self._bank_options(),
                train_projection=config.train_projection,
                seed=self.seed,
            )
        else:
            options = preservation_options(config)
            self.term = PreservationTerm(
                self.model, self.labels, options, self._bank_options(), seed=self.seed
            )
        # DDP would overwrite every rank's shard with the first rank's
        self._ddp_params_and_buffers_to_ignore = [
            name
            for name, _ in self.named_buffers()
            if name.endswith((".storage", ".groups")) and config.bank_sharding == "sharded"
        ]

    def start_stage(self, number: int, batches: Callable[[], Iterator[Any]]) -> None:
        if isinstance(self.term, PreservationTerm):
            self.term.freeze(self.model)
            if self.config.bank_refresh:
                self.term.refresh(batches())

    def set_step(self, iteration: int) -> None:
        self.step = iteration

    def forward(self, images: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        maps = self.model.forward_features(images)  # B×C×h×w
        losses = {"loss_ce": cross_entropy(self.model.forward_head(maps), labels)}
        if self.term is None:
            return losses
        features = self.model.forward_head(maps, pre_logits=True)  # B×C
        if isinstance(self.term, InstanceTerm):
            losses["loss_ias"] = self.config.alpha * self.term(features, index)
        else:
            term = self.term(features, images, labels, index, self.step)
            losses["loss_ips"] = self.config.beta * term
        return losses

    def after_step(self) -> None:
        if self.term is not None:
            self.term.update()

    def _bank_options(self) -> BankOptions:
        sharded = self.config.bank_sharding == "sharded"
        return BankOptions(len(self.labels), self.config.bank_dtype, sharded)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return L_CE, the mean over B images, in float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def preservation_options(config: CTCConfig) -> PreservationOptions:
    """Return what the stage-2 term is told of a config."""
    return PreservationOptions(
        temperature=config.tau2,
        momentum=config.m2,
        dim=config.dim2,
        estimator=config.estimator,
        negatives=config.num_negatives,
        shared=config.negatives == "shared",
        pool=config.pool,
        strata=config.strata,
        replacement=config.replacement,
        other_class_only=config.other_class_only,
        z_decay=config.z_decay if config.z == "ema" else 1.0,
    )


def check_negatives(config: CTCConfig, labels: Tensor) -> None:
    """Refuse to draw more negatives than there are, where none may be drawn twice.

    Raises:
        InputError: saying how many there are.
    """
    largest_group = int(torch.bincount(labels).max()) if config.other_class_only else 1
    others = len(labels) - largest_group
    if config.beta > 0 and others == 0:
        raise InputError("CTC's stage 2 needs images of at least two classes (or ctc.beta 0)")
    if config.replacement == "never" and config.num_negatives > others:
        raise InputError(
            f"ctc.num_negatives {config.num_negatives} exceeds the {others} images to draw from; "
            "lower it, set it to 0 (all of them), or set ctc.replacement to auto"
        )


def check(config: CTCConfig) -> None:
    """Refuse settings that cannot be.

    Raises:
        InputError: naming the key and what would be right.
    """
    for key, known in CHOICES.items():
        if getattr(config, key) not in known:
            value = getattr(config, key)
            raise InputError(f"ctc.{key} {value!r} is not one of {', '.join(known)}")
    for key in ("tau1", "tau2", "dim1", "dim2"):
        if not getattr(config, key) > 0:
            raise InputError(f"ctc.{key} {getattr(config, key)} must be above 0")
    for key in ("alpha", "beta", "num_negatives", "pool", "strata"):
        if getattr(config, key) < 0:
            raise InputError(f"ctc.{key} {getattr(config, key)} must not be negative")
    for key in ("m1", "m2", "z_decay"):
        if not 0 <= getattr(config, key) < 1:
            raise InputError(f"ctc.{key} {getattr(config, key)} must be in [0, 1)")
    if 0 < config.pool < config.num_negatives:
        raise InputError(
            f"ctc.pool {config.pool} is smaller than ctc.num_negatives {config.num_negatives}"
        )
    world = dist.world_size() if config.bank_sharding == "sharded" else 1
    if config.strata % world:
        raise InputError(f"ctc.strata {config.strata} must be a multiple of the {world} ranks")
    strata = max(config.strata, world)
    if 0 < config.num_negatives < strata:
        raise InputError(
            f"ctc.num_negatives {config.num_negatives} must be at least the {strata} strata (one "
            "for each shard) that they are drawn from"
        )
