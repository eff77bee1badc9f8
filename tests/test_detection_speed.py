"""Precision, memory format and compilation: off by default, and what they compute is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.errors import InputError
from detection.cfg import load_cfg, set_norms
from detection.data import open_pair, register
from detection.loader import training_records
from detection.run import run
from detection.trainer import build, build_detector, first_hooks, seed_torch
from tests.detection_tiny import CONFIG, SMALL, request, write_pair


def _cfg(*overrides: str) -> Any:
    cfg = load_cfg(CONFIG, [*SMALL, "MODEL.DEVICE", "cpu", *overrides])
    set_norms(cfg, "BN")
    return cfg


def _maps(cfg: Any) -> list[Tensor]:
    seed_torch(1)
    detector: Any = build_detector(cfg).eval()
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, 3, 64, width, generator=generator) for width in (64, 96)]
    with torch.no_grad():
        return [value for image in images for value in detector.backbone(image).values()]


@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("inductor", marks=pytest.mark.slow)],  # it builds C++
)
def test_a_compiled_backbone_computes_the_same_and_keeps_its_names(backend: str) -> None:
    plain, compiled = _cfg(), _cfg("SUITE.COMPILE", backend)
    for one, other in zip(_maps(plain), _maps(compiled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    names = [list(build_detector(cfg).state_dict()) for cfg in (plain, compiled)]
    assert names[0] == names[1]


def test_channels_last_computes_the_same_in_that_format() -> None:
    plain, last = _maps(_cfg()), _maps(_cfg("SUITE.CHANNELS_LAST", "True"))
    for one, other in zip(plain, last, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    assert last[0].is_contiguous(memory_format=torch.channels_last)
    assert not plain[0].is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_training_begins_with_nearly_the_same_losses(tmp_path: Path) -> None:
    json_path, images = write_pair(tmp_path / "tiny")
    split = open_pair(json_path, images, "train", "speed")
    register([split])
    names = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_mask")

    def losses(*overrides: str) -> Tensor:
        cfg = _cfg(*overrides)
        cfg.DATASETS.TRAIN = (split.catalog_name,)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(split.classes)
        trainer = build(cfg, training_records(cfg))
        trainer.register_hooks(first_hooks(cfg))
        trainer.train(0, 1)
        return torch.tensor([trainer.storage.history(name).latest() for name in names])

    exact = losses()
    low = losses("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16")
    assert not torch.equal(exact, low)  # it acts
    torch.testing.assert_close(exact, low, rtol=0.1, atol=0.02)


def test_all_are_off_by_default_and_leave_the_protocol_its_name() -> None:
    cfg = load_cfg("detection/mask_rcnn_R50_FPN_1x.yaml")
    assert not cfg.SOLVER.AMP.ENABLED
    assert not cfg.SUITE.CHANNELS_LAST
    assert cfg.SUITE.COMPILE == ""


def test_what_this_machine_cannot_do_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "tiny")

    def refused(*overrides: str) -> str:
        asked = request(tmp_path / "tiny", tmp_path / "run", overrides=overrides)
        with pytest.raises(InputError) as error:
            run(asked)
        assert not (tmp_path / "run").exists()
        return str(error.value)

    assert "'inductr' is not one of" in refused("SUITE.COMPILE", "inductr")
    assert "float16 or bfloat16" in refused("SOLVER.AMP.DTYPE", "half")
    assert "SOLVER.STEPS names 3" in refused("SOLVER.MAX_ITER", "3")
    amp = refused("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16")
    assert "needs a GPU" in amp
