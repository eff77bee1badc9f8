"""The backbone is found in a real network laid out the way each repository lays it out.

The network is a ResNet-18: how it is laid out does not depend on its depth.
"""

import argparse
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from convert import layouts, names, sources
from convert.find import Found, find

Content = dict[str, Any]


def resnet(seed: int) -> nn.Module:
    """A ResNet-18 each of whose tensors is one number of its own, repeated; it takes no memory."""
    with torch.device("meta"):
        network = torchvision.models.resnet18(num_classes=10)
    number = 1000 * seed
    for module in network.modules():
        tensors = {**module._parameters, **module._buffers}
        for name, value in tensors.items():
            if value is not None:
                number += 1
                filled = torch.full((), float(number)).expand(value.shape)
                if name in module._parameters:
                    module.register_parameter(name, nn.Parameter(filled))
                else:
                    module.register_buffer(name, filled)
    return network


class Holder(nn.Module):
    """A model that holds its parts under the given names."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def head() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 16), nn.ReLU(), nn.Linear(16, 8))


def state(model: nn.Module, **buffers: Tensor) -> dict[str, Tensor]:
    for name, value in buffers.items():
        model.register_buffer(name, value)
    return model.state_dict()


def parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def sequential(network: nn.Module) -> nn.Module:
    return nn.Sequential(*list(network.children())[:-1])


def as_detectron2_network() -> Any:
    from detectron2.modeling.backbone.resnet import BasicStem, ResNet

    with torch.device("meta"):
        return ResNet(BasicStem(norm="BN"), ResNet.make_default_stages(18, norm="BN"))


def as_detectron2(network: nn.Module) -> dict[str, Tensor]:
    """The tensors as detectron2's own backbone names them, by position in both networks."""
    target = as_detectron2_network()
    layers = {}
    for prefix, block in _pairs(network, target):
        layers.update({f"{prefix}.{key}": value for key, value in block.items()})
    assert set(layers) == set(target.state_dict())
    return layers


def _pairs(network: Any, target: Any) -> list[tuple[str, dict[str, Tensor]]]:
    """Pair each convolution of a detectron2 network with torchvision's by walking the modules."""
    pairs = []

    def layer(prefix: str, convolution: nn.Module, norm: nn.Module) -> None:
        values = {"weight": convolution.weight}
        values.update({f"norm.{key}": value for key, value in norm.state_dict().items()})
        pairs.append((prefix, values))

    layer("stem.conv1", network.conv1, network.bn1)
    stages = [network.layer1, network.layer2, network.layer3, network.layer4]
    for name, stage in zip(target.stage_names, stages, strict=True):
        for index, block in enumerate(stage):
            layer(f"{name}.{index}.conv1", block.conv1, block.bn1)
            layer(f"{name}.{index}.conv2", block.conv2, block.bn2)
            if block.downsample is not None:
                layer(f"{name}.{index}.shortcut", block.downsample[0], block.downsample[1])
    return pairs


def as_blobs(network: nn.Module) -> dict[str, Any]:
    """The blobs of Caffe2's pickles: numpy arrays, affine layers without statistics."""
    blobs = {}
    for key, value in as_detectron2(network).items():
        if "running" in key or "num_batches" in key:
            continue
        stem = key.startswith("stem")
        name = key.replace("stem.", "") if stem else key
        if "norm" in name:
            name = name.replace(".norm", "_bn")
            name = name.replace("weight", "s").replace("bias", "b")
            name = f"res_{name}" if stem else name
        else:
            name = name.replace("weight", "w")
        if not stem:
            for layer, branch in (("conv1", "2a"), ("conv2", "2b"), ("shortcut", "1")):
                name = name.replace(layer, f"branch{branch}")
        blobs[name.replace(".", "_")] = value.detach().numpy()
    return blobs


def moco(net: nn.Module, twin: nn.Module) -> Content:
    model = parallel(Holder(encoder_q=net, encoder_k=twin))
    tensors = state(model.module, queue=torch.randn(8, 4), queue_ptr=torch.zeros(1).long())
    tensors = {f"module.{key}": value for key, value in tensors.items()}
    settings = argparse.Namespace(lr=0.03)
    return {"epoch": 200, "arch": "resnet18", "state_dict": tensors, "optimizer": {}, "x": settings}


def mocov3(net: nn.Module, twin: nn.Module) -> Content:
    net.fc = twin.fc = head()
    model = parallel(Holder(base_encoder=net, momentum_encoder=twin, predictor=head()))
    return {"epoch": 1, "state_dict": model.state_dict(), "scaler": {}}


def densecl(net: nn.Module, twin: nn.Module) -> Content:
    query, key = nn.Sequential(net, head()), nn.Sequential(twin, head())
    model = Holder(encoder_q=query, encoder_k=key, backbone=net, head=head())
    return {"meta": {"epoch": 1}, "state_dict": state(model, queue=torch.randn(2, 2))}


def infomin(net: nn.Module, twin: nn.Module) -> Content:
    model = parallel(Holder(encoder=net, head=head(), head_jig=head()))
    ema = Holder(encoder=twin, head=head(), head_jig=head())
    memory = {"memory": torch.randn(4, 8), "index": torch.zeros(1)}
    return {"model": model.state_dict(), "model_ema": ema.state_dict(), "contrast": memory}


def supcon(net: nn.Module, twin: nn.Module) -> Content:
    model = Holder(encoder=parallel(net), head=head())
    return {"opt": argparse.Namespace(), "model": model.state_dict(), "optimizer": {}, "epoch": 1}


def dino(net: nn.Module, twin: nn.Module) -> Content:
    student = parallel(Holder(backbone=twin, head=head()))
    teacher = parallel(Holder(backbone=net, head=head()))
    loss = {"center": torch.zeros(1, 8)}
    return {"student": student.state_dict(), "teacher": teacher.state_dict(), "dino_loss": loss}


def byol(net: nn.Module, twin: nn.Module) -> Content:
    """The wrapper holds the network itself, and shares it with the online encoder."""
    online, target = Holder(net=net, projector=head()), Holder(net=twin, projector=head())
    model = Holder(net=net, online_encoder=online, target_encoder=target, online_predictor=head())
    return model.state_dict()


def byol_numbered(net: nn.Module, twin: nn.Module) -> Content:
    online, target = Holder(encoder=sequential(net)), Holder(encoder=sequential(twin))
    online.projetion, target.projetion = head(), head()  # so spelled in that repository
    parts = {"online_network": online, "target_network": target}
    return {f"{name}_state_dict": part.state_dict() for name, part in parts.items()}


def vissl(net: nn.Module, twin: nn.Module) -> Content:
    trunk = Holder(_feature_blocks=net).state_dict()
    model = {"trunk": trunk, "heads": head().state_dict()}
    return {"phase": 1, "classy_state_dict": {"base_model": {"model": model, "meta": {}}}}


def swav(net: nn.Module, twin: nn.Module) -> Content:
    net.projection_head, net.prototypes = head(), nn.Linear(8, 30, bias=False)
    return parallel(net).state_dict()


def sololearn(net: nn.Module, twin: nn.Module) -> Content:
    model = Holder(
        backbone=net, momentum_backbone=twin, projector=head(), momentum_projector=head(),
        predictor=head(), classifier=nn.Linear(512, 10),
    )  # fmt: skip
    tensors = state(model, queue=torch.randn(2, 4), queue_ptr=torch.zeros(1).long())
    return {"state_dict": tensors, "pytorch-lightning_version": "1.9", "callbacks": {}}


def lightly(net: nn.Module, twin: nn.Module) -> Content:
    model = Holder(
        backbone=sequential(net), projection_head=head(), prediction_head=head(),
        backbone_momentum=sequential(twin), projection_head_momentum=head(),
    )  # fmt: skip
    return {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.0"}


def lightly_dino(net: nn.Module, twin: nn.Module) -> Content:
    model = Holder(
        teacher_backbone=sequential(net), teacher_head=head(),
        student_backbone=sequential(twin), student_head=head(),
    )  # fmt: skip
    return model.state_dict()


def lightly_bare(net: nn.Module, twin: nn.Module) -> Content:
    return sequential(net).state_dict()


def mmpretrain(net: nn.Module, twin: nn.Module) -> Content:
    model = Holder(backbone=net, neck=head(), head=Holder(fc=nn.Linear(512, 10)))
    preprocess = nn.Module()
    preprocess.register_buffer("mean", torch.zeros(3, 1, 1))
    model.data_preprocessor = preprocess
    return {"meta": {"mmengine_version": "0.10"}, "state_dict": model.state_dict()}


def barlow(net: nn.Module, twin: nn.Module) -> Content:
    model = parallel(Holder(backbone=net, projector=head(), bn=nn.BatchNorm1d(8, affine=False)))
    return {"epoch": 1, "model": model.state_dict(), "optimizer": {}}


def simsiam(net: nn.Module, twin: nn.Module) -> Content:
    net.fc = head()
    return {"state_dict": parallel(Holder(encoder=net, predictor=head())).state_dict()}


def plain(prefix: str, container: str | None = None) -> Callable[[nn.Module, nn.Module], Content]:
    def build(net: nn.Module, twin: nn.Module) -> Content:
        model = Holder(**{prefix: net}, head=head()) if prefix else net
        return {container: model.state_dict(), "epoch": 1} if container else model.state_dict()

    return build


def lightning(net: nn.Module, twin: nn.Module) -> Content:
    return {"state_dict": Holder(model=net).state_dict(), "pytorch-lightning_version": "2.0"}


def timm_script(net: nn.Module, twin: nn.Module) -> Content:
    return {"arch": "resnet18", "version": 2, "state_dict": parallel(net).state_dict(), "epoch": 3}


def averaged(container: str) -> Callable[[nn.Module, nn.Module], Content]:
    def build(net: nn.Module, twin: nn.Module) -> Content:
        return {container: torch.optim.swa_utils.AveragedModel(net).state_dict(), "epoch": 1}

    return build


def compiled(net: nn.Module, twin: nn.Module) -> Content:
    return {"model": Holder(_orig_mod=net).state_dict()}


def compiled_part(net: nn.Module, twin: nn.Module) -> Content:
    return {"state_dict": parallel(Holder(encoder_q=Holder(_orig_mod=net))).state_dict()}


def own(net: nn.Module, twin: nn.Module) -> Content:
    content = {"format": sources.OWN_FORMAT, "version": 1, "facts": {}}
    return {**content, "model": net.state_dict()}


def converted(net: nn.Module, twin: nn.Module) -> Content:
    return {"model": as_detectron2(net), "__author__": sources.AUTHOR, "facts": {}}


def detectron2(net: nn.Module, twin: nn.Module) -> Content:
    return {"model": as_detectron2(net), "__author__": "MOCO", "matching_heuristics": True}


def detector(net: nn.Module, twin: nn.Module) -> Content:
    """A detector of the model zoo's older files, which hold the pixel statistics."""
    tensors = {f"backbone.bottom_up.{key}": value for key, value in as_detectron2(net).items()}
    parts = Holder(
        proposal_generator=head(), roi_heads=head(), backbone=Holder(fpn_lateral2=head())
    )
    tensors.update(state(parts, pixel_mean=torch.ones(3, 1, 1), pixel_std=torch.ones(3, 1, 1)))
    return {"model": tensors}


def bgr_detector(net: nn.Module, twin: nn.Module) -> Content:
    """The zoo's X-101 detectors: BGR like MSRA's, but with ImageNet's std."""
    content = detector(net, twin)
    mean, std = [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]
    statistics = {"pixel_mean": mean, "pixel_std": std}
    content["model"] |= {k: torch.tensor(v).view(3, 1, 1) for k, v in statistics.items()}
    return content


def c4_detector(net: nn.Module, twin: nn.Module) -> Content:
    """A C4 detector has the last stage in its RoI heads, with a norm behind it."""
    tensors = {}
    for key, value in as_detectron2(net).items():
        place = "roi_heads" if key.startswith("res5") else "backbone"
        tensors[f"{place}.{key}"] = value
    tensors.update(state(Holder(proposal_generator=head()), pixel_std=torch.full((3, 1, 1), 58.0)))
    extra = Holder(roi_heads=Holder(res5=Holder(norm=nn.BatchNorm2d(4)), box_predictor=head()))
    return {"model": {**tensors, **extra.state_dict()}}


def caffe2(net: nn.Module, twin: nn.Module) -> Content:
    blobs = as_blobs(net)
    return {
        **blobs,
        "fc1000_w": net.fc.weight.detach().numpy(),
        "conv1_w_momentum": blobs["conv1_w"],
    }


def pixpro(net: nn.Module, twin: nn.Module) -> Content:
    """Its projectors are convolutions with norms; github.com/zdaxie/PixPro."""

    def projector() -> nn.Module:
        return Holder(linear1=nn.Conv2d(8, 4, 1), bn1=nn.BatchNorm2d(4), linear2=nn.Conv2d(4, 4, 1))

    model = Holder(
        encoder=net, projector=projector(), encoder_k=twin, projector_k=projector(),
        value_transform=nn.Conv2d(4, 4, 1), projector_instance=projector(),
        projector_instance_k=projector(), predictor=projector(),
    )  # fmt: skip
    del net.fc, twin.fc
    return {"opt": argparse.Namespace(lr=1), "model": parallel(model).state_dict(), "epoch": 1}


def mmselfsup_moco(net: nn.Module, twin: nn.Module) -> Content:
    """mmselfsup 1.x: the key encoder is mmengine's averaged model of (backbone, neck)."""
    key = Holder(module=nn.Sequential(twin, head()))
    key.register_buffer("steps", torch.tensor(1))
    model = Holder(backbone=net, neck=head(), encoder_k=key)
    tensors = state(model, queue=torch.randn(2, 4), queue_ptr=torch.zeros(1).long())
    return {"meta": {"epoch": 1}, "state_dict": tensors, "message_hub": {"log_scalars": {}}}


def mmselfsup_byol(net: nn.Module, twin: nn.Module) -> Content:
    target = Holder(module=nn.Sequential(twin, head()))
    target.register_buffer("steps", torch.tensor(1))
    return {
        "state_dict": Holder(backbone=net, neck=head(), head=head(), target_net=target).state_dict()
    }


def mmdet(net: nn.Module, twin: nn.Module) -> Content:
    model = Holder(backbone=net, neck=head(), rpn_head=head(), roi_head=Holder(bbox_head=head()))
    return {"meta": {"CLASSES": ("a",)}, "state_dict": model.state_dict(), "optimizer": {}}


def torchvision_detector(net: nn.Module, twin: nn.Module) -> Content:
    """torchvision's own Mask R-CNN with the network's tensors; its norms have no counters."""
    with torch.device("meta"):
        detector = torchvision.models.detection.maskrcnn_resnet50_fpn(
            weights=None, weights_backbone=None
        )
    others = {k: torch.ones(1) for k in detector.state_dict() if ".body." not in k}
    del net.fc
    body = {f"backbone.body.{k}": v for k, v in net.state_dict().items() if "num_batches" not in k}
    return {"model": {**body, **others}, "epoch": 1, "args": argparse.Namespace()}


def fsdp(net: nn.Module, twin: nn.Module) -> Content:
    keys = {k: "_fsdp_wrapped_module." + k.replace(".0.", ".0._fsdp_wrapped_module.", 1)
            for k in net.state_dict()}  # fmt: skip
    return {"model": {keys[k]: v for k, v in net.state_dict().items()}}


def checkpointed(net: nn.Module, twin: nn.Module) -> Content:
    """torch's checkpoint_wrapper, around blocks: its hook strips the name, others keep it."""

    def renamed(key: str) -> str:
        return re.sub(r"(layer\d\.\d)\.", r"\1._checkpoint_wrapped_module.", key)

    return {"state_dict": {f"backbone.{renamed(k)}": v for k, v in net.state_dict().items()}}


def deepspeed(net: nn.Module, twin: nn.Module) -> Content:
    model = Holder(backbone=net, head=head())
    return {
        "module": model.state_dict(),
        "buffer_names": [],
        "optimizer": None,
        "ds_version": "0.1",
    }


def lightning_deepspeed(net: nn.Module, twin: nn.Module) -> Content:
    return {"state_dict": Holder(_forward_module=Holder(model=net)).state_dict()}


def fastai(net: nn.Module, twin: nn.Module) -> Content:
    """fastai's vision_learner: nn.Sequential(body, head), saved with the optimiser."""
    learner = nn.Sequential(nn.Sequential(*list(net.children())[:-2]), nn.Sequential(*head()))
    return {"model": learner.state_dict(), "opt": {"state": [], "hypers": []}}


def as_transformers(network: nn.Module) -> dict[str, Tensor]:
    """The tensors as Hugging Face's ResNetForImageClassification names them."""
    layers = {}
    for prefix, values in _pairs(network, as_detectron2_network()):
        if prefix == "stem.conv1":
            place = "embedder.embedder"
        else:
            stage, block, part = prefix.split(".")
            inner = part if part == "shortcut" else f"layer.{int(part[-1]) - 1}"
            place = f"encoder.stages.{int(stage[-1]) - 2}.layers.{block}.{inner}"
        layers[f"resnet.{place}.convolution.weight"] = values.pop("weight")
        for key, value in values.items():
            layers[f"resnet.{place}.normalization.{key.removeprefix('norm.')}"] = value
    return layers


def transformers(net: nn.Module, twin: nn.Module) -> Content:
    return {
        **as_transformers(net),
        **Holder(classifier=nn.Sequential(nn.Flatten(), head()[0])).state_dict(),
    }


def robustness(net: nn.Module, twin: nn.Module) -> Content:
    """The network twice, beside normalisers with ImageNet's statistics on 0…1."""
    normalizer = nn.Module()
    normalizer.register_buffer("new_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
    normalizer.register_buffer("new_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
    attacker = Holder(normalize=normalizer, model=net)
    model = Holder(model=net, normalizer=normalizer, attacker=attacker)
    return {"model": parallel(model).state_dict(), "epoch": 1}


def normalized(net: nn.Module, twin: nn.Module) -> Content:
    normalize = nn.Module()
    normalize.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
    normalize.register_buffer("std", torch.full((1, 3, 1, 1), 0.25))
    return Holder(normalize=normalize, backbone=net, fc=nn.Linear(8, 2)).state_dict()


# (what it is, how it is laid out, the backbone's place in it); a format on request by its name
LAYOUTS: dict[str, tuple[Callable[[nn.Module, nn.Module], Content], str]] = {
    "own": (own, "model"),
    "converted": (converted, "model"),
    "moco": (moco, "state_dict.encoder_q"),
    "moco-compiled": (compiled_part, "state_dict.encoder_q"),
    "moco-v3": (mocov3, "state_dict.base_encoder"),
    "densecl": (densecl, "state_dict.encoder_q.0"),
    "infomin": (infomin, "model.encoder"),
    "supcon": (supcon, "model.encoder"),
    "dino": (dino, "teacher.backbone"),
    "byol": (byol, "net"),
    "byol-numbered": (byol_numbered, "online_network_state_dict.encoder"),
    "vissl": (vissl, "classy_state_dict.base_model.model.trunk._feature_blocks"),
    "vissl-extracted": (plain("_feature_blocks", "model"), "model._feature_blocks"),
    "swav": (swav, ""),
    "solo-learn": (sololearn, "state_dict.backbone"),
    "lightly": (lightly, "state_dict.backbone"),
    "lightly-bare": (lightly_bare, ""),
    "lightly-dino": (lightly_dino, "teacher_backbone"),
    "mmpretrain": (mmpretrain, "state_dict.backbone"),
    "mmselfsup-moco": (mmselfsup_moco, "state_dict.backbone"),
    "mmselfsup-byol": (mmselfsup_byol, "state_dict.backbone"),
    "mmdet": (mmdet, "state_dict.backbone"),
    "torchvision-detector": (torchvision_detector, "model.backbone.body"),
    "barlow-twins": (barlow, "model.backbone"),
    "simsiam": (simsiam, "state_dict.encoder"),
    "pixpro": (pixpro, "model.encoder"),
    "encoder": (plain("encoder", "state_dict"), "state_dict.encoder"),
    "backbone": (plain("backbone"), "backbone"),
    "lightning": (lightning, "state_dict.model"),
    "timm": (timm_script, "state_dict"),
    "timm-ema": (averaged("state_dict_ema"), "state_dict_ema"),
    "torchvision": (plain(""), ""),
    "torchvision-script": (plain("", "state_dict"), "state_dict"),
    "torchvision-ema": (averaged("model_ema"), "model_ema"),
    "compiled": (compiled, "model"),
    "fsdp": (fsdp, "model"),
    "checkpoint-wrapper": (checkpointed, "state_dict.backbone"),
    "deepspeed": (deepspeed, "module.backbone"),
    "lightning-deepspeed": (lightning_deepspeed, "state_dict.model"),
    "fastai": (fastai, "model.0"),
    "transformers": (transformers, "resnet"),
    "robustness": (robustness, "model.model"),
    "normalized": (normalized, "backbone"),
    **{f"in {container}": (plain("", container), container)
       for container in ("net", "weights", "network", "encoder", "backbone")},
    **{f"below {prefix}": (plain(prefix, "model"), f"model.{prefix}")
       for prefix in ("resnet", "feature_extractor", "net", "trunk", "visual")},
    "torchvision-msra": (plain("backbone", "state_dict"), "state_dict.backbone"),
    "caffe2-msra": (caffe2, ""),
    "detectron2": (detectron2, "model"),
    "detectron2-c4": (c4_detector, "model.backbone"),
    "detectron2-msra": (detector, "model.backbone.bottom_up"),
    "detectron2-fair": (bgr_detector, "model.backbone.bottom_up"),
}  # fmt: skip
LAYOUT = pytest.mark.parametrize("name", LAYOUTS)


def format_of(name: str) -> str:
    """The format that a layout is expected to have; torchvision's where it is no format's name."""
    return name if name in sources.FORMATS else "detectron2" if "c4" in name else "torchvision"


def found_in(name: str, **options: Any) -> tuple[Content, Found]:
    """A layout's content and what is found in it; a format that nothing tells is insisted on."""
    content = LAYOUTS[name][0](resnet(1), resnet(2))
    if name == "torchvision-msra":
        options["format"] = name
    return content, find(content, **options)


def test_every_format_but_one_has_a_layout() -> None:
    """The others are a ResNeXt and any network of timm, with tests of their own."""
    others = {"caffe2-fair", "network"}
    assert set(sources.FORMATS) - {format_of(name) for name in LAYOUTS} == others


@LAYOUT
def test_the_backbone_is_found_and_has_the_networks_own_tensors(name: str) -> None:
    expected = {k: v for k, v in resnet(1).state_dict().items() if not k.startswith("fc.")}
    _, found = found_in(name)
    assert (found.format, found.place, found.arch) == (
        format_of(name),
        LAYOUTS[name][1],
        "resnet18",
    )
    wanted = [key for key in expected if "num_batches" not in key]
    if name == "caffe2-msra":
        wanted = [key for key in wanted if "running" not in key]
    assert set(found.tensors) == set(wanted)
    for key in wanted:
        assert torch.equal(torch.as_tensor(found.tensors[key]), expected[key]), key
    assert found.counters == (0 if name in ("caffe2-msra", "torchvision-detector") else 20)


def state_dict_of(content: Content, place: str) -> Content:
    """The innermost dict on the way to a place: the state dict."""
    for key in place.split("."):
        content = content[key] if isinstance(content.get(key), dict) else content
    return content


@LAYOUT
def test_an_unknown_neighbour_is_refused_until_it_is_named(name: str) -> None:
    content, found = found_in(name)
    state = state_dict_of(content, found.place)
    assert len(found.tensors) + len(found.dropped) + found.counters == len(state)
    inside = next(
        k
        for k in state
        if k.endswith(("conv1.weight", "0.weight", "conv1_w", "convolution.weight"))
    )
    format = name if name == "torchvision-msra" else None
    for neighbour in ("surprise.weight", f"{inside.removesuffix('weight')}surprise"):
        state[neighbour] = torch.ones(3)
        with pytest.raises(ValueError, match=r"1 entries are neither.*surprise.*--drop"):
            find(content, format=format)
        again = find(content, format=format, drop=["*surprise*"])
        assert any("surprise" in key for key in again.dropped)
        del state[neighbour]


def test_a_grouped_caffe2_network_is_fairs() -> None:
    """Only 32 groups of 8 are known to be: shapes of X-101-32x8d against those of 64 × 4."""

    def blobs(arch: str) -> Content:
        spelled = {hub: name for name, hub in names.TO_TORCHVISION["caffe2"].items()}
        shapes = layouts.layout_of(arch).shapes()
        return {spelled[k]: np.broadcast_to(np.float32(1), s) for k, s in shapes.items()}

    assert find(blobs("resnext101_32x8d")).format == "caffe2-fair"
    assert find(blobs("wide_resnet50_2")).format == "caffe2-msra"
    with pytest.raises(ValueError, match="caffe2-msra or caffe2-fair"):
        find(blobs("resnext101_64x4d"))


# ---- several backbones -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        lambda a, b: {"state_dict": a, "state_dict_ema": b, "version": 2},
        lambda a, b: {"model": a, "model_ema": b},
        lambda a, b: {"model": a, "teacher": b},
        lambda a, b: {"model": a, "state_dict": b},
        lambda a, b: {"state_dict": a, "ema_state_dict": b, "message_hub": {}},
        lambda a, b: {f"{side}.{k}": v for side, net in (("left", a), ("right", b))
                      for k, v in net.items()},
    ],
)  # fmt: skip
def test_two_different_backbones_need_a_choice(content: Callable[[Any, Any], Content]) -> None:
    a, b = resnet(1).state_dict(), resnet(2).state_dict()
    with pytest.raises(
        ValueError, match=r"2 different backbones: .*--prefix \(\w+ \| \w+\)"
    ) as caught:
        find(content(a, b))
    choices = str(caught.value).partition("(")[2].rstrip(")").split(" | ")
    for choice, expected in zip(choices, (a, b), strict=True):
        found = find(content(a, b), prefix=choice)
        assert found.place == choice
        assert torch.equal(found.tensors["conv1.weight"], expected["conv1.weight"])
    assert find(content(a, dict(a))).tensors  # the same tensors twice are no choice


@pytest.mark.parametrize(
    ("layout", "prefix"),
    [("infomin", "model_ema"), ("infomin", "model_ema.encoder"), ("dino", "student"),
     ("moco", "encoder_k"), ("moco", "module.encoder_k."),
     ("mmselfsup-moco", "state_dict.encoder_k.0"),
     ("pixpro", "model.encoder_k"), ("byol", "target_encoder"), ("lightly", "backbone_momentum")],
)  # fmt: skip
def test_the_prefix_overrules_the_preference(layout: str, prefix: str) -> None:
    """The other network's tensors are taken, and the preferred one's are dropped."""
    content, found = found_in(layout, prefix=prefix)
    expected = resnet(2).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in found.tensors.items())
    assert len(found.tensors) == 100
    total = len(state_dict_of(content, found.place))
    assert len(found.tensors) + len(found.dropped) + found.counters == total


def test_a_prefix_that_names_no_backbone_is_refused_with_the_places() -> None:
    with pytest.raises(
        ValueError, match=r"--prefix head: state_dict\.encoder_q \| state_dict\.enc"
    ):
        found_in("moco", prefix="head")


def test_a_part_of_a_prefix_that_fits_two_still_needs_a_choice() -> None:
    a, b = resnet(1).state_dict(), resnet(2).state_dict()
    content = {
        "left": {f"net.{k}": v for k, v in a.items()},
        "right": {f"net.{k}": v for k, v in b.items()},
    }
    with pytest.raises(ValueError, match=r"left\.net \| right\.net"):
        find(content, prefix="net")


@pytest.mark.parametrize(
    ("name", "key", "other"),
    [("dino", "module.backbone.bn1.bias", "student.backbone"),
     ("lightly-dino", "teacher_backbone.4.0.bn1.bias", "student_backbone"),
     ("infomin", "module.encoder.bn1.bias", "model_ema.encoder")],
)  # fmt: skip
def test_a_broken_backbone_does_not_give_way_to_its_twin(name: str, key: str, other: str) -> None:
    """The teacher lacks a tensor: neither is the student taken, nor the teacher left out."""
    content = LAYOUTS[name][0](resnet(1), resnet(2))
    state = state_dict_of(content, LAYOUTS[name][1])
    del state[key]
    with pytest.raises(
        ValueError, match=f"1 of the 100 .*missing.*complete backbones: {other}; .*--prefix"
    ):
        find(content)
    if state is content:  # it lies in the same state dict, and is no head
        with pytest.raises(ValueError, match=r"neither of the backbone \(student_backbone\)"):
            find(content, prefix=other)
        assert find(content, prefix=other, drop=["teacher_backbone"]).place == other
    else:
        assert find(content, prefix=other).place == other


@pytest.mark.parametrize(
    "heads",
    ["aux_classifier.4.weight", "classifier.0.convs.0.0.weight", "decode_head.conv_seg.weight",
     "transformer.encoder.layers.0.norm1.weight"],
)  # fmt: skip
def test_networks_whose_resnet_is_dilated_are_not_taken_silently(heads: str) -> None:
    """DeepLab's, mmsegmentation's and DETR-DC5's ResNets have the same names and other strides."""
    content = Holder(backbone=resnet(1)).state_dict() | {heads: torch.ones(2, 2, 1, 1)}
    with pytest.raises(ValueError, match=f"{heads}.*--drop"):
        find(content)
    assert find(content, drop=[heads.partition(".")[0]]).place == "backbone"


# ---- input conventions -----------------------------------------------------------------------


def test_detectron2_names_alone_do_not_tell_the_convention() -> None:
    content = {"model": as_detectron2(resnet(1))}
    with pytest.raises(ValueError, match="detectron2 or detectron2-msra"):
        find(content)
    assert find(content, format="detectron2").format == "detectron2"
    assert find(content, format="detectron2-msra").format == "detectron2-msra"


@pytest.mark.parametrize(
    ("mean", "std", "convention"),
    [
        ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], sources.TORCHVISION),
        ([103.53, 116.28, 123.675], [57.375, 57.12, 58.395], sources.FAIR),
        ([103.53, 116.28, 123.675], [1.0, 1.0, 1.0], sources.MSRA),
        ([123.675, 116.28, 103.53], [1.0, 1.0, 1.0], None),
        ([127.5, 127.5, 127.5], [58.395, 57.12, 57.375], None),
    ],
)
def test_a_detectors_pixel_statistics_tell_its_convention(
    mean: list[float], std: list[float], convention: Any
) -> None:
    content = detector(resnet(1), resnet(2))
    content["model"] |= {"pixel_mean": torch.tensor(mean).view(3, 1, 1)}
    content["model"] |= {"pixel_std": torch.tensor(std).view(3, 1, 1)}
    if convention is None:  # none of ours
        with pytest.raises(ValueError, match="no known format"):
            find(content)
        return
    assert sources.FORMATS[find(content).format].convention == convention
    assert (list(convention.pixel_mean), list(convention.pixel_std)) == (mean, std)


def test_a_key_with_and_without_its_wrapper_is_refused() -> None:
    tensors = resnet(1).state_dict()
    tensors["module.conv1.weight"] = torch.zeros(64, 3, 7, 7)
    with pytest.raises(ValueError, match="twice, but for the names of wrappers"):
        find(tensors)


# ---- what is refused -------------------------------------------------------------------------


def deep_stem() -> nn.Module:
    network = resnet(1)
    layers = [nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3)]
    network.conv1 = nn.Sequential(*layers)
    return network


def clips_stem() -> nn.Module:
    """CLIP's ResNets have the three convolutions beside each other."""
    network = resnet(1)
    network.conv1, network.conv2 = nn.Conv2d(3, 32, 3, 2), nn.Conv2d(32, 64, 3)
    return network


def pooled_shortcut() -> nn.Module:
    network = resnet(1)
    first = network.layer2[0]
    first.downsample = nn.Sequential(nn.AvgPool2d(2), *first.downsample)
    return network


def attention() -> nn.Module:
    network = resnet(1)
    network.layer1[0].se = Holder(fc1=nn.Conv2d(64, 4, 1))
    return network


def small_generator() -> nn.Module:
    """A ResNet without ReLU and max-pool as modules, cut up: stages are 2 to 5, not 4 to 7."""
    network = resnet(1)
    stages = [network.layer1, network.layer2, network.layer3, network.layer4]
    return Holder(backbone=nn.Sequential(network.conv1, network.bn1, *stages))


def biased() -> nn.Module:
    network = resnet(1)
    network.layer1[0].conv1 = nn.Conv2d(64, 64, 3, padding=1, bias=True)
    return network


def stem_biased() -> nn.Module:
    network = resnet(1)
    network.conv1 = nn.Conv2d(3, 64, 7, bias=True)
    return network


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (deep_stem, "deep stem"),
        (clips_stem, "deep stem"),
        (pooled_shortcut, "average-pooled shortcut"),
        (attention, "attention"),
        (small_generator, "ResNetGenerator"),
        (biased, "convolutions with a bias"),
        (stem_biased, "convolutions with a bias"),
        (lambda: torchvision.models.vit_b_32(), "is a vision transformer"),
        (lambda: torchvision.models.swin_t(), "is a Swin transformer"),
        (lambda: torchvision.models.densenet121(), "is a DenseNet"),
        (lambda: torchvision.models.vgg11(), "holds no ResNet: its keys are model"),
        (lambda: timm.create_model("convnext_atto"), "is a ConvNeXt"),
        (lambda: timm.create_model("hrnet_w18_small"), "is an HRNet"),
        (lambda: timm.create_model("resnet50d"), "deep stem"),
        (lambda: timm.create_model("seresnet50"), "attention"),
    ],
)
def test_what_detectron2_cannot_hold_is_refused_with_the_reason(
    network: Callable[[], nn.Module], reason: str
) -> None:
    with torch.device("meta"):
        tensors = network().state_dict()
    with pytest.raises(ValueError, match=reason):
        find({"model": {f"backbone.{key}": value for key, value in tensors.items()}})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "a list, not a dict"),
        ({}, "none at all"),
        ({"epoch": 3, "state_dict": {}}, "epoch, state_dict"),
        (
            {"best": {"net": {"student.layer1.0.conv1.weight": 0}}},
            r"best\.net\.student: layer1\.0\.conv1",
        ),
        ({"a": {"layer1.0.conv1.weight": torch.ones(1), "_flat_param": 1}}, "shard of FSDP"),
    ],
)
def test_what_is_no_checkpoint_is_refused(content: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        find(content)


def test_an_insisted_format_must_fit_and_exist() -> None:
    for format in ("caffe2-msra", "detectron2", "own", "converted"):
        with pytest.raises(ValueError, match=f"not of the format {format}"):
            find(resnet(1).state_dict(), format=format)
    with pytest.raises(ValueError, match=r"'caffe3' is unknown.*caffe2-msra"):
        find(resnet(1).state_dict(), format="caffe3")


ARCHS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
         "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"]  # fmt: skip


def shapes_of(arch: str, **options: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = getattr(torchvision.models, arch)(**options)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    return {key: shape for key, shape in shapes.items() if not key.startswith("fc.")}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_layout_is_inferred_and_lists_exactly_torchvisions_tensors(arch: str) -> None:
    shapes = shapes_of(arch)
    layout = layouts.infer(shapes)
    assert layout.arch == arch
    assert layout == layouts.layout_of(arch)
    kept = {key: shape for key, shape in shapes.items() if "num_batches" not in key}
    assert layout.shapes() == kept
    assert arch != "resnet50" or len(kept) == 265


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet99", "wrn_28_4", "resnext32_16x4d",
                                  "resnext18_32x4d", "wide_resnet18_2", "vgg16"])  # fmt: skip
def test_a_name_outside_the_family_has_no_layout(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        layouts.layout_of(name)


def without(arch: str, *starts: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in shapes_of(arch).items() if not key.startswith(starts)}


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (lambda: without("resnet50", "conv1"), "the stem, is missing"),
        (lambda: without("resnet50", "layer4"), "3, 4, 6 bottleneck blocks"),
        (lambda: without("resnet50", "layer3.5"), "3, 4, 5, 3 bottleneck blocks"),
        (lambda: without("resnet50", "layer3.5.conv2"), r"1 of the 265 .* layer3\.5\.conv2"),
        (lambda: shapes_of("resnet50", norm_layer=lambda c: nn.GroupNorm(1, c)), "GroupNorm"),
        (lambda: {**shapes_of("resnet18"), "layer1.0.bn3.bias": (64,)}, "has no place"),
        (lambda: {**shapes_of("resnet50"), "layer4.0.bn3.bias": (9,)}, "shape 9, but a resnet50"),
        (lambda: {**shapes_of("resnet50"), "conv1.weight": (64, 3, 3, 3)}, "CIFAR"),
        (lambda: {**shapes_of("resnet50"), "conv1.weight": (128, 3, 7, 7)}, "2× width"),
        (lambda: {**shapes_of("resnet50"), "conv1.weight": (64, 6, 7, 7)}, "64×6×7×7"),
    ],
)
def test_incomplete_misshapen_and_other_networks_are_refused(
    shapes: Callable[[], dict[str, tuple[int, ...]]], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        layouts.infer(shapes())
