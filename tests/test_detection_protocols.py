"""Every protocol: it loads, opens with its command, and has the values that its name promises."""

from typing import Any

import pytest

from core.config import CONFIG_DIR
from detection.cfg import load_cfg

FILES = sorted(
    p for p in (CONFIG_DIR / "detection").glob("*.yaml") if not p.stem.startswith("Base")
)
# (iterations, steps, batch, backbone, norm of box head, masks)
EXPECTED: dict[str, tuple[Any, ...]] = {
    "mask_rcnn_R50_FPN_1x": (90_000, (60_000, 80_000), 16, "fpn", "", True),
    "mask_rcnn_R50_FPN_2x": (180_000, (120_000, 160_000), 16, "fpn", "", True),
    "mask_rcnn_R50_FPN_1x_infomin": (90_000, (60_000, 80_000), 16, "fpn", "SyncBN", True),
    "mask_rcnn_R50_C4_1x": (90_000, (60_000, 80_000), 16, "c4", "", True),
    "mask_rcnn_R50_C4_2x": (180_000, (120_000, 160_000), 16, "c4", "", True),
    "faster_rcnn_R50_FPN_1x": (90_000, (60_000, 80_000), 16, "fpn", "", False),
    "faster_rcnn_R50_C4_voc_24k": (24_000, (18_000, 22_000), 16, "c4", "", False),
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_protocol_opens_with_its_command_and_keeps_the_input_convention(path: Any) -> None:
    opening = path.read_text().splitlines()[0]
    assert opening.startswith(f"# tools/train_net.py --config detection/{path.name}")
    cfg = load_cfg(path)
    assert cfg.SUITE.PROTOCOL == path.stem
    assert (cfg.INPUT.FORMAT, cfg.MODEL.RESNETS.STRIDE_IN_1X1) == ("RGB", False)
    assert list(cfg.MODEL.PIXEL_STD) == [58.395, 57.12, 57.375]
    assert cfg.MODEL.BACKBONE.FREEZE_AT == (5 if "frozen" in path.stem else 0)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_published_protocol_has_its_published_values(name: str) -> None:
    cfg = load_cfg(f"detection/{name}.yaml")
    iterations, steps, batch, backbone, norm, masks = EXPECTED[name]
    assert (cfg.SOLVER.MAX_ITER, tuple(cfg.SOLVER.STEPS)) == (iterations, steps)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (batch, 0.02)
    assert cfg.SOLVER.OPTIMIZER == "SGD"
    assert cfg.TEST.PRECISE_BN.ENABLED
    assert ("fpn" in cfg.MODEL.BACKBONE.NAME) == (backbone == "fpn")
    assert cfg.MODEL.ROI_BOX_HEAD.NORM == norm
    assert cfg.MODEL.MASK_ON == masks
    if backbone == "c4":
        topk = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST
        assert topk == (6000, 1000)
