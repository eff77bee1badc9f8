"""Data sets with rules of their own: opened by name, evaluated by those rules, trained on."""

import functools
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.data.datasets.cityscapes import load_cityscapes_instances
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import Boxes, Instances

from core.errors import InputError
from core.results import read_rows
from detection import formats
from detection.bench import Limits
from detection.cfg import load_cfg
from detection.data import open_named, open_pair
from detection.evaluation import check_split
from detection.identity import data_of
from detection.job import Request
from detection.preflight import PASSED, preflight
from detection.run import run
from tests.detection_tiny import CLASSES, CONFIG, SMALL, write_pair

OBJECT = (
    "<object><name>{name}</name><pose>x</pose><truncated>0</truncated><difficult>0</difficult>"
    "<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
)
BOXES = ["MODEL.MASK_ON", "False"]
ONE_STEP = ["SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "TEST.PRECISE_BN.ENABLED", "False"]


@pytest.fixture
def voc(tmp_path: Path) -> str:
    """A VOC-format copy of the tiny pair, known to detectron2 as tinyvoc_2007_trainval."""
    path, images = write_pair(tmp_path / "coco")
    content = json.loads(path.read_text())
    root = tmp_path / "VOC2007"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    names = []
    for image in content["images"]:
        name = Path(image["file_name"]).stem
        names.append(name)
        picture = cv2.imread(str(images / image["file_name"]))
        cv2.imwrite(str(root / "JPEGImages" / f"{name}.jpg"), picture)
        objects = ""
        for entry in content["annotations"]:
            if entry["image_id"] == image["id"]:
                x, y, w, h = entry["bbox"]  # VOC counts pixels from 1, corners included
                corners = {"x0": x + 1, "y0": y + 1, "x1": x + w, "y1": y + h}
                objects += OBJECT.format(name=CLASSES[entry["category_id"]], **corners)
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        xml = f"<annotation>{size}{objects}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(xml)
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(names))
    name = "tinyvoc_2007_trainval"
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)
    register_pascal_voc(name, str(root), "trainval", 2007, tuple(CLASSES.values()))
    MetadataCatalog.get(name).evaluator_type = "pascal_voc"
    return name


def test_voc_is_opened_by_name(voc: str) -> None:
    split = open_named(voc, {})
    assert (split.name, split.split, split.kind) == ("tinyvoc_2007", "trainval", "voc")
    assert (split.num_images, split.num_objects, split.classes) == (6, 12, ("square", "bar"))


def test_the_digest_of_voc_is_that_of_its_annotations_and_not_of_their_folder(
    voc: str, tmp_path: Path
) -> None:
    def digest() -> str:
        return data_of((), open_named(voc, {}))

    before = digest()
    (tmp_path / "VOC2007").rename(tmp_path / "moved")
    MetadataCatalog.pop(voc)
    DatasetCatalog.remove(voc)
    register_pascal_voc(voc, str(tmp_path / "moved"), "trainval", 2007, tuple(CLASSES.values()))
    MetadataCatalog.get(voc).evaluator_type = "pascal_voc"
    assert digest() == before
    xml = next(f for f in (tmp_path / "moved/Annotations").iterdir() if "square" in f.read_text())
    xml.write_text(xml.read_text().replace("square", "bar", 1))  # as many images and objects
    assert digest() != before


def test_what_voc_lacks_is_named(voc: str, tmp_path: Path) -> None:
    (tmp_path / "VOC2007" / "JPEGImages" / "003.jpg").unlink()
    with pytest.raises(InputError, match=r"003\.jpg does not exist"):
        open_named(voc, {})
    (tmp_path / "VOC2007" / "Annotations" / "002.xml").write_text("<annotation>")
    with pytest.raises(InputError, match="cannot be read"):
        open_named(voc, {})
    (tmp_path / "VOC2007" / "ImageSets" / "Main" / "trainval.txt").unlink()
    with pytest.raises(InputError, match="layout"):
        open_named(voc, {})


def test_perfect_voc_detections_have_an_ap_of_100(voc: str) -> None:
    split = open_named(voc, {})
    judge = formats.evaluator(split.kind, split.catalog_name)
    judge.reset()
    for record in DatasetCatalog.get(voc):
        found = Instances((record["height"], record["width"]))
        boxes = [entry["bbox"] for entry in record["annotations"]]
        found.pred_boxes = Boxes(torch.tensor(boxes))
        found.scores = torch.ones(len(boxes))
        found.pred_classes = torch.tensor([e["category_id"] for e in record["annotations"]])
        judge.process([record], [{"instances": found}])
    (evaluation,) = formats.as_evaluations(judge.evaluate())
    assert evaluation.iou_type == "bbox"
    assert evaluation.stats == pytest.approx({"AP": 1.0, "AP50": 1.0, "AP75": 1.0})


def _run(output: Path, **fields: Any) -> set[str]:
    overrides = [*SMALL, *ONE_STEP, *fields.pop("overrides")]
    asked = Request(num_gpus=0, output=str(output), overrides=overrides, **fields)
    assert run(asked) == 0
    return {row.metric for row in read_rows(output / "results.jsonl")}


def test_a_voc_run_ends_in_voc_rows(voc: str, tmp_path: Path) -> None:
    data = [*BOXES, "DATASETS.TRAIN", f"('{voc}',)", "DATASETS.TEST", f"('{voc}',)"]
    found = _run(tmp_path / "run", config=CONFIG, overrides=data)
    assert found == {"bbox/AP", "bbox/AP50", "bbox/AP75"}


def test_a_few_images_of_voc_are_judged_before_a_run(voc: str, tmp_path: Path) -> None:
    data = [*BOXES, "DATASETS.TRAIN", f"('{voc}',)", "DATASETS.TEST", f"('{voc}',)"]
    asked = Request(
        num_gpus=0, output=str(tmp_path / "run"), overrides=[*SMALL, *ONE_STEP, *data],
        config=CONFIG,
    )  # fmt: skip
    for images in (1, 3):
        found = {f.name: f for f in preflight(asked, Limits(images=images), ["evaluate"])}
        assert found["evaluate"].mark == PASSED, found["evaluate"].fact
        assert f"3 rows from {max(images, 2)} images" in found["evaluate"].fact


def _lvis(folder: Path) -> tuple[Path, Path]:
    path, images = write_pair(folder)
    content = json.loads(path.read_text())
    (images / "val2017").mkdir()
    for number, image in enumerate(content["images"]):
        name = image.pop("file_name")
        (images / name).rename(images / "val2017" / name)
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{name}"
        image["neg_category_ids"] = []
        image["not_exhaustive_category_ids"] = [3] if number == 0 else []
    for entry in content["annotations"]:
        del entry["iscrowd"]
    for category, frequency in zip(content["categories"], "rf", strict=True):
        category["frequency"] = frequency
    path.write_text(json.dumps(content))
    return path, images


def _register_lvis(path: Path, images: Path) -> None:
    for part in ("train", "val"):
        name = f"tinylvis_{part}"
        if name not in DatasetCatalog.list():
            DatasetCatalog.register(name, list)
        MetadataCatalog.pop(name, None)
        meta = MetadataCatalog.get(name)
        meta.set(json_file=str(path), image_root=str(images), evaluator_type="lvis")


def test_perfect_lvis_detections_and_the_federated_rule(tmp_path: Path) -> None:
    pytest.importorskip("hotcoco")
    path, _ = _lvis(tmp_path / "lvis")
    content = json.loads(path.read_text())
    keys = ("image_id", "category_id", "bbox")
    found = [{k: a[k] for k in keys} | {"score": 0.9} for a in content["annotations"]]
    stats = formats.evaluate_lvis(content, found, "bbox").stats
    assert (stats["AP"], stats["APr"], stats["APf"]) == pytest.approx((1.0, 1.0, 1.0))
    assert stats["APc"] is None  # no common class
    # a wrong box of a class that an image was not searched exhaustively for costs nothing
    excused = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 5, 5], "score": 0.99}
    assert formats.evaluate_lvis(content, [*found, excused], "bbox").stats["AP"] == pytest.approx(
        1.0
    )
    wrong = excused | {"image_id": 2}
    assert formats.evaluate_lvis(content, [*found, wrong], "bbox").stats["APr"] < 1.0


def test_an_lvis_run_ends_in_rows_by_frequency(tmp_path: Path) -> None:
    pytest.importorskip("hotcoco")
    path, images = _lvis(tmp_path / "lvis")
    split = open_pair(path, images, "val", "tinylvis", kind="lvis")
    assert split.num_objects == 12
    _register_lvis(path, images)
    data = ["DATASETS.TRAIN", "('tinylvis_train',)", "DATASETS.TEST", "('tinylvis_val',)"]
    data += ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
    found = _run(tmp_path / "run", config=CONFIG, overrides=data)
    assert {"bbox/APr", "segm/APf", "segm/AP"} <= found


def test_a_keypoint_run_ends_in_keypoint_rows(tmp_path: Path) -> None:
    path, images = write_pair(tmp_path / "points")
    content = json.loads(path.read_text())
    names = ["nose", "left_end", "right_end"]
    content["categories"] = [{"id": 3, "name": "square", "keypoints": names, "skeleton": []}]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 3]
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        middle = [x + w // 2, y + h // 2, 2]
        entry["keypoints"] = [*middle, x, y, 2, x + w - 1, y + h - 1, 2]
        entry["num_keypoints"] = 3
    path.write_text(json.dumps(content))
    assert formats.flips(names) == [("left_end", "right_end")]
    data = {"train_json": path, "train_images": images, "val_json": path, "val_images": images}
    more = [*BOXES, "MODEL.KEYPOINT_ON", "True", "TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]"]
    more += ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16,)"]
    fields = {key: str(value) for key, value in data.items()}
    found = _run(tmp_path / "run", config=CONFIG, overrides=more, **fields)
    assert {"keypoints/AP", "keypoints/APl", "bbox/AP"} <= found
    again = {"weights": str(tmp_path / "run/model_final.pth"), "eval_only": True}
    judged = {key: fields[key] for key in ("val_json", "val_images")}
    assert _run(tmp_path / "eval", config=CONFIG, overrides=more, **judged, **again) == found


@pytest.fixture
def city(tmp_path: Path) -> str:
    """Four images in Cityscapes' layout, one car each, known to detectron2 as tinycity_val."""
    pytest.importorskip("cityscapesscripts")
    pytest.importorskip("shapely")
    images, truth = tmp_path / "leftImg8bit" / "c", tmp_path / "gtFine" / "c"
    images.mkdir(parents=True)
    truth.mkdir(parents=True)
    outline = [[10, 10], [39, 10], [39, 39], [10, 39]]
    polygons = {"imgHeight": 64, "imgWidth": 96, "objects": [{"label": "car", "polygon": outline}]}
    for number in range(4):
        stem = f"c_{number:06d}_000019"
        ids = np.zeros((64, 96), np.uint16)
        ids[10:40, 10:40] = 26000  # the first car
        cv2.imwrite(str(images / f"{stem}_leftImg8bit.png"), 50 + ids.astype(np.uint8))
        cv2.imwrite(str(truth / f"{stem}_gtFine_instanceIds.png"), ids)
        cv2.imwrite(str(truth / f"{stem}_gtFine_labelIds.png"), (ids // 1000).astype(np.uint8))
        (truth / f"{stem}_gtFine_polygons.json").write_text(json.dumps(polygons))
    name, places = "tinycity_val", {"image_dir": str(images.parent), "gt_dir": str(truth.parent)}
    formats.forget(name)
    load = functools.partial(load_cityscapes_instances, **places, from_json=True, to_polygons=True)
    DatasetCatalog.register(name, load)
    known = _get_builtin_metadata("cityscapes")
    MetadataCatalog.get(name).set(**places, evaluator_type="cityscapes_instance", **known)
    return name


def test_perfect_cityscapes_masks_have_an_ap_of_100(city: str) -> None:
    split = open_named(city, {})
    judge = formats.evaluator(split.kind, split.catalog_name)
    judge.reset()
    for record in DatasetCatalog.get(city):
        found = Instances((record["height"], record["width"]))
        mask = np.zeros((1, 64, 96), bool)
        mask[0, 10:40, 10:40] = True
        found.pred_masks, found.scores = torch.from_numpy(mask), torch.ones(1)
        found.pred_classes = torch.tensor([record["annotations"][0]["category_id"]])
        judge.process([record], [{"instances": found}])
    (evaluation,) = formats.as_evaluations(judge.evaluate())
    assert evaluation.iou_type == "segm"
    assert evaluation.stats == pytest.approx({"AP": 1.0, "AP50": 1.0})


def test_a_cityscapes_run_is_checked_and_ends_in_rows(city: str, tmp_path: Path) -> None:
    data = ["DATASETS.TRAIN", f"('{city}',)", "DATASETS.TEST", f"('{city}',)"]
    asked = Request(
        num_gpus=0, config=CONFIG, output=str(tmp_path / "run"),
        overrides=[*SMALL, *ONE_STEP, *data],
    )  # fmt: skip
    (*_, few) = preflight(asked, Limits(images=2), ["evaluate"])
    assert (few.mark, "2 rows from 2 images" in few.fact) == (PASSED, True), few.fact
    assert _run(tmp_path / "run", config=CONFIG, overrides=data) == {"segm/AP", "segm/AP50"}


def test_the_packages_that_evaluate_are_asked_for_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, images = _lvis(tmp_path / "lvis")
    _register_lvis(path, images)
    monkeypatch.setitem(formats.NEEDS, "lvis", ("no_such_judge",))
    with pytest.raises(InputError, match="evaluating lvis data needs `pip install no_such_judge`"):
        open_named("tinylvis_val", {})


def test_the_truth_of_voc_and_lvis_is_evaluated_against_itself(voc: str, tmp_path: Path) -> None:
    pytest.importorskip("hotcoco")
    cfg = load_cfg(CONFIG)
    (said,) = check_split(cfg, open_named(voc, {}))
    assert "taken as detections: bbox 100" in said
    _register_lvis(*_lvis(tmp_path / "lvis"))
    split = open_named("tinylvis_val", {})
    (said,) = check_split(cfg, split)
    assert "bbox 100, segm 100" in said
    xml = tmp_path / "VOC2007" / "Annotations" / "002.xml"
    xml.write_text(xml.read_text().replace("<difficult>0<", "<difficult>no<"))
    parse_rec.cache_clear()
    with pytest.raises(InputError, match="cannot be evaluated by VOC's rules"):
        check_split(cfg, open_named(voc, {}))


def test_cityscapes_says_what_it_needs() -> None:
    with pytest.raises(InputError) as error:
        open_named("cityscapes_fine_instance_seg_val", {})
    assert "gtFine" in str(error.value)
