"""What a recipe can say of cross-entropy and of CTC: every key with its reason, and what cannot be.

Shapes: N training images, K negatives.
"""

import dataclasses

import torch
from torch import Tensor

from core import dist
from core.errors import InputError
from pretrain.losses import ESTIMATORS
from pretrain.memory import DTYPES
from pretrain.negatives import LONGEST_ORDER, pool_rows, share_of
from training.schedule import SCHEDULES, Stage


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

    def stage(self, name: str, key: str) -> Stage:
        """Return it under a name; ``key`` is where it stands in the config, for sentences.

        Raises:
            InputError: a value that cannot be.
        """
        if self.schedule not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise InputError(f"{key}.schedule {self.schedule!r} is not one of {known}")
        for field in ("epochs", "lr", "weight_decay", "warmup_epochs", "end_factor", "gamma"):
            if not getattr(self, field) >= 0:
                raise InputError(f"{key}.{field} {getattr(self, field)} must not be negative")
        if min(self.milestones, default=0) < 0:
            raise InputError(f"{key}.milestones {self.milestones} must not be negative")
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


def ce_stages(config: CEConfig) -> list[Stage]:
    """Return cross-entropy's one stage."""
    return [config.stage.stage("ce", "ce.stage")]


def ctc_stages(config: CTCConfig) -> list[Stage]:
    """Return CTC's two stages."""
    return [config.stage1.stage("ctc1", "ctc.stage1"), config.stage2.stage("ctc2", "ctc.stage2")]


def check_ce(config: CEConfig) -> None:
    """Refuse settings that cannot be, as ``check_ctc``."""
    ce_stages(config)
    if not 0 <= config.label_smoothing < 1:
        raise InputError(f"ce.label_smoothing {config.label_smoothing} must be in [0, 1)")


def check_ctc(config: CTCConfig) -> None:
    """Refuse settings that cannot be, whatever the data.

    Raises:
        InputError: naming the key and what would be right.
    """
    ctc_stages(config)
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
    world = _shards(config)
    if config.strata % world:
        raise InputError(f"ctc.strata {config.strata} must be a multiple of the {world} ranks")
    strata = max(config.strata, world)
    if 0 < config.num_negatives < strata:
        raise InputError(
            f"ctc.num_negatives {config.num_negatives} must be at least the {strata} strata (one "
            "for each shard) that they are drawn from"
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
    independent = config.replacement != "never" and config.num_negatives > others
    if config.beta > 0 and (independent or config.replacement == "always"):
        order = pool_rows(
            len(labels),
            largest_group,
            config.num_negatives,
            shared=config.negatives == "shared",
            replace=True,
            asked=config.pool,
        )
        if order > LONGEST_ORDER:
            raise InputError(
                f"ctc.num_negatives {config.num_negatives} and ctc.pool {config.pool} mean an "
                f"order of {order:,} bank rows a step; at most {LONGEST_ORDER:,} can be drawn"
            )
    if config.replacement == "never" and config.num_negatives > others:
        raise InputError(
            f"ctc.num_negatives {config.num_negatives} exceeds the {others} images to draw from; "
            "lower it, set it to 0 (all of them), or set ctc.replacement to auto"
        )
    strata = config.strata or _shards(config)
    if strata > len(labels):
        raise InputError(f"ctc.strata {strata} exceeds the {len(labels)} images")
    if config.replacement == "never" and config.beta > 0:
        groups = labels if config.other_class_only else torch.arange(len(labels))
        for number in range(strata):
            part, share = groups[number::strata], share_of(number, strata, config.num_negatives)
            there = len(part) - int(torch.unique(part, return_counts=True)[1].max())
            if share > there:
                raise InputError(
                    f"ctc.num_negatives {config.num_negatives} asks for {share} of the {there} "
                    f"images that one of the {strata} strata has to draw from; lower it, or set "
                    "ctc.replacement to auto"
                )


def _shards(config: CTCConfig) -> int:
    """Return the parts that each bank lies in."""
    return dist.world_size() if config.bank_sharding == "sharded" else 1
