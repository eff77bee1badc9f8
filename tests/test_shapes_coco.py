"""The embedded detection set: sound COCO files, masks of what is seen, written whole or not."""

import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from core.errors import InputError
from core.seeds import Dice
from data.shapes import scenes as shapes_coco
from data.shapes.drawing import FINE
from data.shapes.scenes import scene, write_coco


@pytest.fixture(scope="module")
def scenes():
    """150 pictures of 96 pixels with their owners and annotations."""
    found = []
    for seed in range(150):
        picture, owner, objects = scene(96, Dice(11, seed))
        found.append((picture, owner, objects, shapes_coco.annotations(owner, objects)))
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"), "val", 12, 64)


def _raster(polygons, height, width):
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(
        bool
    )


def _decoded(annotation, size):
    segmentation = annotation["segmentation"]
    if annotation["iscrowd"]:
        return coco_mask.decode(coco_mask.frPyObjects(segmentation, size, size)).astype(bool)
    return _raster(segmentation, size, size)


def test_pycocotools_reads_the_files_and_agrees_on_area_and_box(files):
    coco = COCO(str(files.json))
    assert len(coco.imgs) == 12
    assert len(coco.anns) > 12
    for annotation in coco.anns.values():
        rle = coco.annToRLE(annotation)
        assert annotation["area"] == int(coco_mask.area(rle))
        assert annotation["bbox"] == coco_mask.toBbox(rle).tolist()
        assert annotation["category_id"] in coco.cats
    for image in coco.imgs.values():
        picture = cv2.imread(str(files.images / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3)


def test_png_holds_the_drawn_picture_with_red_first(files):
    picture, _, _ = scene(64, Dice(shapes_coco._SEED, 1, 0, 3))
    stored = cv2.imread(str(files.images / "000003.png"))
    assert np.array_equal(stored[:, :, ::-1], picture)


def test_masks_are_what_is_seen_of_each_object(scenes):
    checked = 0
    for _, owner, objects, annotations in scenes:
        numbers = [
            number
            for number in range(1, len(objects) + 1)
            if (owner == number).sum() >= shapes_coco.SMALLEST * FINE**2
        ]
        if len(numbers) != len(annotations):
            continue  # one of them was a sliver
        for number, annotation in zip(numbers, annotations, strict=True):
            seen = shapes_coco._reduced(owner == number)
            mask = _decoded(annotation, 96)
            union = (seen | mask).sum()
            assert (seen & mask).sum() >= (0.85 if union > 200 else 0.6) * union
            checked += 1
    assert checked > 200


def test_keypoints_touch_the_sides_of_the_box_and_lie_on_the_mask(scenes):
    for _, _, _, annotations in scenes:
        for annotation in annotations:
            points = np.array(annotation["keypoints"]).reshape(-1, 3)
            if annotation["iscrowd"]:
                assert annotation["num_keypoints"] == 0
                assert not points.any()
                continue
            assert annotation["num_keypoints"] == len(points) == len(shapes_coco.KEYPOINTS)
            assert set(points[:, 2]) == {2}
            left, top, width, height = annotation["bbox"]
            sides = [left, top, left + width - 1, top + height - 1]
            assert [points[0, 0], points[1, 1], points[2, 0], points[3, 1]] == sides
            mask = _decoded(annotation, 96)
            assert all(mask[y, x] for x, y, _ in points)


def test_extreme_points_are_the_middle_of_the_outermost_pixels():
    mask = np.zeros((8, 8), bool)
    mask[2:5, 1:7] = True
    assert shapes_coco._extremes(mask) == [1, 3, 2, 4, 2, 2, 6, 3, 2, 4, 4, 2]


def test_masks_of_one_image_hardly_share_a_pixel(scenes):
    shared = total = 0
    for _, _, _, annotations in scenes:
        layers = sum(_decoded(annotation, 96).astype(int) for annotation in annotations)
        shared += int((np.asarray(layers) > 1).sum())
        total += int((np.asarray(layers) > 0).sum())
    assert shared < 0.02 * total


def test_there_are_small_and_large_objects_crowds_overlaps_and_empty_images(scenes):
    annotations = [a for scene in scenes for a in scene[3]]
    shares = np.array([a["area"] / 96**2 for a in annotations if not a["iscrowd"]])
    assert (shares < 0.01).mean() > 0.05
    assert (shares > 0.08).mean() > 0.05
    assert sum(a["iscrowd"] for a in annotations) >= 5
    assert sum(not scene[3] for scene in scenes) >= 3
    assert sum(len(a["segmentation"]) > 1 for a in annotations if not a["iscrowd"]) >= 3
    assert {a["category_id"] for a in annotations} == set(range(1, len(shapes_coco.CLASSES) + 1))


def test_an_empty_image_of_the_files_has_no_annotation(tmp_path):
    files = write_coco(tmp_path, "train", 30, 32)
    coco = COCO(str(files.json))
    empty = [i for i in coco.imgs if not coco.getAnnIds(i)]
    assert empty
    assert all((files.images / coco.imgs[i]["file_name"]).is_file() for i in empty)


def test_a_complete_set_is_reused_and_a_damaged_one_drawn_again(tmp_path):
    files = write_coco(tmp_path, "train", 3, 32)
    before, stamp = files.json.read_bytes(), files.json.stat().st_mtime_ns
    assert write_coco(tmp_path, "train", 3, 32) == files
    assert files.json.stat().st_mtime_ns == stamp
    first = (files.images / "000001.png").read_bytes()
    (files.images / "000001.png").unlink()
    assert write_coco(tmp_path, "train", 3, 32) == files
    assert (files.images / "000001.png").read_bytes() == first
    assert files.json.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_image_depends_on_split_seed_and_number_but_not_on_how_many_there_are(tmp_path):
    three = write_coco(tmp_path, "train", 3, 32)
    four = write_coco(tmp_path, "train", 4, 32)
    other = write_coco(tmp_path, "train", 3, 32, seed=1)
    held = write_coco(tmp_path, "val", 3, 32)
    pictures = [(f.images / "000002.png").read_bytes() for f in (three, four, other, held)]
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == 3


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes_coco, "annotations", stop)
    with pytest.raises(KeyboardInterrupt):
        write_coco(tmp_path, "train", 3, 32)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        write_coco(tmp_path / "file", "train", 1, 32)
    with pytest.raises(InputError, match="at least 1 image"):
        write_coco(tmp_path, "train", 0, 32)
    with pytest.raises(ValueError, match="train, val, test"):
        write_coco(tmp_path, "training", 1, 32)


def test_json_is_plain_coco(files):
    content = json.loads(files.json.read_text())
    assert [c["name"] for c in content["categories"]] == list(shapes_coco.CLASSES)
    ids = [a["id"] for a in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
