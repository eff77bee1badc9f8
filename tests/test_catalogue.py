"""Every data set of the catalogue, in its official lay-out at toy size."""

import pytest
import torchvision

from core.errors import InputError
from data.catalogue import DATASETS, look_up
from data.datasets import DataConfig, open_dataset, report_split, splits_of
from tests import dataset_layouts
from tests.dataset_layouts import BUILDERS, red


@pytest.fixture(autouse=True)
def _any_md5(monkeypatch):
    """Toy files have other md5 sums than the official ones."""
    for module in ("cifar", "flowers102", "stl10", "svhn"):
        there = getattr(torchvision.datasets, module)
        name = "verify_str_arg" if not hasattr(there, "check_integrity") else "check_integrity"
        if name == "check_integrity":
            monkeypatch.setattr(there, name, lambda path, md5=None: True)
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda _: True)
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda _: True)


@pytest.mark.parametrize("name", BUILDERS)
def test_images_and_labels_belong_together_in_every_official_split(name, tmp_path):
    expected = BUILDERS[name](tmp_path)
    cfg = DataConfig(name=name, root=str(tmp_path), partial=True, image_size=24)
    assert set(splits_of(cfg)) == set(expected)
    for split, labels in expected.items():
        data = open_dataset(cfg, split)
        assert data.labels.tolist() == labels
        assert len(data) == len(labels)
        assert data.name == f"{name}_partial"
        assert data.split == split
        for image, label, _ in data:
            assert abs(int(image[0, 12, 12]) - red(label)) <= 3
        assert len(set(data.classes)) == len(data.classes) > max(labels)


@pytest.mark.parametrize("name", BUILDERS)
def test_counts_other_than_the_official_ones_are_refused(name, tmp_path):
    BUILDERS[name](tmp_path)
    official = DATASETS[name].counts["train"]
    with pytest.raises(InputError, match=f"{official:,}.*data.partial"):
        open_dataset(DataConfig(name=name, root=str(tmp_path)), "train")


@pytest.mark.parametrize("name", [n for n, info in DATASETS.items() if not info.drawn])
def test_an_empty_folder_gets_the_sentence_that_says_how_to_fill_it(name, tmp_path):
    with pytest.raises(InputError) as caught:
        open_dataset(DataConfig(name=name, root=str(tmp_path), partial=True), "train")
    sentence = str(caught.value)
    assert str(tmp_path) in sentence
    assert "{" not in sentence.replace("{train,", "").replace("{devkit", "").replace("{jpg", "")
    assert "\n" not in sentence


@pytest.mark.parametrize("name", ["cub200", "aircraft", "food101", "flowers102", "cars", "dtd"])
def test_the_folder_of_the_archive_may_be_named_itself(name, tmp_path):
    expected = BUILDERS[name](tmp_path)
    (base,) = (entry for entry in tmp_path.iterdir() if entry.is_dir())
    cfg = DataConfig(name=name, root=str(base), partial=True)
    assert open_dataset(cfg, "train").labels.tolist() == expected["train"]


def test_voc_has_several_labels_an_image_and_marks_difficult_ones(tmp_path):
    expected = dataset_layouts.voc07(tmp_path)
    cfg = DataConfig(name="voc07", root=str(tmp_path), partial=True)
    for split, labels in expected.items():
        data = open_dataset(cfg, split)
        assert data.labels.tolist() == labels
        assert data[0][1].tolist() == labels[0]
    assert data.metric == "voc07_map"
    assert data.classes[0] == "aeroplane"
    assert -1 in data.labels


def test_caltech_learns_from_thirty_of_each_class_and_tests_on_the_others(tmp_path):
    BUILDERS["caltech101"](tmp_path)
    cfg = DataConfig(name="caltech101", root=str(tmp_path), partial=True)
    train, test = (set(open_dataset(cfg, split).source.images) for split in ("train", "test"))
    assert len(train) == 90
    assert len(train | test) == 99
    first = [path.stem for path in sorted(train)][:30]
    assert first != [f"image_{i:04}" for i in range(30)]  # drawn, not the first ones


@pytest.mark.parametrize("name", ["cub200", "pets", "inat18", "aircraft", "places205", "dtd"])
def test_a_listed_image_that_is_missing_is_named(name, tmp_path):
    BUILDERS[name](tmp_path)
    cfg = DataConfig(name=name, root=str(tmp_path), partial=True)
    missing = open_dataset(cfg, "train").source.images[0]
    missing.unlink()
    with pytest.raises(InputError, match=missing.name):
        open_dataset(cfg, "train")


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("cub200", "CUB_200_2011/image_class_labels.txt", "1 one"),
        ("cub200", "CUB_200_2011/classes.txt", "1 001.Bird_0"),
        ("inat18", "train2018.json", '{"images": []}'),
        ("inat18", "train2018.json", '{"images": ['),
        ("pets", "annotations/trainval.txt", "Abyssinian_1"),
        ("dtd", "dtd/labels/train1.txt", ""),
        ("aircraft", "fgvc-aircraft-2013b/data/images_variant_train.txt", "1 Concorde"),
        ("food101", "food-101/meta/train.json", "[]"),
        ("cars", "devkit.txt", "unrelated"),
        ("places205", "train_places205.csv", "a/abbey/1.jpg"),
        ("cifar10", "cifar-10-batches-py/data_batch_3", "cut"),
    ],
)
def test_a_damaged_listing_is_one_sentence(name, file, content, tmp_path):
    BUILDERS[name](tmp_path)
    if name == "cars":
        (tmp_path / "stanford_cars" / "devkit" / "cars_train_annos.mat").write_text(content)
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(InputError) as caught:
        open_dataset(DataConfig(name=name, root=str(tmp_path), partial=True), "train")
    assert "\n" not in str(caught.value)


def test_official_figures_add_up():
    """Totals as the authors state them; splits are what the field trains and tests on."""
    totals = {
        "cub200": 11_788, "aircraft": 10_000, "cars": 16_185, "flowers102": 8_189, "pets": 7_349,
        "dtd": 5_640, "food101": 101_000, "caltech101": 9_144, "cinic10": 270_000,
        "inat18": 461_939, "voc07": 9_963, "svhn": 99_289, "stl10": 13_000,
    }  # fmt: skip
    for name, total in totals.items():
        assert sum(DATASETS[name].counts.values()) == total


def test_metrics_and_report_splits_are_the_fields(monkeypatch):
    metrics = {name: info.metric for name, info in DATASETS.items()}
    assert {n for n, m in metrics.items() if m == "mean_per_class"} == {
        "flowers102", "pets", "caltech101",
    }  # fmt: skip
    assert {n for n, m in metrics.items() if m == "voc07_map"} == {"voc07"}
    for name, split in (("imagenet", "val"), ("inat18", "val"), ("cub200", "test")):
        assert report_split(DataConfig(name=name)) == split


def test_unknown_name_gets_the_nearest():
    with pytest.raises(InputError, match="did you mean 'cub200'"):
        look_up("cub-200")
