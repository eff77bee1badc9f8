"""Which numbers may be compared: equal recipes, data and versions, whatever place and folder."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core import identity
from core.config import load_config, to_dict
from core.results import ResultRow, latest
from data.catalogue import look_up
from data.datasets import DataConfig, open_dataset
from data.pack import PackConfig, pack
from pretrain.recipe import PretrainConfig
from pretrain.run import changed_from_shipped, recipe_of

ROW = ResultRow(
    step="transfer", protocol="linear", dataset="cub200", split="test", metric="top1", value=1.0,
    unit="%", init="ce", seed=1, weights="w", config="c", data="a/b",
)  # fmt: skip


def _changed(**changes: Any) -> ResultRow:
    return dataclasses.replace(ROW, **changes)


@pytest.mark.parametrize(
    ("key", "neutral"),
    [
        ("seed", True), ("data.root", True), ("data.workers", True), ("targets.1.root", True),
        ("loop.device", True), ("loop.save_every", True), ("features.batch_size", True),
        ("MODEL.DEVICE", True), ("SUITE.SHAPES.SEED", True), ("DATASETS.TRAIN", True),
        ("loop.batch_size", False), ("clustering_seeds", False), ("information.seeds", False),
        ("information.xt.protocol", False), ("data.name", False), ("SOLVER.BASE_LR", False),
        ("MODEL.RESNETS.DEPTH", False), ("TEST.PRECISE_BN.ENABLED", False),
    ],
)  # fmt: skip
def test_keys_are_neutral_wherever_they_stand(key: str, neutral: bool) -> None:
    assert identity.is_neutral(key) is neutral


def test_a_recipe_hash_depends_on_what_is_computed_alone() -> None:
    recipe = {"loop": {"batch_size": 64, "device": "cpu"}, "data": [{"root": "a", "name": "npz"}]}
    same = {"data": [{"name": "npz", "root": "b"}], "loop": {"device": "cuda", "batch_size": 64}}
    other = {"data": [{"root": "a", "name": "npz"}], "loop": {"batch_size": 32, "device": "cpu"}}
    assert identity.recipe_hash(recipe) == identity.recipe_hash(same)
    assert identity.recipe_hash(recipe) != identity.recipe_hash(other)
    assert identity.recipe_hash(recipe) == identity.recipe_hash(identity.effective(recipe))


def test_a_key_added_later_leaves_the_hash_at_the_value_that_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = identity.recipe_hash({"loop": {"lr": 0.1}})
    monkeypatch.setattr(identity, "ADDED", {"loop.ema": False})
    assert identity.recipe_hash({"loop": {"lr": 0.1, "ema": False}}) == before
    assert identity.recipe_hash({"loop": {"lr": 0.1, "ema": True}}) != before


def test_changed_keys_are_named_also_those_that_only_the_old_recipe_has() -> None:
    new = {"lr": 0.1, "sizes": (1, 2), "seed": 1}
    old = {"lr": 0.2, "sizes": [1, 2], "seed": 2, "clip": 1.0}
    assert identity.changed_keys(new, old) == {"lr": 0.1, "clip": None}


def test_a_pretraining_does_not_depend_on_the_other_objective_nor_on_workers_but_on_defaults() -> (
    None
):
    base = PretrainConfig(method="ce")

    def hashed(**changes: Any) -> str:
        return identity.recipe_hash(recipe_of(dataclasses.replace(base, **changes)))

    ctc = dataclasses.replace(base.ctc, alpha=0.9)
    assert hashed(ctc=ctc) == hashed()
    assert hashed(method="ctc", ctc=ctc) != hashed(method="ctc")
    elsewhere = dataclasses.replace(base.data, workers=7, root="elsewhere")
    assert hashed(data=elsewhere, seed=5, init="mine", recipe="other") == hashed()
    assert hashed(data=dataclasses.replace(base.data, limit=10)) != hashed()
    assert "loop.momentum" in identity.effective(to_dict(base))  # a default


@pytest.mark.parametrize(
    "changes",
    [{"config": "other"}, {"data": "a/other"}, {"version": 2}, {"protocol": "linear+1"}],
)
def test_rows_of_another_recipe_data_or_version_are_neither_trials_nor_repetitions(
    changes: dict[str, Any],
) -> None:
    other = _changed(**changes)
    assert identity.identity(other) != identity.identity(ROW)
    assert not identity.done([other], [ROW])
    assert latest([ROW, other]) == [ROW, other]


def test_trials_share_an_identity_and_repetitions_a_measurement() -> None:
    trial = _changed(seed=2, weights="v", code="another commit", run="elsewhere", value=3.0)
    assert identity.identity(trial) == identity.identity(ROW)
    assert identity.measurement(trial) != identity.measurement(ROW)
    again = _changed(value=5.0, code="another commit", run="elsewhere", weights_path="moved")
    assert latest([ROW, again]) == [again]
    assert identity.done([again], [_changed(value=None)])
    assert not identity.done([again], [ROW, trial])


def test_rows_of_schema_1_are_of_unknown_identity_and_equal_no_known_one() -> None:
    old = _changed(schema=1)
    assert identity.identity(ROW).known
    assert not identity.identity(old).known
    assert not identity.done([old], [ROW])
    assert identity.identity(old) == identity.identity(_changed(schema=1, seed=2))
    assert latest([old, _changed(schema=1, config="with the seed", value=2.0)])[0].value == 2.0


def _npz(path: Path, labels: list[int], first_pixel: int = 0) -> Path:
    images = np.zeros((6, 8, 8, 3), np.uint8)
    images[0, 0, 0, 0] = first_pixel
    path.parent.mkdir(exist_ok=True)
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(path, classes=["a", "b"], **arrays)  # type: ignore[arg-type]
    return path


def _digest(name: str, root: Path, split: str = "train", **changes: Any) -> str:
    return open_dataset(DataConfig(name=name, root=str(root), **changes), split).digest


def test_a_digest_of_images_in_memory_is_their_content_not_their_file(tmp_path: Path) -> None:
    one = _npz(tmp_path / "a" / "one.npz", [0, 1, 0, 1, 0, 1])
    same = _npz(tmp_path / "b" / "two.npz", [0, 1, 0, 1, 0, 1])
    labels = _npz(tmp_path / "c" / "one.npz", [1, 0, 0, 1, 0, 1])
    pixels = _npz(tmp_path / "d" / "one.npz", [0, 1, 0, 1, 0, 1], 9)
    assert _digest("npz", one) == _digest("npz", same) == _digest("npz", one, workers=3)
    assert len({_digest("npz", path) for path in (one, labels, pixels)}) == 3
    assert _digest("npz", one, limit=4) != _digest("npz", one)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three 8 px images in train, one in test."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            place = tmp_path / "animals" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(image).save(place / f"{name}{i}.png")
    return tmp_path / "animals"


def test_a_digest_of_a_folder_moves_with_it_and_changes_with_its_labels(
    folder: Path, tmp_path: Path
) -> None:
    before = {split: _digest("folder", folder, split) for split in ("train", "test")}
    assert before["train"] != before["test"]
    moved = folder.rename(tmp_path / "elsewhere")
    assert {split: _digest("folder", moved, split) for split in before} == before
    (moved / "train" / "cat" / "cat0.png").rename(moved / "train" / "dog" / "cat0.png")
    assert _digest("folder", moved) != before["train"]


@pytest.mark.parametrize("change", ["a class's name", "a file's size", "an image less"])
def test_a_digest_of_a_folder_changes_with_its_classes_and_files(folder: Path, change: str) -> None:
    before, train = _digest("folder", folder), folder / "train"
    if change == "a class's name":
        (train / "cat").rename(train / "cats")
        (folder / "test" / "cat").rename(folder / "test" / "cats")
    elif change == "a file's size":
        with (train / "cat" / "cat0.png").open("ab") as file:
            file.write(b"\0")
    else:
        (train / "cat" / "cat0.png").unlink()
    assert _digest("folder", folder) != before


def test_a_digest_of_files_opens_none_of_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(DataConfig(name="folder", root=str(folder)), "train")
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("an image was opened"))
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("an image was opened"))
    assert dataset.digest


def test_a_digest_of_shards_moves_with_them(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "shards"
    pack(PackConfig(DataConfig(name="folder", root=str(folder)), images_per_shard=4), target)
    before = _digest("shards", target)
    shutil.move(target, tmp_path / "moved")
    assert _digest("shards", tmp_path / "moved") == before


def test_a_data_digest_names_what_is_learned_from_and_what_is_evaluated_on() -> None:
    learned, evaluated = identity.data_digest(["a", "b"], ["c"]).split("/")
    assert identity.data_digest([], ["c"]) == f"/{evaluated}"
    assert identity.data_digest(["b"], ["c"]) != f"{learned}/{evaluated}"


def test_a_recipe_of_a_shipped_name_that_computes_something_else_is_told_apart() -> None:
    shipped = load_config(PretrainConfig, "pretrain/ce_shapes.yaml")
    config = dataclasses.replace(shipped, recipe="ce_shapes", seed=9, init="mine")
    assert changed_from_shipped(config) == {}
    changed = load_config(PretrainConfig, "pretrain/ce_shapes.yaml", ["loop.batch_size", "8"])
    changed = dataclasses.replace(changed, recipe="ce_shapes")
    assert changed_from_shipped(changed) == {"loop.batch_size": 8}
    assert changed_from_shipped(dataclasses.replace(changed, recipe="my_own")) == {}
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, name="cifar10"))
    assert changed_from_shipped(elsewhere) == {}  # rows name the data set
    assert recipe_of(elsewhere)["data"]["mean"] == list(look_up("cifar10").mean)
    name = identity.protocol_name("ce_shapes", {"loop.batch_size": 8})
    assert name.startswith("ce_shapes+")
    assert name != identity.protocol_name("ce_shapes", {"loop.batch_size": 16})
    assert identity.protocol_name("ce_shapes", {}) == "ce_shapes"
