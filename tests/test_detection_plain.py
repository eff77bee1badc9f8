"""What this suite adds around detectron2 changes none of its numbers."""

import copy
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats

from detection import data as datasets
from detection.cfg import load_cfg, set_norms
from detection.evaluation import Evaluator
from detection.loader import EndlessBatches, training_records
from detection.run import run
from detection.trainer import seed_torch
from tests.detection_tiny import SMALL_KEYS, request, write_pair

R50 = "detection/mask_rcnn_R50_FPN_1x.yaml"
STEPS = {"SOLVER.MAX_ITER": "6", "SOLVER.STEPS": "(4,)", "SOLVER.OPTIMIZER": "SGD"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_pair(folder)
    return folder


def _plainly_trained(cfg: Any) -> dict[str, torch.Tensor]:
    """Train as detectron2's plain_train_net.py does, on the same batches and random numbers."""
    seed_torch(cfg.SEED)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    batches = list(islice(EndlessBatches(cfg, training_records(cfg)), cfg.SOLVER.MAX_ITER))
    with EventStorage():
        for iteration, batch in enumerate(copy.deepcopy(batches)):
            seed_torch(cfg.SEED, 0, iteration)
            losses = sum(model(batch).values())
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
            scheduler.step()
        seed_torch(cfg.SEED, 0, 0)
        update_bn_stats(model, iter(batches), cfg.TEST.PRECISE_BN.NUM_ITER)
    return dict(model.state_dict())


def test_six_steps_of_the_default_protocol_are_detectron2s_bit_for_bit(
    data: Path, tmp_path: Path
) -> None:
    """Through warm-up, a step of the lr and PreciseBN."""
    keys = [text for pair in (SMALL_KEYS | STEPS).items() for text in pair]
    asked = request(data, tmp_path / "run", config=R50, seed=5, overrides=keys)
    assert run(asked) == 0
    content = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    cfg = load_cfg(tmp_path / "run" / "config.yaml")
    cfg.MODEL.DEVICE = "cpu"
    set_norms(cfg, "BN")
    plain = _plainly_trained(cfg)
    assert plain.keys() == content["model"].keys()
    assert [k for k, v in plain.items() if not torch.equal(v, content["model"][k])] == []
    assert len(plain) > 300
    assert cfg.SOLVER.WARMUP_ITERS == 2


@pytest.mark.parametrize("backend", ["pycocotools", "faster", "hotcoco"])
def test_ap_is_that_of_detectron2s_evaluator(data: Path, tmp_path: Path, backend: str) -> None:
    if backend != "pycocotools":
        pytest.importorskip({"faster": "faster_coco_eval"}.get(backend, backend))
    split = datasets.open_pair(data / "instances.json", data / "images", "val")
    datasets.register([split])
    cfg = load_cfg(R50, ["SUITE.COCO_BACKEND", backend])
    name = split.catalog_name
    records = DatasetCatalog.get(name)
    (tmp_path / "ours").mkdir()
    plain = COCOEvaluator(name, ("bbox", "segm"), output_dir=str(tmp_path), use_fast_impl=False)
    ours = Evaluator(split, cfg, tmp_path / "ours")
    generator = np.random.default_rng(0)
    for judge in (plain, ours):
        judge.reset()
    for record in records:
        found = _near(record, generator)
        for judge in (plain, ours):
            judge.process([record], [{"instances": found}])
    wanted = plain.evaluate()
    found = ours.evaluate()
    for task in ("bbox", "segm"):
        assert 0 < wanted[task]["AP"] < 100
        for metric, value in found[task].items():
            assert value == pytest.approx(wanted[task][metric], abs=1e-11), (task, metric)
    saved = [
        json.loads((f / "coco_instances_results.json").read_text())
        for f in (tmp_path, tmp_path / "ours")
    ]
    assert saved[0] == saved[1]


def _near(record: dict[str, Any], generator: np.random.Generator) -> Instances:
    """Return detections a few pixels beside the objects of an image, and one more."""
    height, width = record["height"], record["width"]
    x, y, w, h = np.array([a["bbox"] for a in record["annotations"]], float).T
    boxes = np.stack([x, y, x + w, y + h], 1) + generator.integers(-4, 5, (len(x), 4))
    boxes = np.concatenate([boxes, [[2.0, 3.0, 30.0, 30.0]]]).clip(0, [width, height] * 2)
    masks = np.zeros((len(boxes), height, width), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
        mask[y0:y1, x0:x1] = True
    found = Instances((height, width))
    found.pred_boxes = Boxes(torch.tensor(boxes))
    found.pred_masks = torch.tensor(masks)
    found.scores = torch.tensor(generator.random(len(boxes)))
    classes = [a["category_id"] for a in record["annotations"]]
    found.pred_classes = torch.tensor([*classes, 0])
    return found
