"""What the detection tests share: a hand-made COCO pair, a tiny detector, a backbone for it."""

import functools
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

CLASSES = {3: "square", 7: "bar"}  # category ids with gaps, as COCO's
CONFIG = "detection/mask_rcnn_R18_FPN_shapes.yaml"
FACTS = {
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
    "channel_order": "RGB",
    "stride_in_1x1": False,
    "arch": "resnet18",
    "method": "ce",
    "epoch": 3,
}
SMALL_KEYS = {  # a detector that takes a tenth of a second an iteration
    "MODEL.FPN.OUT_CHANNELS": "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "16",
    "MODEL.ROI_BOX_HEAD.CONV_DIM": "16",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "16",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": "1",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "16",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "50",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "20",
    "TEST.DETECTIONS_PER_IMAGE": "10",
    "TEST.PRECISE_BN.NUM_ITER": "1",
    "INPUT.MIN_SIZE_TRAIN": "(48,64)",
    "INPUT.MIN_SIZE_TEST": "64",
    "INPUT.MAX_SIZE_TRAIN": "96",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.CHECKPOINT_PERIOD": "2",
    "SOLVER.WARMUP_ITERS": "2",
    "SOLVER.STEPS": "(3,)",
    "SOLVER.MAX_ITER": "4",
    "SOLVER.BASE_LR": "0.01",
    "DATALOADER.NUM_WORKERS": "0",
}
SMALL = [text for pair in SMALL_KEYS.items() for text in pair]


def write_pair(folder: Path, images: int = 6, **changes: Any) -> tuple[Path, Path]:
    """Write images of bright squares and bars, wide and high by turns, and their annotations."""
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(5)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": k, "name": v} for k, v in CLASSES.items()],
    }
    for number in range(1, images + 1):
        height, width = (48, 64) if number % 2 else (64, 48)
        picture = generator.integers(0, 80, (height, width, 3)).astype(np.uint8)
        name = f"{number:03d}.png"
        for category, (w, h) in ((3, (20, 20)), (7, (8, 24))):
            x, y = int(generator.integers(1, width - w)), int(generator.integers(1, height - h))
            picture[y : y + h, x : x + w] = 200 + 10 * (category == 7)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
        cv2.imwrite(str(folder / "images" / name), picture)
        content["images"].append(
            {"id": number, "file_name": name, "height": height, "width": width}
        )
    path = folder / "instances.json"
    path.write_text(json.dumps(content | changes))
    return path, folder / "images"


@functools.cache
def backbone(depth: int = 18) -> dict[str, Tensor]:
    """Return a random backbone under detectron2's bare names."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    torch.manual_seed(1)
    state = build_backbone(cfg).state_dict()
    return {k: v.clone() for k, v in state.items() if "num_batches_tracked" not in k}


def write_backbone(path: Path, tensors: dict[str, Tensor] | None = None, **facts: Any) -> Path:
    """Save a backbone as a conversion saves it; a fact that is None is left out."""
    known = {k: v for k, v in (FACTS | facts).items() if v is not None}
    content = {
        "model": backbone() if tensors is None else tensors,
        "__author__": "transfer-suite",
        "matching_heuristics": True,
        "facts": known,
    }
    torch.save(content, path)
    return path


def request(folder: Path, output: Path, **fields: Any) -> Any:
    """Return a run of the tiny detector on ``folder``'s pair, for training and validation."""
    from detection.job import Request

    json_path, images = folder / "instances.json", folder / "images"
    data = {"train_json": json_path, "train_images": images}
    data |= {"val_json": json_path, "val_images": images}
    overrides = [*SMALL, *fields.pop("overrides", ())]
    values = {k: str(v) for k, v in data.items()} | {"num_gpus": 0, "config": CONFIG} | fields
    return Request(output=str(output), overrides=overrides, **values)
