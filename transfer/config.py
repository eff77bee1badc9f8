"""The keys of a transfer config: each once, with its default and reason."""

import dataclasses
from typing import Any

from core import identity
from core.config import load_config, shipped_config, to_dict
from core.errors import InputError
from data.datasets import DATASETS, DataConfig, resolved
from models import amp
from models.features import DTYPES
from training.loop import LoopConfig
from transfer import finetune, linear
from transfer.finetune import FinetuneConfig
from transfer.linear import LinearConfig
from transfer.released import ReleasedConfig


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """How features are computed and kept."""

    batch_size: int = 256  # images a step on each rank
    amp: str = "none"  # none, bf16, fp16, auto: precision of the forward pass
    dtype: str = "auto"  # what they are stored in: float32, float16, or auto (see stored_dtype)
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
    protocol: str = ""  # how rows name the probe or the fine-tuning; "": after the method
    seed: int = -1  # of heads, draws and augmentation; -1: the checkpoint's own
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(name=""))
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
SHIPPED = {"knn": "linear", "few_shot": "linear", "released": "released"}  # else by protocol
IN_NAMES = ("data.name", "data.image_size", "data.limit")  # keys that a row's names state
LARGE = 1_000_000  # images: from here on features are stored in 16 bits


def stored_dtype(config: FeatureConfig, images: int) -> str:
    """Return what features are stored in; "auto" takes float16 for a training split above LARGE."""
    return config.dtype if config.dtype != "auto" else "float16" if images > LARGE else "float32"


def recipe_of(config: TransferConfig, method: str) -> dict[str, Any]:
    """Return the part of a config that a number of a method depends on.

    The data set's own values are filled in; the number of neighbours or shots is in its name.
    """
    content = to_dict(config) | {"data": to_dict(resolved(config.data))}
    del content["knn"]["neighbours"], content["few_shot"]["shots"]
    return {group: content[group] for group in READ_BY[method]}


def changed_keys(config: TransferConfig, own: TransferConfig, method: str) -> dict[str, Any]:
    """Return the keys (dotted) that make a method's number another one than its name promises.

    The name is that of a recipe of this suite, whoever wrote the config.

    Args:
        own: what the config was before single keys were changed, for names that are not shipped.
    """
    path = shipped_config(SHIPPED.get(method, config.protocol or method), "transfer")
    named = load_config(TransferConfig, path) if path else own
    named = dataclasses.replace(named, data=dataclasses.replace(named.data, name=config.data.name))
    changed = identity.changed_keys(recipe_of(config, method), recipe_of(named, method))
    return {key: value for key, value in changed.items() if key not in IN_NAMES}


def check(config: TransferConfig) -> None:
    """Validate a config before any data are read.

    Raises:
        InputError: naming the key and what would be right.
    """
    identity.check_version(config.version)
    if not config.data.name:
        raise InputError(f"no data set: name one with --data, of {', '.join(DATASETS)}")
    if config.protocol == "released" and config.methods != ["released"]:
        raise InputError("protocol released is a recipe: --config transfer/released.yaml")
    if config.protocol and {"linear", "finetune"} <= set(config.methods):
        raise InputError("protocol names a probe or a fine-tuning: methods may hold one of them")
    if config.features.dtype not in (*DTYPES, "auto"):
        known = ", ".join((*DTYPES, "auto"))
        raise InputError(f"features.dtype {config.features.dtype!r} is not one of {known}")
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
