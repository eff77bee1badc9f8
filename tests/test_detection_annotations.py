"""Annotations are validated whole before a run, and those of validation evaluated."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from core.errors import InputError
from detection import annotations
from detection import data as datasets
from detection.evaluation import check_truth
from detection.job import prepare
from detection.saved import evaluate
from tests.detection_tiny import request, write_pair

Change = Callable[[dict[str, Any]], object]


def first(**values: Any) -> Change:
    return lambda content: content["annotations"][0].update(values)


def _strings(content: dict[str, Any]) -> None:
    """Give one image, and what refers to it, a string for an id."""
    content["images"][1]["id"] = "2"
    for entry in content["annotations"]:
        if entry["image_id"] == 2:
            entry["image_id"] = "2"


MASK = "annotation 1 has a mask "
BAD: list[tuple[Change, str]] = [
    (first(segmentation=[[1, 2, 3, 4]]), "annotation 1 has a polygon of 4 numbers"),
    (first(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 1 has a polygon of 7 numbers"),
    (first(segmentation=[[1, 2, 3, 4, 5, "6"]]), "annotation 1 has a polygon with something"),
    (first(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "annotation 1 has a polygon with"),
    (first(segmentation=[1, 2, 3, 4, 5, 6]), "annotation 1 has segmentation"),
    (first(segmentation="polygon"), "annotation 1 has segmentation 'polygon'"),
    (first(segmentation={"size": [48, 64]}), MASK + "with counts None"),
    (first(segmentation={"size": [48, 64], "counts": [3071, 2]}), MASK + "of 3073 pixels"),
    (first(segmentation={"size": [48, 64], "counts": ["3072"]}), MASK + "with counts"),
    (first(segmentation={"size": [48, 64], "counts": "PP1"}), MASK + "of 1024 pixels"),
    (first(segmentation={"size": [48, 64], "counts": "oo"}), MASK + "with counts 'oo'"),
    (first(segmentation={"size": [64, 48], "counts": [3072]}), MASK + r"of size \[64, 48\]"),
    (first(bbox=[1, float("nan"), 3, 4]), r"annotation 1 has bbox \[1, nan"),
    (first(bbox=["1", 2, 3, 4]), "annotation 1 has bbox"),
    (first(bbox=[1, 2, -3, 4]), "annotation 1 has bbox"),
    (first(bbox=None), "annotation 1 has bbox None"),
    (first(area=None), "annotation 1 has area None"),
    (first(area="9"), "annotation 1 has area '9'"),
    (first(iscrowd=None), "annotation 1 has iscrowd None"),
    (first(ignore=1), "annotation 1 has ignore 1"),
    (first(image_id=[1]), r"annotation 1 has image_id \[1\]"),
    (first(id=2), "annotation 2 stands twice"),
    (first(id=None), "id None in annotations must be an integer"),
    (_strings, "id '2' in images must be an integer"),
    (lambda c: c["annotations"].clear(), "has no annotations"),
    (lambda c: [a.update(bbox=[1, 1, 0, 9]) for a in c["annotations"]], "a width and a height"),
    (lambda c: c["categories"].append({"id": 3, "name": "x"}), "category 3 stands twice"),
    (lambda c: c["categories"][0].update(name=None), "category 3 has name None"),
    (lambda c: c["categories"][0].update(keypoints="nose"), "category 3 has keypoints"),
    (lambda c: c["images"][0].update(file_name=None), "image 1 has file_name None"),
    (lambda c: c["images"][0].update(height="48"), "image 1 has height '48'"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_pair(folder)
    return folder


def _changed(data: Path, change: Change, folder: Path) -> Path:
    content = json.loads((data / "instances.json").read_text())
    change(content)
    path = folder / "changed.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("change", "words"), BAD)
def test_an_annotation_that_would_end_or_falsify_a_run_is_one_sentence(
    data: Path, tmp_path: Path, change: Change, words: str, split: str
) -> None:
    path = _changed(data, change, tmp_path)
    with pytest.raises(InputError, match=words) as error:
        datasets.open_pair(path, data / "images", split)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["train", "val"])
def test_such_a_file_stops_a_run_before_it_begins(data: Path, tmp_path: Path, split: str) -> None:
    path = _changed(data, first(area=None), tmp_path)
    asked = request(data, tmp_path / "run", **{f"{split}_json": str(path)})
    with pytest.raises(InputError, match="annotation 1 has area None"):
        prepare(asked, tmp_path)


def test_what_coco_itself_holds_passes(data: Path, tmp_path: Path) -> None:
    """A box of no height, a polygon of two points behind a whole one, RLE of both kinds."""

    def change(content: dict[str, Any]) -> None:
        entries = content["annotations"]
        entries[0].update(bbox=[1, 2, 3, 0], area=0)
        entries[1]["segmentation"].append([1, 2, 3, 4])
        entries[2].update(iscrowd=1, segmentation={"size": [64, 48], "counts": [10, 20, 3042]})
        mask = coco_mask.encode(np.asfortranarray(np.eye(64, 48, dtype=np.uint8)))
        entries[3]["segmentation"] = {**mask, "counts": mask["counts"].decode()}
        for entry in entries:
            entry.pop("iscrowd", None)

    path = _changed(data, change, tmp_path)
    assert datasets.open_pair(path, data / "images", "val").num_objects == 12
    short_first = _changed(
        data, lambda c: c["annotations"][1]["segmentation"].insert(0, [1, 2, 3, 4]), tmp_path
    )
    assert datasets.open_pair(
        short_first, data / "images", "train"
    ).has_masks  # detectron2 drops it
    with pytest.raises(InputError, match="annotation 2 has a polygon of 4 numbers"):
        datasets.open_pair(short_first, data / "images", "val")  # pycocotools reads boxes


def test_run_lengths_are_those_that_pycocotools_wrote() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        height, width = (int(n) for n in generator.integers(1, 90, 2))
        mask = (generator.random((height, width)) < generator.random()).astype(np.uint8)
        counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        runs = annotations.run_lengths(counts)
        assert runs is not None
        flat = np.repeat(np.arange(len(runs)) % 2, runs)
        assert np.array_equal(flat, mask.ravel(order="F"))
    for text in ("", "P", "~", "PP1é"):
        assert annotations.run_lengths(text) is None


BACKENDS = ["pycocotools", "faster", "hotcoco"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_truth_evaluated_against_itself_has_100_or_is_refused(
    data: Path, tmp_path: Path, backend: str
) -> None:
    def check(path: Path, task: str = "bbox") -> list[str]:
        return check_truth(path, [task], lambda t, found, name: evaluate(t, found, name, backend))

    for task in ("bbox", "segm"):
        assert check(data / "instances.json", task) == [
            f"{data}/instances.json: AP of its own objects, taken as detections: {task} 100"
        ]
    lost = first(bbox=[1, 1, 0, 5], segmentation=[[1, 1, 1, 1, 1, 1]])
    for task in ("bbox", "segm"):
        _, said = check(_changed(data, lost, tmp_path), task)
        assert "no detector finds annotation 1, whose" in said

    def crowded(content: dict[str, Any]) -> None:
        copies = [content["annotations"][0] | {"id": n} for n in range(100, 205)]
        content["annotations"] += copies

    _, said = check(_changed(data, crowded, tmp_path))
    assert "an image has 106 objects, and 100 detections count" in said


def test_an_evaluation_that_fails_or_misses_is_a_sentence_before_the_run(
    data: Path, tmp_path: Path
) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("counts")

    with pytest.raises(InputError, match=r"cannot be evaluated \(segm\): KeyError: 'counts'"):
        check_truth(data / "instances.json", ["segm"], broken)
    with pytest.raises(InputError, match=r"bbox AP of 91\.58, and should have 100"):
        check_truth(
            data / "instances.json", ["bbox"], lambda t, found, name: evaluate(t, found[1:], name)
        )


def test_a_run_says_that_its_validation_data_were_evaluated(data: Path, tmp_path: Path) -> None:
    said = " ".join(prepare(request(data, tmp_path / "run"), tmp_path).notes)
    assert "taken as detections: bbox 100, segm 100" in said


def test_ids_of_validation_images_may_be_strings_where_the_backend_takes_them(
    data: Path, tmp_path: Path
) -> None:
    def change(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["id"] = f"{image['id']:03d}"
        for entry in content["annotations"]:
            entry["image_id"] = f"{entry['image_id']:03d}"

    asked = request(data, tmp_path / "run", val_json=str(_changed(data, change, tmp_path)))
    assert prepare(asked, tmp_path).val.num_images == 6
    fast = dataclasses.replace(asked, coco_backend="hotcoco")
    pytest.importorskip("hotcoco")
    with pytest.raises(InputError, match=r"cannot be evaluated \(bbox\).*'001'"):
        prepare(fast, tmp_path)


def test_classes_of_one_name_keep_an_ap_each(data: Path, tmp_path: Path) -> None:
    same = _changed(data, lambda c: c["categories"][0].update(name="bar"), tmp_path)
    found = []
    check_truth(same, ["bbox"], lambda *args: found.append(evaluate(*args)) or found[0])
    assert found[0].per_class == pytest.approx({"bar (3)": 1.0, "bar (7)": 1.0})


def test_every_image_is_decoded_if_asked_and_the_damaged_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, images = write_pair(tmp_path / "tiny")
    for name in ("002.png", "005.png"):
        (images / name).write_bytes((images / name).read_bytes()[:-300])
    monkeypatch.setattr(datasets, "DECODE_UP_TO", 3)  # as if there were thousands
    datasets.open_pair(path, images, "val")
    asked = request(tmp_path / "tiny", tmp_path / "run", check_images=True)
    with pytest.raises(InputError, match=r"002\.png does not decode.*and 1 more of 6 images"):
        prepare(asked, tmp_path)


def test_an_image_of_16_bits_is_refused(tmp_path: Path) -> None:
    path, images = write_pair(tmp_path / "tiny")
    Image.fromarray(np.full((48, 64), 40_000, np.uint16)).save(images / "001.png")
    with pytest.raises(InputError, match=r"001\.png has more than 8 bits a channel"):
        datasets.open_pair(path, images, "val")
