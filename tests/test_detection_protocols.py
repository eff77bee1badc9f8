"""Every protocol: how its file opens, the network it builds, the values that its name promises."""

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from core.config import CONFIG_DIR
from detection.cfg import _leaves, load_cfg
from detection.weights import meta_model

FILES = sorted(
    p for p in (CONFIG_DIR / "detection").glob("*.yaml") if not p.stem.startswith("Base")
)
SCHEDULE = ("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR")
ONE = (90_000, (60_000, 80_000), 16, 0.02)
TWO = (180_000, (120_000, 160_000), 16, 0.02)
SIDES = (640, 672, 704, 736, 768, 800)
COMMON: dict[str, Any] = {  # of all that are published
    "INPUT.FORMAT": "RGB",
    "INPUT.MIN_SIZE_TRAIN": SIDES,
    "INPUT.MIN_SIZE_TEST": 800,
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.MASK_ON": True,
    "MODEL.KEYPOINT_ON": False,
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.WARMUP_ITERS": 1000,
    "TEST.PRECISE_BN.ENABLED": True,
    "TEST.DETECTIONS_PER_IMAGE": 100,
    "DATASETS.TRAIN": ("coco_2017_train",),
    "DATASETS.TEST": ("coco_2017_val",),
}
FPN = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.FPN.NORM": "SyncBN",
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 0,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.NORM": "",
    "MODEL.ROI_MASK_HEAD.NORM": "",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
}
C4 = {
    "MODEL.RESNETS.NORM": "naiveSyncBN",
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
}
BOXES = {"MODEL.MASK_ON": False}
EXPECTED: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {  # schedule, and what differs
    "mask_rcnn_R50_FPN_1x": (ONE, FPN),
    "mask_rcnn_R50_FPN_2x": (TWO, FPN),
    "mask_rcnn_R50_FPN_1x_infomin": (
        ONE,
        FPN
        | {"MODEL.ROI_BOX_HEAD.NUM_CONV": 4, "MODEL.ROI_BOX_HEAD.NUM_FC": 1}
        | {"MODEL.ROI_BOX_HEAD.NORM": "SyncBN", "MODEL.ROI_MASK_HEAD.NORM": "SyncBN"},
    ),
    "mask_rcnn_R50_C4_1x": (ONE, C4),
    "mask_rcnn_R50_C4_2x": (TWO, C4),
    "faster_rcnn_R50_C4_voc_24k": (
        (24_000, (18_000, 22_000), 16, 0.02),
        C4
        | BOXES
        | {"INPUT.MIN_SIZE_TRAIN": (480, 512, 544, 576, 608, *SIDES), "SOLVER.WARMUP_ITERS": 100}
        | {"DATASETS.TRAIN": ("voc_2007_trainval", "voc_2012_trainval")}
        | {"DATASETS.TEST": ("voc_2007_test",)},
    ),
    "faster_rcnn_R50_FPN_1x": (ONE, FPN | BOXES),
    "retinanet_R50_FPN_1x": (
        (*ONE[:3], 0.01),
        BOXES
        | {"MODEL.META_ARCHITECTURE": "RetinaNet", "MODEL.FPN.NORM": "SyncBN"}
        | {"MODEL.RETINANET.IOU_THRESHOLDS": [0.4, 0.5], "MODEL.RETINANET.IOU_LABELS": [0, -1, 1]},
    ),
    "keypoint_rcnn_R50_FPN_1x": (
        ONE,
        FPN
        | BOXES
        | {"MODEL.KEYPOINT_ON": True, "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1500}
        | {"MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.5, "MODEL.ROI_HEADS.NUM_CLASSES": 1}
        | {"DATASETS.TRAIN": ("keypoints_coco_2017_train",)}
        | {"DATASETS.TEST": ("keypoints_coco_2017_val",)},
    ),
    "mask_rcnn_R50_FPN_lvis_v1_1x": (
        TWO,
        FPN
        | {"TEST.DETECTIONS_PER_IMAGE": 300, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0001}
        | {"DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler"}
        | {"DATALOADER.REPEAT_THRESHOLD": 0.001}
        | {"DATASETS.TRAIN": ("lvis_v1_train",), "DATASETS.TEST": ("lvis_v1_val",)},
    ),
    "mask_rcnn_R50_FPN_cityscapes": (
        (24_000, (18_000,), 8, 0.01),
        FPN
        | {"INPUT.MIN_SIZE_TRAIN": tuple(range(800, 1025, 32)), "INPUT.MIN_SIZE_TEST": 1024}
        | {"INPUT.MAX_SIZE_TRAIN": 2048, "INPUT.MAX_SIZE_TEST": 2048}
        | {"DATASETS.TRAIN": ("cityscapes_fine_instance_seg_train",)}
        | {"DATASETS.TEST": ("cityscapes_fine_instance_seg_val",)},
    ),
    "mask_rcnn_any_FPN_1x": (
        (*ONE[:3], 0.0001),
        {"SOLVER.OPTIMIZER": "AdamW", "SOLVER.WEIGHT_DECAY": 0.05, "MODEL.FPN.NORM": "LN"}
        | {"SOLVER.WEIGHT_DECAY_NORM": 0.0, "SOLVER.WEIGHT_DECAY_BIAS": 0.0}
        | {"MODEL.BACKBONE.NAME": "build_network_backbone", "MODEL.NETWORK.NORM": "SyncBN"}
        | {"SOLVER.LAYER_DECAY": 1.0, "MODEL.NETWORK.DROP_PATH": 0.0},
    ),
    "screen_10pct_mask_rcnn_R50_FPN": ((9_000, (6_000, 8_000), 16, 0.02), FPN),
    "screen_frozen_mask_rcnn_R50_FPN_1x": (ONE, FPN | {"MODEL.BACKBONE.FREEZE_AT": 5}),
}


def test_every_protocol_is_in_the_table_or_a_quick_variant() -> None:
    assert {p.stem for p in FILES if "shapes" not in p.stem} == set(EXPECTED)


def test_every_kind_of_detector_has_a_quick_variant_on_the_embedded_data() -> None:
    quick = {
        match[1]
        for path in FILES
        if "shapes" in path.stem
        and (match := re.search(r"Quick variant of (\w+)", path.read_text()))
    }

    def kind(name: str) -> tuple[Any, ...]:
        cfg = load_cfg(f"detection/{name}.yaml")
        model = cfg.MODEL
        return model.META_ARCHITECTURE, model.BACKBONE.NAME, model.ROI_HEADS.NAME, model.KEYPOINT_ON

    assert {kind(name) for name in EXPECTED} == {kind(name) for name in quick}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_protocol_has_the_values_that_its_name_promises(name: str) -> None:
    schedule, values = EXPECTED[name]
    wanted = COMMON | values | dict(zip(SCHEDULE, schedule, strict=True))
    found = dict(_leaves(load_cfg(f"detection/{name}.yaml")))
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_protocol_opens_with_its_command_time_and_ap(path: Path) -> None:
    lines = path.read_text().split("_BASE_")[0].splitlines()
    assert lines[0].startswith(f"# tools/train_net.py --config detection/{path.name}")
    opening = " ".join(line.removeprefix("#").strip() for line in lines)
    expected = opening.partition("Expected: ")[2]
    assert re.search(r"\bAP\b.* [\d.]+|AP unknown", expected), "says no AP"
    cfg = load_cfg(path)
    hours = re.match(r"about ([\d.]+) hours on 8 V100", expected)
    assert (float(hours[1]) if hours else 0.0) == cfg.SUITE.EXPECTED_HOURS
    assert hours or "on two CPU cores" in expected
    assert path.stem == cfg.SUITE.PROTOCOL


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_protocol_builds_the_network_that_it_names(path: Path) -> None:
    network = ["MODEL.NETWORK.ARCH", "timm/test_convnext"] if "_any_" in path.stem else []
    cfg = load_cfg(path, network)
    model: Any = meta_model(cfg)
    trunk = getattr(model.backbone, "bottom_up", model.backbone)
    frozen = not any(p.requires_grad for p in trunk.parameters())
    assert frozen == ("frozen" in path.stem)
    if "retinanet" in path.stem:
        assert len(model.head_in_features) in (3, 5)
        return
    heads = model.roi_heads
    assert heads.mask_on == ("mask" in path.stem)
    assert heads.keypoint_on == ("keypoint" in path.stem) if "FPN" in path.stem else True
    if "C4" in path.stem:  # its last stage, and one norm more, stand in the box head
        assert isinstance(heads.res5.norm, nn.BatchNorm2d)
        assert "res5" not in trunk.stage_names
    else:
        kinds = [type(m).__name__ for m in heads.box_head.modules()]
        assert ("BatchNorm2d" in kinds) == path.stem.endswith("infomin")
