"""The keys of a pretraining, each with its reason, and which values are accepted.

Shapes: N training images, K negatives.
"""

import dataclasses
from typing import Any

from core.config import load_config, shipped_config, to_dict
from core.errors import InputError
from core.identity import changed_keys, effective
from data.datasets import DataConfig, resolved
from pretrain.losses import ESTIMATORS
from pretrain.memory import DTYPES
from training.loop import LoopConfig
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
        """Return the named stage; ``key`` is its place in the config, for messages.

        Raises:
            InputError: a value out of range.
        """
        if self.schedule not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise InputError(f"{key}.schedule {self.schedule!r} is not one of {known}")
        for field in ("epochs", "lr", "weight_decay", "warmup_epochs", "end_factor", "gamma"):
            if not getattr(self, field) >= 0:
                raise InputError(f"{key}.{field} {getattr(self, field)} must not be negative")
        if min(self.milestones, default=0) < 0:
            raise InputError(f"{key}.milestones {self.milestones} must not be negative")
        if self.milestones and self.schedule != "multistep":
            raise InputError(f"{key}.milestones are set, but {self.schedule} does not read them")
        if 0 < self.epochs < self.warmup_epochs:
            raise InputError(
                f"{key}.warmup_epochs {self.warmup_epochs:g} exceeds {key}.epochs {self.epochs}"
            )
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Stage(name, **(fields | {"milestones": tuple(self.milestones)}))


@dataclasses.dataclass(frozen=True)
class CEConfig:
    """Cross-entropy. The defaults are the "vanilla" CIFAR-100 recipe of the CTC code."""

    stage: StageConfig = dataclasses.field(
        default_factory=lambda: StageConfig(200, 0.05, 5e-4, warmup_epochs=5, end_factor=0.1)
    )
    label_smoothing: float = 0.0  # 0: none, as released

    def stages(self) -> list[Stage]:
        """Return the one stage, after validating all keys.

        Raises:
            InputError: naming the key and what would be right.
        """
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"ce.label_smoothing {self.label_smoothing} must be in [0, 1)")
        return [self.stage.stage("ce", "ce.stage")]


@dataclasses.dataclass(frozen=True)
class CTCConfig:
    """CTC (arXiv 2203.03871). The defaults are the CIFAR-100 recipe "for transferability".

    Where a default deviates from the released code, the key's comment names the released value.
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
    # rows that a step's per_sample negatives come from, at least K; 0: 4 K (released: all N)
    pool: int = 0
    bank_refresh: bool = False  # stage 2's banks start as the frozen network's embeddings
    # the banks
    bank_dtype: str = "fp32"  # fp32 (released), bf16 or fp16
    bank_sharding: str = "replicated"  # whole on every rank, or sharded over the ranks

    def stages(self) -> list[Stage]:
        """Return the two stages, after validating all keys.

        Raises:
            InputError: naming the key and what would be right.
        """
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                value = getattr(self, key)
                raise InputError(f"ctc.{key} {value!r} is not one of {', '.join(known)}")
        for key in ("tau1", "tau2", "dim1", "dim2"):
            if not getattr(self, key) > 0:
                raise InputError(f"ctc.{key} {getattr(self, key)} must be above 0")
        for key in ("alpha", "beta", "num_negatives", "pool"):
            if getattr(self, key) < 0:
                raise InputError(f"ctc.{key} {getattr(self, key)} must not be negative")
        for key in ("m1", "m2"):
            if not 0 <= getattr(self, key) < 1:
                raise InputError(f"ctc.{key} {getattr(self, key)} must be in [0, 1)")
        if 0 < self.pool < self.num_negatives:
            raise InputError(
                f"ctc.pool {self.pool} is smaller than ctc.num_negatives {self.num_negatives}"
            )
        return [self.stage1.stage("ctc1", "ctc.stage1"), self.stage2.stage("ctc2", "ctc.stage2")]


CHOICES = {
    "estimator": ESTIMATORS,
    "negatives": ("per_sample", "shared"),
    "bank_dtype": tuple(DTYPES),
    "bank_sharding": ("replicated", "sharded"),
}


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """A pretraining recipe."""

    version: int = 1  # of the recipe: raised when what it computes changes
    recipe: str = ""  # its name in result rows; the tool sets the file's
    init: str = ""  # the initialisation's name in tables; "": the method
    method: str = "ce"  # ce, ctc, or random: only the initialisation is saved, as epoch 0
    arch: str = "resnet50"  # a name of models.factory: resnet50, timm/NAME or FILE.py:FUNCTION
    zero_init_residual: bool = False  # every residual branch starts at zero (arXiv 1706.02677, 5.1)
    # in our ResNets; timm's networks and a user's keep their own initialisation
    drop_path_rate: float = 0.0  # stochastic depth of timm's networks (arXiv 1603.09382)
    seed: int = 1  # of weights, order, augmentation, negatives
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    ce: CEConfig = dataclasses.field(default_factory=CEConfig)  # read when method is ce
    ctc: CTCConfig = dataclasses.field(default_factory=CTCConfig)  # read when method is ctc
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)


def check_read(config: PretrainConfig) -> None:
    """Raise InputError if a key is set that nothing reads."""
    recipe, default = to_dict(config), to_dict(PretrainConfig())
    for group in {"ce", "ctc"} - {config.method} if config.method != "random" else ():
        for key in changed_keys({group: recipe[group]}, {group: default[group]}):
            raise InputError(f"{key} is set, but method {config.method} does not read it")


def recipe_of(config: PretrainConfig) -> dict[str, Any]:
    """Return the part of a config that its method reads, the data set's own values filled in."""
    unread = {"ce", "ctc"} - {config.method}
    content = to_dict(config) | {"data": to_dict(resolved(config.data))}
    return {key: value for key, value in content.items() if key not in unread}


def changed_from_shipped(config: PretrainConfig) -> dict[str, Any]:
    """Return the keys that differ from this suite's recipe of that name, none if there is none."""
    path = shipped_config(config.recipe, "pretrain")
    if path is None:
        return {}
    shipped = load_config(PretrainConfig, path)
    data = dataclasses.replace(shipped.data, name=config.data.name)  # which rows name
    return changed_keys(recipe_of(config), recipe_of(dataclasses.replace(shipped, data=data)))


def identifying(config: PretrainConfig) -> dict[str, Any]:
    """Return by key all that the weights depend on, beside the data."""
    own = {"version": config.version, "seed": config.seed}
    return effective(recipe_of(config)) | own
