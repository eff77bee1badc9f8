"""Every key of a recipe with values that cannot be: one sentence, before anything is written."""

from pathlib import Path

import pytest

from core.config import InputError, load_config, save_config, schema_keys
from pretrain.plan import plan
from pretrain.recipe import CTCConfig, PretrainConfig, StageConfig
from pretrain.run import pretrain
from tests.faults import COMMON, STAGES

NEGATIVE, NO_NUMBER = ["-1", ".nan", ".inf", "x", "null"], [".nan", "x"]
COUNT, SWITCH = ["-1", "1.5", "many"], ["maybe", "null"]
STAGE = {
    "epochs": COUNT,
    "lr": NEGATIVE,
    "weight_decay": NEGATIVE,
    "schedule": ["cosin", "null"],
    "warmup_epochs": NEGATIVE,
    "end_factor": NEGATIVE,
    "milestones": ["5", "[-1]", "[a]"],
    "gamma": NEGATIVE,
}
CTC = {
    "alpha": NEGATIVE,
    "tau1": ["0", *NEGATIVE],
    "m1": ["1", *NEGATIVE],
    "dim1": ["0", *COUNT],
    "train_projection": SWITCH,
    "beta": NEGATIVE,
    "tau2": ["0", *NEGATIVE],
    "m2": ["1", *NEGATIVE],
    "dim2": ["0", *COUNT],
    "estimator": ["nec"],
    "num_negatives": [*COUNT, "2000000000"],
    "negatives": ["each"],
    "pool": [*COUNT, "5"],
    "bank_refresh": SWITCH,
    "bank_dtype": ["int8"],
    "bank_sharding": ["split"],
}
LOOP = {
    "batch_size": ["0", "49", *COUNT],
    "optimizer": ["adagrad"],
    "momentum": ["1", *NEGATIVE],
    "betas": ["5", "[0.9]", "[0.9, 1]", "[.nan, 0.9]"],
    "nesterov": SWITCH,
    "decay_norm_and_bias": SWITCH,
    "clip_grad_norm": NEGATIVE,
    "amp": ["fp8"],
    "channels_last": SWITCH,
    "sync_bn": ["true", *SWITCH],
    "save_every": ["0", *COUNT],
    "resume_every": COUNT,
    "eval_every": COUNT,
    "log_every": ["0", *COUNT],
    "device": ["gpu", "cuda:99", "cuda:-1"],
    "timeout": ["0", "100000000000000000", *COUNT],
}
DATA = {
    "name": ["cifar"],
    "root": ["/nowhere"],
    "image_size": ["4", *COUNT],
    "augmentation": ["crop"],
    "shuffle": ["local", "shards"],  # the tiny data are not in shards
    "workers": COUNT,
    "limit": ["3", *COUNT],  # of 3 images there is no batch of 16
    "partial": SWITCH,
    "val_fraction": ["1", *NEGATIVE],
    "resize_ratio": ["0.5", "-3", *NO_NUMBER],
    "mean": ["5", "[1]", "[.nan, 0, 0]", "[a, b, c]"],
    "std": ["5", "[0, 1, 1]", "[.inf, 1, 1]"],
}
BAD: dict[str, list[str]] = {
    **{f"ctc.{key}": values for key, values in CTC.items()},
    **{
        f"{stage}.{key}": values
        for stage in ("ctc.stage1", "ctc.stage2", "ce.stage")
        for key, values in STAGE.items()
    },
    **{f"loop.{key}": values for key, values in LOOP.items()},
    **{f"data.{key}": values for key, values in DATA.items()},
    "ce.label_smoothing": ["1", *NEGATIVE],
    "version": ["0", *COUNT],
    "seed": ["-1", "1000000000000000000000", "x"],
    "method": ["cte"],
    "arch": ["resnet51"],
    "zero_init_residual": SWITCH,
    "drop_path_rate": ["1", "0.1", *NEGATIVE],  # 0.1: not of our ResNets
    **{group: ["5", "null"] for group in ("ctc", "ctc.stage1", "loop", "data")},
}


def test_no_key_is_left_out() -> None:
    names = {"recipe", "init"}  # any text
    keys = set(schema_keys(PretrainConfig)) - names
    groups = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    assert keys - groups <= BAD.keys()
    assert set(schema_keys(StageConfig)) == STAGE.keys()
    assert {key for key in schema_keys(CTCConfig) if "stage" not in key} == CTC.keys()


@pytest.fixture(scope="module")
def recipes(tiny_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A recipe that can be, for each method."""
    folder, found = tmp_path_factory.mktemp("recipes"), {}
    for method in ("ce", "ctc"):
        words = ["method", method, *COMMON, *STAGES[method], "data.root", str(tiny_npz)]
        found[method] = folder / f"{method}.yaml"
        save_config(load_config(PretrainConfig, None, words), found[method])
        plan(load_config(PretrainConfig, found[method]), folder / "run", False)
    return found


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in BAD for value in BAD[key]])
def test_a_value_that_cannot_be_is_one_sentence_that_names_its_key_and_leaves_nothing(
    tmp_path: Path, recipes: dict[str, Path], key: str, value: str
) -> None:
    recipe = recipes["ce" if key.startswith("ce.") else "ctc"]
    with pytest.raises(InputError) as caught:
        config = load_config(PretrainConfig, recipe, [key, value])
        with pytest.raises(InputError):
            plan(config, tmp_path / "run", False)
        pretrain(config, tmp_path / "run")
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert key.split(".")[-1] in said or value in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["loop.nesterov", "true", "loop.momentum", "0"],
        ["ctc.pool", "7", "ctc.num_negatives", "8"],
        ["loop.batch_size", "16", "data.val_fraction", "0.9"],
    ],
)
def test_values_that_cannot_be_together_are_refused(
    tmp_path: Path, recipes: dict[str, Path], words: list[str]
) -> None:
    config = load_config(PretrainConfig, recipes["ctc"], words)
    with pytest.raises(InputError, match=words[0].split(".")[1]):
        pretrain(config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
