"""Data sets: pure augmentation, honest splits, one clear sentence for whatever is wrong."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import load_config
from core.errors import InputError
from data.datasets import (
    AUGMENTATIONS,
    DataConfig,
    hold_out,
    open_dataset,
    report_split,
    splits_of,
)


def _npz(path, name="npz", **keys):
    return DataConfig(name=name, root=str(path), **keys)


def _save_npz(path, count=20, **changes):
    generator = np.random.default_rng(0)
    content = {"classes": np.array(["a", "b"])}
    for split in ("train", "test"):
        content[f"x_{split}"] = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        content[f"y_{split}"] = np.arange(count) % 2
    np.savez(path, **(content | changes))
    return path


def _picture(path, value, size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 100, 50)).save(path)


@pytest.fixture
def folder(tmp_path):
    """train: 3 classes × 4 images; test: 3 × 2."""
    for split, count in (("train", 4), ("test", 2)):
        for k, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                _picture(tmp_path / split / name / f"{i}.png", 80 * k + i)
    return tmp_path


@pytest.mark.parametrize("augmentation", [n for n in AUGMENTATIONS if n != "none"])
def test_augmented_image_is_a_function_of_seed_epoch_and_index(tiny_npz, augmentation):
    cfg = _npz(tiny_npz, augmentation=augmentation)
    data = open_dataset(cfg, "train", train=True, seed=5)
    first = [data[epoch, index][0] for epoch in range(3) for index in (4, 9)]
    torch.rand(7)
    other_order = open_dataset(cfg, "train", train=True, seed=5)
    again = [other_order[epoch, index][0] for epoch in (2, 1, 0) for index in (9, 4)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    views = [open_dataset(cfg, "train", train=True, seed=s)[e, 4][0] for s, e in ((5, 0), (6, 0))]
    many = [data[epoch, 4][0] for epoch in range(12)]
    assert not all(torch.equal(many[0], view) for view in many)
    assert any(
        not torch.equal(data[e, 4][0], open_dataset(cfg, "train", train=True, seed=6)[e, 4][0])
        for e in range(6)
    )
    assert views[0].shape == (3, 32, 32)


def test_augmentation_leaves_the_global_random_state_alone(tiny_npz):
    data = open_dataset(_npz(tiny_npz), "train", train=True)
    before = torch.get_rng_state()
    data[3, 7]
    assert torch.equal(torch.get_rng_state(), before)


def test_plain_index_gives_the_evaluation_view_whatever_the_augmentation(tiny_npz):
    plain = open_dataset(_npz(tiny_npz, image_size=16), "train")
    augmented = open_dataset(_npz(tiny_npz, image_size=16), "train", train=True)
    stored = np.load(tiny_npz)["x_train"]
    for index in (0, 17, 47):
        image, label, position = augmented[index]
        assert torch.equal(image, plain[index][0])
        assert np.array_equal(image.permute(1, 2, 0).numpy(), stored[index])
        assert (label, position) == (index % 3, index)
    assert torch.equal(plain[5, 3][0], plain[3][0])  # opened without train: never augmented


def test_index_outside_the_data_is_an_index_error(tiny_npz):
    data = open_dataset(_npz(tiny_npz), "test")
    assert len(data) == 24
    for index in (24, -1):
        with pytest.raises(IndexError):
            data[index]


def test_shapes_are_the_default_and_need_nothing_on_disk():
    data = open_dataset(DataConfig(limit=40), "val")
    assert (len(data), data.name, data.image_size) == (40, "shapes", 64)
    assert data.labels.bincount().tolist() == [2] * 20
    assert len(data.mean) == len(data.std) == 3


@pytest.mark.parametrize("limit", [3, 7, 20])
def test_limit_takes_an_equal_share_of_every_class(folder, limit):
    data = open_dataset(DataConfig(name="folder", root=str(folder), limit=limit), "train")
    assert len(data) == min(limit, 12)
    counts = data.labels.bincount(minlength=3)
    assert counts.max() - counts.min() <= 1
    assert data[len(data) - 1][2] == len(data) - 1  # indices are those of what is left


def test_folder_classes_are_the_train_folders_in_order(folder):
    cfg = DataConfig(name="folder", root=str(folder), image_size=16)
    train, test = open_dataset(cfg, "train"), open_dataset(cfg, "test")
    assert train.classes == test.classes == ["ant", "bee", "cat"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert train.name == folder.name
    assert int(train[9][0][0, 8, 8]) == 80 * 2 + 1
    assert splits_of(cfg) == ["train", "test"]
    assert report_split(cfg) == "test"


def test_folder_of_classes_alone_is_a_train_split(folder):
    cfg = DataConfig(name="folder", root=str(folder / "train"))
    assert splits_of(cfg) == ["train"]
    assert len(open_dataset(cfg, "train")) == 12
    with pytest.raises(InputError, match="no test split"):
        open_dataset(cfg, "test")
    assert report_split(cfg) == "train"
    held_out = dataclasses.replace(cfg, val_fraction=0.25)
    assert report_split(held_out) == "val"
    assert len(open_dataset(held_out, "train")) + len(open_dataset(held_out, "val")) == 12


def test_val_is_held_out_of_train_only_when_asked(folder):
    cfg = DataConfig(name="folder", root=str(folder))
    with pytest.raises(InputError, match="val_fraction"):
        open_dataset(cfg, "val")
    cfg = DataConfig(name="folder", root=str(folder), val_fraction=0.25)
    train, val, test = (open_dataset(cfg, split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (9, 3, 6)
    files = {*train.source.images, *val.source.images}
    assert len(files) == 12
    assert val.labels.tolist() == [0, 1, 2]
    assert (train.split, val.split) == ("train", "val")


def test_official_val_split_is_never_cut_out_of_train(folder):
    for name in ("ant", "bee", "cat"):
        _picture(folder / "val" / name / "0.png", 9)
    cfg = DataConfig(name="folder", root=str(folder), val_fraction=0.25)
    assert len(open_dataset(cfg, "train")) == 12
    assert len(open_dataset(cfg, "val")) == 3


def test_hold_out_splits_every_class_and_depends_on_nothing_else():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    kept, held = hold_out(labels, 0.2)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(63))
    assert labels[held].bincount(minlength=4).tolist() == [10, 2, 1, 0]
    assert all(torch.equal(a, b) for a, b in zip((kept, held), hold_out(labels, 0.2)))
    assert held.tolist() != hold_out(labels, 0.2, seed=1)[1].tolist()
    assert held[:10].tolist() != list(range(10))
    with pytest.raises(ValueError, match="between 0 and 1"):
        hold_out(labels, 1.0)


def test_missing_data_say_where_they_were_sought_and_how_to_lay_them_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFER_SUITE_DATA", str(tmp_path))
    with pytest.raises(InputError) as caught:
        open_dataset(DataConfig(name="cifar10"), "train")
    for part in (str(tmp_path / "cifar10"), "datasets/cifar10", "data_batch_1"):
        assert part in str(caught.value)
    with pytest.raises(InputError, match="root must say"):
        open_dataset(DataConfig(name="folder"), "train")


def test_root_is_found_under_the_data_folder_of_the_environment(folder, monkeypatch):
    monkeypatch.setenv("TRANSFER_SUITE_DATA", str(folder.parent))
    cfg = DataConfig(name="folder", root=folder.name)
    assert len(open_dataset(cfg, "train")) == 12


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"name": "shape"}, "did you mean 'shapes'"),
        ({"augmentation": "crop"}, "crop_flip"),
        ({"image_size": 4}, "at least 8"),
        ({"limit": -1}, "0 \\(all images\\)"),
        ({"val_fraction": 1.0}, "in \\[0, 1\\)"),
        ({"mean": [0.5]}, "three numbers"),
        ({"std": [0.0, 1.0, 1.0]}, "std above 0"),
    ],
)
def test_wrong_values_are_named(keys, sentence):
    with pytest.raises(InputError, match=sentence):
        open_dataset(DataConfig(**{"limit": 20, **keys}), "val")


def test_unknown_split_is_a_programming_error():
    with pytest.raises(ValueError, match="train, val, test"):
        open_dataset(DataConfig(), "training")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"x_train": np.zeros((20, 8, 8), np.uint8)}, "uint8 N×H×W×3"),
        ({"x_train": np.zeros((20, 8, 8, 3))}, "uint8 N×H×W×3"),
        ({"y_train": np.arange(19)}, "20 integers"),
        ({"y_train": np.full(20, 2)}, "0..1"),
        ({"y_train": np.array([{}] * 20)}, "cannot be read"),  # pickled objects stay unread
    ],
)
def test_npz_of_another_shape_is_refused(tmp_path, changes, sentence):
    path = _save_npz(tmp_path / "set.npz", **changes)
    with pytest.raises(InputError, match=sentence):
        open_dataset(_npz(path), "train")


def test_npz_without_a_key_or_damaged_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(InputError, match="y_train"):
        open_dataset(_npz(tmp_path / "a.npz"), "train")
    with pytest.raises(InputError, match="no test split"):
        open_dataset(_npz(tmp_path / "a.npz"), "test")
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(InputError, match=r"b\.npz"):
        open_dataset(_npz(tmp_path / "b.npz"), "train")
    with pytest.raises(InputError, match=r"2 \.npz files"):
        open_dataset(_npz(tmp_path), "train")


def test_folder_with_an_empty_or_a_strange_class_is_refused(folder):
    (folder / "train" / "dog").mkdir()
    with pytest.raises(InputError, match="dog holds no images"):
        open_dataset(DataConfig(name="folder", root=str(folder)), "train")
    (folder / "train" / "dog").rmdir()
    _picture(folder / "test" / "eel" / "0.png", 3)
    with pytest.raises(InputError, match="eel is a class that"):
        open_dataset(DataConfig(name="folder", root=str(folder)), "test")


def test_config_grammar_reaches_every_key(tiny_npz):
    cfg = load_config(DataConfig, None, ["name", "npz", "root", str(tiny_npz), "limit", "6"])
    assert len(open_dataset(cfg, "train")) == 6


def test_real_cifar_subset_opens_with_all_its_classes(shared_data):
    cfg = _npz(shared_data / "cifar100" / "cifar100_subset.npz")
    data = open_dataset(cfg, "test")
    assert (len(data), len(data.classes), data.image_size) == (2000, 100, 32)
    assert data.name == "cifar100_subset"
    assert (data.labels.bincount() == 20).all()


def test_real_flowers_decode_to_squares(shared_data):
    cfg = DataConfig(name="folder", root=str(shared_data / "flowers17_128"), image_size=64)
    data = open_dataset(cfg, "test", train=True)
    assert (len(data), len(data.classes)) == (340, 17)
    for index in (0, 170, 339):
        assert data[index][0].shape == (3, 64, 64)
        assert data[0, index][0].shape == (3, 64, 64)
