"""Data are checked before a run: what is not COCO, missing or undecodable is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from detection import data as datasets
from tests.detection_tiny import write_pair


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path / "tiny")


def test_a_pair_is_described(pair: tuple[Path, Path]) -> None:
    found = datasets.open_pair(*pair, split="val")
    assert (found.name, found.catalog_name) == ("tiny", "tiny_val")
    assert found.classes == ("square", "bar")  # by category id, gaps closed
    assert (found.num_images, found.num_objects) == (6, 12)
    assert found.has_masks
    assert not found.has_rle


def test_coco_folders_give_the_name_of_the_folder_above(tmp_path: Path) -> None:
    json_path, images = write_pair(tmp_path / "mine")
    (tmp_path / "mine" / "annotations").mkdir()
    moved = json_path.rename(tmp_path / "mine" / "annotations" / "instances.json")
    assert datasets.open_pair(moved, images, "train").name == "mine"


def _edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("categories"), "no list 'categories'"),
        (lambda c: c["images"][0].pop("file_name"), "no 'file_name'"),
        (lambda c: c["annotations"][0].pop("bbox"), "no 'bbox'"),
        (lambda c: c["annotations"][0].update(category_id=5), "category_id 5"),
        (lambda c: c["annotations"][0].update(image_id=99), "image_id 99"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "bbox"),
        (lambda c: c["annotations"][1].update(id=1), "annotation 1 stands twice"),
        (lambda c: c["images"][0].update(file_name="gone.png"), "gone.png does not exist"),
        (lambda c: c["images"][0].update(width=11), "64×48 pixels"),
        (lambda c: c["images"].clear(), "no images"),
    ],
)
def test_a_json_that_is_not_coco_is_refused(
    pair: tuple[Path, Path], change: Any, words: str
) -> None:
    _edit(pair[0], change)
    with pytest.raises(InputError, match=words) as error:
        datasets.open_pair(*pair, split="train")
    assert str(pair[0]) in str(error.value) or "001.png" in str(error.value)


@pytest.mark.parametrize(
    ("change", "masks"),
    [
        (lambda c: c["annotations"][3].pop("segmentation"), []),
        (lambda c: c["annotations"][3].update(segmentation=[]), []),
        (lambda c: c["annotations"][3].update(iscrowd=1, segmentation=[]), ["train"]),
        (lambda c: [a.pop("iscrowd") for a in c["annotations"]], ["train", "val"]),
    ],
)
def test_data_have_masks_where_every_object_has_one(
    pair: tuple[Path, Path], change: Any, masks: list[str]
) -> None:
    """Crowds have no part in training, but masks of val are evaluated by theirs."""
    _edit(pair[0], change)
    splits = [datasets.open_pair(*pair, split=split) for split in ("train", "val")]
    assert [split.split for split in splits if split.has_masks] == masks
    assert all(split.has_masks or split.without_mask == 4 for split in splits)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", '"images"'])
def test_any_other_file_is_refused(pair: tuple[Path, Path], text: str) -> None:
    pair[0].write_text(text)
    with pytest.raises(InputError, match=r"instances\.json"):
        datasets.open_pair(*pair, split="train")


def test_missing_files_are_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json"):
        datasets.open_pair(tmp_path / "none.json", pair[1], "train")
    with pytest.raises(InputError, match="nowhere"):
        datasets.open_pair(pair[0], tmp_path / "nowhere", "train")


@pytest.mark.parametrize("damage", [b"", b"not an image", None])
def test_an_image_that_does_not_decode_is_named(
    pair: tuple[Path, Path], damage: bytes | None
) -> None:
    victim = pair[1] / "004.png"
    victim.write_bytes(victim.read_bytes()[:-400] if damage is None else damage)
    with pytest.raises(InputError, match=r"004\.png does not decode"):
        datasets.open_pair(*pair, split="val")


def test_a_missing_builtin_says_where_it_looked_and_how_to_lay_it_out() -> None:
    with pytest.raises(InputError) as error:
        datasets.open_named("coco_2017_val", {})
    words = ("instances_val2017.json", "DETECTRON2_DATASETS", "layout", "--val-json")
    assert all(word in str(error.value) for word in words)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"shapes_train.*coco_2017_val"):
        datasets.open_named("coco_2071_val", {})


def test_splits_of_different_classes_do_not_go_together(tmp_path: Path) -> None:
    one = datasets.open_pair(*write_pair(tmp_path / "a"), split="train")
    other = write_pair(
        tmp_path / "b", categories=[{"id": 3, "name": "x"}, {"id": 7, "name": "bar"}]
    )
    with pytest.raises(InputError, match="different categories"):
        datasets.check_same_classes(one, datasets.open_pair(*other, split="val"))


def test_real_coco_opens(shared_data: Path) -> None:
    coco = shared_data / "coco_mini"
    found = datasets.open_pair(coco / "annotations" / "instances_val.json", coco / "images", "val")
    assert (found.name, found.num_images, len(found.classes)) == ("coco_mini", 157, 80)
    assert found.num_objects == 1247 - 12
