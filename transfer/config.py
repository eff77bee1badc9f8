"""What a transfer can be told: every key once, with its default and reason."""

import dataclasses
from typing import Any

from core import identity
from core.config import to_dict
from core.errors import InputError
from data.datasets import DataConfig
from models import amp
from models.features import DTYPES
from training.loop import LoopConfig
from transfer import finetune, linear
from transfer.finetune import FinetuneConfig
from transfer.linear import LinearConfig
from transfer.released import ReleasedConfig

RELEASED = "released"  # the protocol that puts the paper code's probe in the place of the methods


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """How features are computed and kept."""

    batch_size: int = 256  # images a step on each rank
    amp: str = "none"  # none, bf16, fp16, auto: precision of the forward pass
    dtype: str = "float32"  # float32, float16: what they are stored in
    cache: str = ""  # folder; "": runs/.cache/features; "none": nothing is kept


@dataclasses.dataclass(frozen=True)
class KnnConfig:
    """Cosine nearest neighbours (arXiv 1805.01978)."""

    neighbours: list[int] = dataclasses.field(default_factory=lambda: [20, 200])
    temperature: float = 0.07


@dataclasses.dataclass(frozen=True)
class FewShotConfig:
    """Logistic regression on a few images a class."""

    shots: list[int] = dataclasses.field(default_factory=lambda: [1, 5, 10])
    draws: int = 5
    c: float = 1.0  # of L2-normalised features; as arXiv 2003.11539


@dataclasses.dataclass(frozen=True)
class TransferConfig:
    """Which protocols, on which data."""

    version: int = 1  # of the protocol: raised when what it computes changes
    methods: list[str] = dataclasses.field(default_factory=lambda: ["linear"])  # keys of METHODS
    protocol: str = ""  # how rows name the recipe; "": after the method; "released": see RELEASED
    seed: int = -1  # of heads, draws and augmentation; -1: the checkpoint's own
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    features: FeatureConfig = dataclasses.field(default_factory=FeatureConfig)
    linear: LinearConfig = dataclasses.field(default_factory=LinearConfig)
    knn: KnnConfig = dataclasses.field(default_factory=KnnConfig)
    few_shot: FewShotConfig = dataclasses.field(default_factory=FewShotConfig)
    released: ReleasedConfig = dataclasses.field(default_factory=ReleasedConfig)
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)


READ_BY: dict[str, tuple[str, ...]] = {  # the groups of keys that a method's number depends on
    "linear": ("data", "features", "linear"),
    "knn": ("data", "features", "knn"),
    "few_shot": ("data", "features", "few_shot"),
    "released": ("data", "released"),
    "finetune": ("data", "finetune", "loop"),
}
IN_ROWS = ("data.name", "data.image_size", "data.limit")  # keys that a protocol's name tells anyway


def recipe_of(config: TransferConfig, method: str) -> dict[str, Any]:
    """Return the part of a config that a method reads."""
    content = to_dict(config)
    return {group: content[group] for group in READ_BY[method]}


def changed_keys(config: TransferConfig, recipe: TransferConfig, method: str) -> dict[str, Any]:
    """Return the keys (dotted) of what a method reads that are not as in its recipe."""
    changed = identity.changed_keys(recipe_of(config, method), recipe_of(recipe, method))
    return {key: value for key, value in changed.items() if key not in IN_ROWS}


def methods_of(config: TransferConfig) -> list[str]:
    """Return the methods to run.

    Raises:
        InputError: ``protocol released``, which is a probe's, for a fine-tuning.
    """
    if config.protocol != RELEASED:
        return config.methods
    if "finetune" in config.methods:
        raise InputError(
            "protocol released is the paper code's linear probe: use a …_linear.yaml, for this "
            "recipe's methods hold finetune"
        )
    return [RELEASED]


def check(config: TransferConfig) -> None:
    """Refuse what cannot be run, before any data are read.

    Raises:
        InputError: naming the key and what would be right.
    """
    if config.features.dtype not in DTYPES:
        raise InputError(
            f"features.dtype {config.features.dtype!r} is not one of {', '.join(DTYPES)}"
        )
    if config.features.amp not in amp.CHOICES:
        raise InputError(f"features.amp {config.features.amp!r} is not one of {amp.CHOICES}")
    if config.features.batch_size < 1:
        raise InputError(f"features.batch_size is {config.features.batch_size}; at least 1")
    if min(config.knn.neighbours, default=0) < 1 or config.knn.temperature <= 0:
        raise InputError("knn.neighbours and knn.temperature must be above 0")
    if min(config.few_shot.shots, default=0) < 1 or config.few_shot.draws < 2:
        raise InputError("few_shot.shots must be above 0, and few_shot.draws at least 2")
    linear.check(config.linear)
    finetune.check(config.finetune)
