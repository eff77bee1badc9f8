"""Weights of other architectures, in the layouts of those who publish them, become the network's.

Each layout is made by hand from timm's tensors; what comes back must be those, to the bit.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import beit, convnext, eva, swin_transformer, vision_transformer
from timm.models import vision_transformer_sam as samvit
from torch import Tensor

from convert import networks
from convert.backbone import read_backbone
from convert.d2 import convert, load_converted
from core.errors import InputError
from core.seeds import torch_seeded
from models import factory

State = dict[str, Tensor]
BASE = "timm/vit_base_patch16_224"
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "a_vit": (vision_transformer.vit_tiny_patch16_224, VIT | {"img_size": 64}),
    "a_clip": (vision_transformer.vit_base_patch16_clip_224, VIT | {"img_size": 64}),
    "a_dinov2": (vision_transformer.vit_small_patch14_dinov2, VIT | {"img_size": 56}),
    "a_register": (vision_transformer.vit_small_patch14_reg4_dinov2, VIT | {"img_size": 56}),
    "a_dinov3": (eva.vit_small_patch16_dinov3, VIT),
    "a_beit": (beit.beit_base_patch16_224, VIT),
    "a_convnext": (convnext.convnext_tiny, {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}),
    "a_swin": (swin_transformer.swin_tiny_patch4_window7_224,
               {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}),
    "a_sam": (samvit.samvit_base_patch16,
              VIT | {"img_size": 96, "window_size": 4, "global_attn_indexes": (1,),
                     "neck_chans": 8}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have timm know the families at a size for tests."""
    for name, (create, options) in SMALL.items():

        def entry(pretrained: bool = False, c: Any = create, o: Any = options, **more: Any) -> Any:
            return c(pretrained, **o, **more)

        monkeypatch.setitem(timm.models._registry._model_entrypoints, name, entry)
    yield
    for cached in (factory.describe, networks.blank, networks.shapes_of):
        cached.cache_clear()


def tensors(name: str, seed: int = 0) -> State:
    """Return a network's tensors, none of them constant, in the order of timm."""
    with torch_seeded(seed):
        state = timm.create_model(name, num_classes=3).state_dict()
        return {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in state.items()}


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    """Return a state under other names, by regular expressions in their order."""
    found = {}
    for name, value in state.items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


def mae(state: State) -> Any:
    extra = {"mask_token": torch.ones(1, 1, 32), "decoder_embed.weight": torch.ones(8, 32)}
    extra |= {"decoder_blocks.0.norm1.weight": torch.ones(8), "decoder_pred.bias": torch.ones(3)}
    return {"model": {k: v for k, v in state.items() if not k.startswith("head")} | extra}


def dino(state: State) -> Any:
    student = {f"module.backbone.{k}": v + 1 for k, v in state.items() if "head" not in k}
    teacher = {f"backbone.{k}": v for k, v in state.items() if "head" not in k}
    head = {"head.mlp.0.weight": torch.ones(4, 4), "head.last_layer.weight_g": torch.ones(4, 1)}
    return {"student": student, "teacher": teacher | head, "epoch": 3}


def dinov2(state: State) -> Any:
    found = {k: v for k, v in state.items() if "head" not in k}
    return found | {"mask_token": torch.ones(1, 32)}


def registers(state: State) -> Any:
    """Its class token has a position, which timm has added to it."""
    found = dinov2(state)
    found["register_tokens"] = found.pop("reg_token")
    found["pos_embed"] = torch.cat([torch.full((1, 1, 32), 0.5), found["pos_embed"]], 1)
    found["cls_token"] = found["cls_token"] - 0.5
    return found


def dinov3(state: State) -> Any:
    found = {k: v for k, v in state.items() if "head" not in k}
    found = renamed(found, ("reg_token", "storage_tokens"), (r"gamma_([12])", r"ls\1.gamma"))
    for block in range(2):
        found[f"blocks.{block}.attn.qkv.bias"] = torch.zeros(96)
        found[f"blocks.{block}.attn.qkv.bias_mask"] = torch.ones(96)
    return found | {"mask_token": torch.ones(1, 32), "rope_embed.periods": torch.ones(4)}


def openai_clip(state: State) -> Any:
    found = renamed(
        {k: v for k, v in state.items() if "head" not in k},
        (r"patch_embed\.proj", "conv1"), ("pos_embed", "positional_embedding"),
        (r"^norm\.", "ln_post."), ("norm_pre", "ln_pre"), (r"norm([12])", r"ln_\1"),
        (r"qkv\.", "in_proj_"), (r"attn\.proj", "attn.out_proj"), ("fc1", "c_fc"),
        ("fc2", "c_proj"), (r"^blocks", "transformer.resblocks"), ("cls_token", "class_embedding"),
    )  # fmt: skip
    found["class_embedding"] = found["class_embedding"].reshape(-1)
    found["positional_embedding"] = found["positional_embedding"][0]
    found = {f"visual.{name}": value for name, value in found.items()}
    text = {"transformer.resblocks.0.attn.in_proj_weight": torch.ones(8, 8)}
    text |= {"positional_embedding": torch.ones(4, 8), "logit_scale": torch.ones(())}
    text |= {"token_embedding.weight": torch.ones(9, 8), "ln_final.weight": torch.ones(8)}
    return found | text | {"text_projection": torch.ones(8, 8), "visual.proj": torch.ones(32, 8)}


def openclip(state: State) -> Any:
    found = {f"visual.trunk.{k}": v for k, v in state.items() if "head" not in k}
    return found | {"text.positional_embedding": torch.ones(4, 8), "logit_bias": torch.ones(())}


def microsoft_beit(state: State) -> Any:
    index = {"blocks.0.attn.relative_position_index": torch.ones(17, 17, dtype=torch.long)}
    return {"model": state | index}


def facebook_convnext(state: State) -> Any:
    found = renamed(
        state, (r"^stem\.", "downsample_layers.0."), (r"stages\.(\d)\.down\w+", r"down__.\1"),
        ("down__", "downsample_layers"), (r"stages\.(\d)\.blocks\.", r"stages.\1."),
        ("conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"), (r"head\.norm", "norm"),
        (r"head\.fc", "head"),
    )  # fmt: skip
    return {"model": found}


def microsoft_swin(state: State) -> Any:
    found = {}
    for name, value in state.items():
        if place := re.match(r"layers\.(\d)\.downsample", name):  # at the end of the stage before
            name = name.replace(place[0], f"layers.{int(place[1]) - 1}.downsample")
        found[name.replace("head.fc", "head")] = value
    found["layers.0.blocks.0.attn.relative_position_index"] = torch.ones(49, 49)
    return {"model": found | {"layers.0.blocks.0.attn_mask": torch.ones(4, 49, 49)}}


def segment_anything(state: State) -> Any:
    found = renamed({k: v for k, v in state.items() if "head" not in k}, (r"mlp\.fc", "mlp.lin"))
    found = {f"image_encoder.{name}": value for name, value in found.items()}
    return found | {"mask_decoder.iou_token.weight": torch.ones(1, 8)}


LAYOUTS: dict[str, tuple[str, Callable[[State], Any]]] = {
    "mae": ("a_vit", mae),
    "dino": ("a_vit", dino),
    "dinov2": ("a_dinov2", dinov2),
    "dinov2 with registers": ("a_register", registers),
    "dinov3": ("a_dinov3", dinov3),
    "openai clip": ("a_clip", openai_clip),
    "openclip": ("a_vit", openclip),
    "beit": ("a_beit", microsoft_beit),
    "facebook convnext": ("a_convnext", facebook_convnext),
    "microsoft swin": ("a_swin", microsoft_swin),
    "segment anything": ("a_sam", segment_anything),
    "timm": ("a_vit", lambda state: state),
    "timm's trainer, DDP": ("a_swin", lambda state: {
        "state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 1, "arch": "a_swin"}),
}  # fmt: skip


def saved(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_networks_tensors(layout: str, tmp_path: Path) -> None:
    name, make = LAYOUTS[layout]
    state = tensors(name)
    found = read_backbone(saved(make(dict(state)), tmp_path), arch=f"timm/{name}")
    expected = {k: v for k, v in state.items() if k in networks.shapes_of(f"timm/{name}")}
    assert found.state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found.state[key], value, msg=key)
    assert found.notes["new_tensors"] == []
    assert found.arch == f"timm/{name}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", ["lost", "misshapen", "foreign", "nan"])
def test_a_layout_with_a_fault_is_refused_by_the_tensors_name(
    layout: str, fault: str, tmp_path: Path
) -> None:
    """No tensor of the network is ever left at random, and none of the file's passed over."""
    name, make = LAYOUTS[layout]
    content = make(tensors(name))
    states = [v for v in content.values() if isinstance(v, dict)] or [content]
    for state in states:
        key = next(k for k in state if "fc1.weight" in k or re.search("pwconv1.w|lin1.w|c_fc.w", k))
        if fault == "lost":
            del state[key]
        elif fault == "misshapen":
            state[key] = state[key][:-1]
        elif fault == "foreign":
            state[key.replace("weight", "scale")] = state[key]
        else:
            state[key] = state[key] * float("nan")
    with pytest.raises(InputError) as error:
        read_backbone(saved(content, tmp_path), arch=f"timm/{name}")
    said = str(error.value)
    assert re.search("fc1|pwconv1|lin1|c_fc|timm cannot read it as timm/a_convnext", said), said


def test_positions_of_another_grid_are_interpolated_by_a_rule_that_is_named(
    tmp_path: Path,
) -> None:
    state = tensors("a_vit")
    patches = torch.randn(1, 9, 32)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], patches], 1)
    found = read_backbone(saved(state, tmp_path), arch="timm/a_vit")
    grid = patches.reshape(1, 3, 3, 32).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True)
    torch.testing.assert_close(
        found.state["pos_embed"][:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 16, 32)
    )
    assert found.notes["positions"] == (
        "positions of 3×3 interpolated to 4×4, bicubic, antialiased (timm)"
    )


def test_masked_autoencoders_enter_vitdets_structure_as_in_detectron2(tmp_path: Path) -> None:
    """Relative positions start at zero, positions are interpolated as detectron2's ViT does."""
    from detectron2.modeling.backbone.utils import get_abs_pos

    state = tensors("a_vit")
    found = read_backbone(saved(mae(state), tmp_path), arch="timm/a_sam", mean=[1] * 3, std=[1] * 3)
    expected = get_abs_pos(state["pos_embed"], True, (6, 6))
    torch.testing.assert_close(found.state["pos_embed"], expected)
    assert "bicubic, not antialiased (detectron2)" in found.notes["positions"]
    relative = [v for k, v in found.state.items() if "rel_pos" in k]
    assert len(relative) == 4
    assert not any(v.any() for v in relative)
    assert torch.equal(found.state["blocks.1.mlp.fc1.bias"], state["blocks.1.mlp.fc1.bias"])
    assert not any(key.startswith("neck") for key in found.state)
    assert any(key.startswith("neck") for key in found.notes["new_tensors"])


@pytest.mark.parametrize(
    ("content", "arch", "sentence"),
    [
        ("a_dinov2", "a_vit", "of another size than that of timm/a_vit, and patches"),
        ("a_vit", "a_clip", "tensors of timm/a_clip are missing, such as norm_pre"),
        ("a_vit", "a_convnext", "does not hold that network|timm cannot read it"),
    ],
)
def test_another_network_is_refused(content: str, arch: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        read_backbone(saved(tensors(content), tmp_path), arch=f"timm/{arch}")


def test_an_attention_bias_that_the_network_lacks_must_be_zero(tmp_path: Path) -> None:
    content = dinov3(tensors("a_dinov3"))
    content["blocks.1.attn.qkv.bias"] = torch.ones(96)
    with pytest.raises(InputError, match=r"blocks\.1\.attn\.qkv\.bias"):
        read_backbone(saved(content, tmp_path), arch="timm/a_dinov3")


def test_without_arch_shapes_say_which_or_all_candidates(tmp_path: Path) -> None:
    """timm's two ViT-Tiny have the same tensors; what a trainer of timm says decides."""
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    path = saved(state, tmp_path)
    with pytest.raises(InputError, match=r"timm/deit_tiny_\w+ or timm/vit_tiny_\w+: say which"):
        read_backbone(path)
    named = saved({"state_dict": state, "arch": "deit_tiny_patch16_224"}, tmp_path)
    assert read_backbone(named).arch == "timm/deit_tiny_patch16_224"
    atto = timm.create_model("convnext_atto").state_dict()
    assert read_backbone(saved(atto, tmp_path)).arch == "timm/convnext_atto"


def test_how_images_enter_is_that_of_the_tag_and_in_doubt_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's default ViT-Tiny is trained with mean 0.5; facebook's DeiT with ImageNet's."""
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    path = saved(state, tmp_path)
    found = read_backbone(path, arch="timm/deit_tiny_patch16_224.fb_in1k")
    assert found.convention.mean == (123.675, 116.28, 103.53)
    assert found.notes["input_from"] == ""
    assert read_backbone(path, arch="timm/vit_tiny_patch16_224").convention.mean == (127.5,) * 3
    usual = networks.usual_input
    convention, note = usual(BASE)
    assert convention.mean == (127.5,) * 3
    assert re.search(r"those of .*\bmae\b.* differ", note)
    content = {"model": state | {"mask_token": torch.ones(1, 1, 192)}}
    monkeypatch.setattr(networks, "usual_input", lambda arch, found: usual(BASE, found))
    with pytest.raises(InputError, match=r"differs between .*--arch timm/vit_base_patch16_224\."):
        read_backbone(saved(content, tmp_path), arch="timm/vit_tiny_patch16_224")


def test_a_users_own_file_takes_its_modules_weights(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4))\n"
    )
    name = f"{tmp_path}/mine.py:net"
    body = factory.create_model(name, 2).body
    content = {"model": {f"module.{k}": v for k, v in body.state_dict().items()}}  # type: ignore[union-attr]
    found = read_backbone(saved(content, tmp_path), arch=name)
    assert found.arch == name
    assert set(found.state) == {f"body.{k}" for k in body.state_dict() if "batches" not in k}  # type: ignore[union-attr]


def test_a_converted_file_says_its_network_and_is_read_back(tmp_path: Path) -> None:
    path = saved(mae(tensors("a_vit")), tmp_path)
    written = convert(path, tmp_path / "out.pth", arch="timm/a_vit").output
    content = load_converted(written)
    assert content["facts"]["arch"] == "timm/a_vit"
    again = read_backbone(written)
    assert (again.arch, again.source_format) == ("timm/a_vit", "converted")
    assert all(torch.equal(v, again.state[k]) for k, v in content["model"].items())
    with pytest.raises(InputError, match="which torchvision has not"):
        convert(path, tmp_path / "tv.pth", arch="timm/a_vit", to="torchvision")
    content["model"].pop("norm.weight")
    torch.save(content, written)
    with pytest.raises(InputError, match=r"not those of timm/a_vit, such as norm\.weight"):
        load_converted(written)
