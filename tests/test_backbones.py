"""Any network in a detector: its own numbers under its own names, and the field's rules."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.backbone import SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from timm.models.vision_transformer_sam import samvit_base_patch16
from torch import nn

from core import identity
from core.errors import InputError
from core.seeds import torch_seeded
from detection import backbones
from detection.cfg import load_cfg
from detection.trainer import build_adamw
from models.factory import create_model, describe, forward_maps

SMALL = ["timm/test_convnext", "timm/test_vit", "timm/test_efficientnet", "resnet18"]


def config(arch: str, *overrides: str) -> CfgNode:
    """Return the quick protocol of any backbone with a still smaller head."""
    small = ["MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM"]
    small += ["16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    small += ["MODEL.NETWORK.NORM", "", "MODEL.NETWORK.ARCH", arch]
    return load_cfg("mask_rcnn_any_shapes.yaml", [*small, *overrides])


def built(cfg: CfgNode, seed: int = 0) -> Any:
    with torch_seeded(seed):
        return build_model(cfg)


def batch(seed: int, height: int = 100, width: int = 130) -> list[dict[str, Any]]:
    """Return two images with an object each."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(2):
        truth = Instances((height, width))
        truth.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 60.0, 70.0]]))
        truth.gt_classes = torch.tensor([1])
        mask = torch.zeros(1, height, width, dtype=torch.bool)
        mask[:, 10:70, 10:60] = True
        truth.gt_masks = BitMasks(mask)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        images.append({"image": image, "instances": truth, "height": height, "width": width})
    return images


def losses(detector: nn.Module, images: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    with EventStorage(), torch_seeded(5):  # regions are sampled
        return detector(images)


@pytest.mark.parametrize("arch", SMALL)
def test_a_step_reaches_every_trained_weight_under_the_networks_own_names(arch: str) -> None:
    detector = built(config(arch))
    found = {backbones.inside(name) for name in detector.state_dict()} - {""}
    classifier = "classifier" if "efficient" in arch else "fc" if arch == "resnet18" else "head"
    network = create_model(arch, 2).state_dict()
    assert found == {name for name in network if not name.startswith(classifier) or "norm" in name}
    detector.train()
    sum(losses(detector, batch(0)).values()).backward()  # type: ignore[union-attr]
    named = dict(detector.named_parameters())
    assert all((p.grad is not None) == p.requires_grad for p in named.values())
    frozen = {backbones.inside(name) for name, p in named.items() if not p.requires_grad}
    assert frozen <= backbones.unused_parameters(arch)
    other = built(config(arch), seed=9)
    other.load_state_dict(detector.state_dict())
    images, outputs = batch(1), []
    with torch.inference_mode():
        for model in (detector.eval(), other.eval()):
            outputs.append(model(images)[0]["instances"].pred_boxes.tensor)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("arch", [*SMALL, "timm/swin_s3_tiny_224"])
def test_the_detectors_maps_are_the_networks(arch: str) -> None:
    backbone = backbones.NetworkBackbone(arch).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        maps, expected = backbone(x), forward_maps(backbone.network, x)
    for name, shape in backbone.output_shape().items():
        assert torch.equal(maps[name], expected[backbone.selected[name]])
        assert maps[name].shape[1:] == (shape.channels, 64 // shape.stride, 96 // shape.stride)


def test_maps_of_patch_14_are_resized_to_16_where_they_lie(tmp_path: Path) -> None:
    """A network that gives each patch's mean column: the resized map has it for patches of 16."""
    (tmp_path / "ramp.py").write_text(
        "from torch import nn\n\nclass Ramp(nn.AvgPool2d):\n    image_size = 140\n\n"
        "def ramp():\n    return Ramp(14)\n"
    )
    backbone = backbones.NetworkBackbone(f"{tmp_path}/ramp.py:ramp")
    assert backbones.note(f"{tmp_path}/ramp.py:ramp") == "maps of stride 14 are resized to 16"
    columns = torch.arange(128.0).expand(1, 3, 96, 128)
    found = backbone(columns)["res4"]
    assert found.shape == (1, 3, 6, 8)
    torch.testing.assert_close(found[0, 0, 2, 1:-1], torch.arange(1, 7) * 16 + 7.5)


def test_out_norms_and_drop_path_are_where_the_config_puts_them() -> None:
    cfg = config("timm/test_convnext", "MODEL.NETWORK.OUT_NORM", "LN")
    cfg.MODEL.NETWORK.DROP_PATH = 0.4
    bottom_up = built(cfg).backbone.bottom_up
    assert set(bottom_up.out_norms) == {"res2", "res3", "res4", "res5"}
    with torch.inference_mode():
        maps = bottom_up.eval()(torch.randn(1, 3, 64, 64))
    for value in maps.values():
        torch.testing.assert_close(value.mean(1), torch.zeros_like(value[:, 0]), atol=1e-5, rtol=0)
    rates = [m.drop_prob for m in bottom_up.modules() if hasattr(m, "drop_prob")]
    assert max(rates) == pytest.approx(0.4)


@pytest.mark.parametrize("norm", ["naiveSyncBN", "FrozenBN", "SyncBN"])
def test_other_batch_norms_have_the_same_names_and_numbers(norm: str) -> None:
    with torch_seeded(0):
        network = create_model("timm/test_efficientnet", 2)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(generator=torch.Generator().manual_seed(1))
    names = [name for name in network.state_dict() if "num_batches" not in name]
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = network.eval()(x)
    converted = backbones.with_norms(network, norm).eval()
    with torch.inference_mode():
        torch.testing.assert_close(converted(x), expected)
    assert names == [name for name in converted.state_dict() if "num_batches" not in name]
    assert not any(type(m).__name__.startswith("BatchNorm") for m in converted.modules())
    if norm == "naiveSyncBN":
        with torch_seeded(0):
            plain = create_model("timm/test_efficientnet", 2)
        plain.load_state_dict(converted.state_dict())
        torch.testing.assert_close(converted.train()(x), plain.train()(x))


def test_a_frozen_backbone_stays_as_it_was() -> None:
    cfg = config("timm/test_efficientnet", "MODEL.BACKBONE.FREEZE_AT", "5")
    detector = built(cfg).train()
    before = {k: v.clone() for k, v in detector.state_dict().items() if backbones.inside(k)}
    sum(losses(detector, batch(0)).values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for n, p in detector.named_parameters() if backbones.inside(n))
    assert all(torch.equal(detector.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("arch", "overrides", "sentence"),
    [
        ("timm/hiera_tiny_224", [], "takes no images of 224×320 pixels"),
        ("resnet18_cifar", [], r"strides 1, 2, 4, 8; a detector needs .* none of 16"),
        ("", [], "MODEL.NETWORK.ARCH is empty"),
        ("timm/test_vit", ["MODEL.BACKBONE.FREEZE_AT", "2"], "FREEZE_AT 2"),
        ("timm/test_vit", ["MODEL.NETWORK.NORM", "LN"], "MODEL.NETWORK.NORM 'LN'"),
        ("resnet18", ["MODEL.NETWORK.DROP_PATH", "0.1"], "drop_path_rate"),
    ],
)
def test_what_cannot_detect_is_one_sentence(arch: str, overrides: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        built(config(arch, *overrides))


def test_a_users_vector_is_for_transfer_only(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())\n"
    )
    with pytest.raises(InputError, match="gives a vector and no map: it can be transferred, not"):
        built(config(f"{tmp_path}/mine.py:net"))


def tiny_sam(pretrained: bool = False, **options: Any) -> nn.Module:
    """timm's ``samvit``, which has ViTDet's structure, at a size for tests."""
    small = {"img_size": 96, "embed_dim": 32, "depth": 4, "num_heads": 2, "window_size": 4}
    more = {"global_attn_indexes": (1, 3), "neck_chans": 16}
    return samvit_base_patch16(pretrained, **small, **more, **options)


@pytest.fixture
def sam(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "tiny_sam", tiny_sam)
    for function in (describe, backbones.unused_parameters):
        function.cache_clear()
    return "timm/tiny_sam"


def vit_pyramid(norm: str) -> SimpleFeaturePyramid:
    vit = ViT(
        img_size=96, patch_size=16, embed_dim=32, depth=4, num_heads=2, window_size=4,
        window_block_indexes=(0, 2), use_rel_pos=True, pretrain_img_size=96,
        norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
    )  # fmt: skip
    return SimpleFeaturePyramid(
        vit, "last_feat", 16, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), norm, square_pad=96
    )


def test_maps_and_losses_equal_those_of_detectron2s_vitdet(sam: str) -> None:
    """The same weights in timm's samvit and in detectron2's ViT with its simple feature pyramid."""
    cfg = config(sam, "MODEL.NETWORK.SQUARE_PAD", "96")
    ours, theirs = built(cfg, 1), built(cfg, 2)
    with torch_seeded(3):
        theirs.backbone = vit_pyramid("LN")
        for name, p in theirs.backbone.named_parameters():
            if "rel_pos" in name:
                nn.init.normal_(p, std=0.5)
    renamed = {}
    for name, value in theirs.state_dict().items():
        if name == "backbone.net.pos_embed":  # 1×(1 + h·w)×C, with a class token's
            value = value[:, 1:].reshape(1, 6, 6, 32)
        renamed[name.replace("backbone.net.", "backbone.net.network.")] = value
    lost = ours.load_state_dict(renamed, strict=False)
    assert lost.unexpected_keys == []
    assert {backbones.inside(n).split(".")[0] for n in lost.missing_keys} == {"neck"}  # not used
    images = batch(4, 90, 96)
    found, expected = (losses(model.train(), images) for model in (ours, theirs))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        x = torch.randn(2, 3, 96, 96)
        maps, others = ours.eval().backbone(x), theirs.eval().backbone(x)
    for name, value in others.items():
        torch.testing.assert_close(maps[name], value, atol=1e-5, rtol=1e-5)


def test_layer_decay_and_weight_decay_equal_detectron2s_of_vitdet(sam: str) -> None:
    cfg = config(sam, "SOLVER.LAYER_DECAY", "0.7", "SOLVER.WEIGHT_DECAY", "0.1")
    cfg.SOLVER.WEIGHT_DECAY_BIAS = None  # as weights
    detector = built(cfg)
    factor = backbones.layer_decay(cfg, detector.backbone.net.network)
    names = {id(p): name for name, p in detector.named_parameters() if p.requires_grad}
    for name in names.values():
        expected = get_vit_lr_decay_rate(name.replace("net.network.", "net."), 0.7, num_layers=4)
        assert factor(name) == pytest.approx(expected), name
    seen = {}
    for group in build_adamw(cfg, detector).param_groups:
        for p in group["params"]:
            seen[names[id(p)]] = group["weight_decay"]
            assert group["lr"] == pytest.approx(cfg.SOLVER.BASE_LR * factor(names[id(p)]))
    assert seen.keys() == set(names.values())
    for name, decay in seen.items():
        normed = "norm" in name or ("simfp" in name and ".1." in name and "weight" in name)
        spared = "pos_embed" in name and "rel" not in name
        assert decay == (0.0 if normed or spared else 0.1) or "simfp" in name, name


def test_layers_may_be_named_by_patterns() -> None:
    cfg = config("timm/test_convnext", "SOLVER.LAYER_DECAY", "0.5")
    cfg.SOLVER.LAYERS = [["stem", 0], [r"stages\.0", 1], [r"stages\.[123]", 2]]
    factor = backbones.solver_rules(cfg, built(cfg))["lr_factor_func"]
    prefix = "backbone.bottom_up.network"
    assert factor(f"{prefix}.stem.0.weight") == 0.125
    assert factor(f"{prefix}.stages.3.blocks.0.gamma") == 0.5
    assert factor("backbone.fpn_lateral2.weight") == factor("roi_heads.x") == 1.0
    cfg.SOLVER.LAYERS = [["stem", 0]]
    with pytest.raises(InputError, match=r"SOLVER.LAYERS has no layer for stages\.0"):
        backbones.solver_rules(cfg, built(cfg))
    plain = config("resnet18", "SOLVER.LAYER_DECAY", "0.5")
    with pytest.raises(InputError, match="the layers of resnet18 are not known"):
        backbones.solver_rules(plain, built(plain))


def test_keys_of_networks_leave_the_identity_of_older_rows_and_arch_is_the_weights() -> None:
    cfg = load_cfg("mask_rcnn_R50_FPN_1x.yaml")
    known = dict(cfg)
    assert not [key for key in identity.effective(known) if "NETWORK" in key or "LAYER" in key]
    one, two = config("timm/test_vit"), config("resnet18")
    assert identity.recipe_hash(one) == identity.recipe_hash(two)


RANKS = """
import torch
from core import dist
from tests.test_backbones import batch, built, config, losses
from torch.nn.parallel import DistributedDataParallel
dist.init("cpu")
for arch in ("timm/test_convnext", "timm/test_vit"):
    detector = built(config(arch)).train()
    wrapped = DistributedDataParallel(detector, broadcast_buffers=False)
    sum(losses(wrapped, batch(dist.rank())).values()).backward()
    sum(losses(wrapped, batch(dist.rank())).values()).backward()  # a lost gradient raises here
    if dist.is_main():
        alone = built(config(arch)).train()
        for rank in (0, 0, 1, 1):
            (sum(losses(alone, batch(rank)).values()) / 2).backward()
        for (name, p), q in zip(detector.named_parameters(), alone.parameters()):
            if p.requires_grad:
                torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
dist.shutdown()
"""


def test_two_ranks_have_the_gradients_of_one_process(run_ranks: Callable[..., None]) -> None:
    run_ranks(RANKS, 2)
