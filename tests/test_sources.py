"""Every format in the table is recognised from a real network laid out the way its authors do.

The network is a ResNet-18: how a format lays one out does not depend on its depth. Its shapes do
not matter for recognition and have tests of their own at the end.
"""

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from convert import layouts, sources
from convert.recognise import recognise

Content = dict[str, Any]


def resnet(seed: int) -> nn.Module:
    """A ResNet-18 with every tensor shrunk to one number of its own, which tells it apart."""
    with torch.device("meta"):
        network = torchvision.models.resnet18(num_classes=10)
    number = 1000 * seed
    for module in network.modules():
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                number += 1
                module.register_parameter(name, nn.Parameter(torch.full((1,), float(number))))
        for name in list(module._buffers):
            number += 1
            module.register_buffer(name, torch.full((1,), float(number)))
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


def as_detectron2(network: nn.Module) -> dict[str, Tensor]:
    """The tensors as detectron2's own backbone names them, by position in both networks."""
    from detectron2.modeling.backbone.resnet import BasicStem, ResNet

    with torch.device("meta"):
        target = ResNet(BasicStem(norm="BN"), ResNet.make_default_stages(18, norm="BN"))
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


def infomin_ema(net: nn.Module, twin: nn.Module) -> Content:
    return infomin(twin, net)


def supcon(net: nn.Module, twin: nn.Module) -> Content:
    model = Holder(encoder=parallel(net), head=head())
    return {"opt": argparse.Namespace(), "model": model.state_dict(), "optimizer": {}, "epoch": 1}


def dino(net: nn.Module, twin: nn.Module) -> Content:
    student = parallel(Holder(backbone=twin, head=head()))
    teacher = parallel(Holder(backbone=net, head=head()))
    loss = {"center": torch.zeros(1, 8)}
    return {"student": student.state_dict(), "teacher": teacher.state_dict(), "dino_loss": loss}


def dino_student(net: nn.Module, twin: nn.Module) -> Content:
    return dino(twin, net)


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


def timm(net: nn.Module, twin: nn.Module) -> Content:
    return {"arch": "resnet18", "version": 2, "state_dict": parallel(net).state_dict(), "epoch": 3}


def averaged(container: str) -> Callable[[nn.Module, nn.Module], Content]:
    def build(net: nn.Module, twin: nn.Module) -> Content:
        return {container: torch.optim.swa_utils.AveragedModel(net).state_dict(), "epoch": 1}

    return build


def compiled(net: nn.Module, twin: nn.Module) -> Content:
    return {"model": torch.compile(net).state_dict()}


def compiled_part(net: nn.Module, twin: nn.Module) -> Content:
    return {"state_dict": parallel(Holder(encoder_q=torch.compile(net))).state_dict()}


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


LAYOUTS: list[tuple[str, Callable[[nn.Module, nn.Module], Content]]] = [
    ("own", own),
    ("converted", converted),
    ("moco", moco),
    ("moco", compiled_part),
    ("moco-v3", mocov3),
    ("densecl", densecl),
    ("infomin", infomin),
    ("infomin-ema", infomin_ema),
    ("supcon", supcon),
    ("dino", dino),
    ("dino-student", dino_student),
    ("byol", byol),
    ("byol", byol_numbered),
    ("vissl", vissl),
    ("vissl", plain("_feature_blocks", "model_state_dict")),
    ("swav", swav),
    ("solo-learn", sololearn),
    ("lightly", lightly),
    ("lightly", lightly_bare),
    ("lightly-dino", lightly_dino),
    ("mmpretrain", mmpretrain),
    ("barlow-twins", barlow),
    ("simsiam", simsiam),
    ("encoder", plain("encoder", "state_dict")),
    ("backbone", plain("backbone")),
    ("lightning", lightning),
    ("timm", timm),
    ("timm-ema", averaged("state_dict_ema")),
    ("torchvision", plain("")),
    ("torchvision", plain("", "state_dict")),
    ("torchvision", compiled),
    ("torchvision-ema", averaged("model_ema")),
    ("torchvision-msra", plain("backbone", "state_dict")),
    ("caffe2-msra", caffe2),
    ("detectron2", detectron2),
    ("detectron2", c4_detector),
    ("detectron2-msra", detector),
    ("detectron2-fair", bgr_detector),
]
ON_REQUEST = {source.name for source in sources.SOURCES if source.on_request}
UNTESTED_HERE = {"caffe2-fair"}  # a ResNeXt: its own test below


def test_every_format_has_a_layout() -> None:
    assert {name for name, _ in LAYOUTS} | UNTESTED_HERE == set(sources.BY_NAME)


@pytest.mark.parametrize(("name", "build"), LAYOUTS, ids=lambda v: getattr(v, "__name__", v))
def test_the_layout_is_recognised_and_gives_the_networks_own_tensors(
    name: str, build: Callable[[nn.Module, nn.Module], Content]
) -> None:
    net, twin = resnet(1), resnet(2)
    expected = {key: value.clone() for key, value in net.state_dict().items()}
    content = build(net, twin)
    found = recognise(content, name if name in ON_REQUEST else None)
    assert found.source.name == name
    wanted = [k for k in expected if not k.startswith("fc.") and "num_batches" not in k]
    if name == "caffe2-msra":
        wanted = [key for key in wanted if "running" not in key]
    assert set(found.tensors) == set(wanted)
    for key in wanted:
        assert torch.equal(torch.as_tensor(found.tensors[key]), expected[key]), key
    assert found.counters == (0 if name == "caffe2-msra" else 20)
    total = len(_dig(content, found.container))
    assert len(found.tensors) + len(found.dropped) + found.counters == total


@pytest.mark.parametrize(("name", "build"), LAYOUTS, ids=lambda v: getattr(v, "__name__", v))
def test_an_unknown_neighbour_is_refused_until_it_is_named(
    name: str, build: Callable[[nn.Module, nn.Module], Content]
) -> None:
    content = build(resnet(1), resnet(2))
    found = recognise(content, name)
    inner = _dig(content, found.container)
    inner[f"{found.prefix}surprise.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"surprise\.weight.*--drop"):
        recognise(content, name)
    again = recognise(content, name, drop=["surprise"])
    assert any(key.endswith("surprise.weight") for key in again.dropped)


def _dig(content: Content, path: tuple[str, ...]) -> Content:
    for key in path:
        content = content[key]
    return content


def test_a_grouped_caffe2_network_is_fairs() -> None:
    wide = {"res2_0_branch2b_w": torch.empty(256, 8, 3, 3), "res2_0_branch2c_w": torch.empty(1)}
    blobs = {**as_blobs(resnet(1)), **wide}
    assert recognise(blobs).source.convention == sources.FAIR
    other = {**blobs, "res2_0_branch2b_w": torch.empty(256, 4, 3, 3)}
    with pytest.raises(ValueError, match="caffe2-msra or caffe2-fair"):
        recognise(other)


@pytest.mark.parametrize(
    ("content", "choices"),
    [
        (lambda a, b: {"state_dict": a, "state_dict_ema": b, "version": 2}, ["timm", "timm-ema"]),
        (lambda a, b: {"model": a, "model_ema": b}, ["torchvision", "torchvision-ema"]),
        (lambda a, b: {"model": a, "teacher": b}, ["dino", "torchvision"]),
    ],
)
def test_two_different_backbones_need_a_choice(
    content: Callable[[Any, Any], Content], choices: list[str]
) -> None:
    a, b = resnet(1).state_dict(), resnet(2).state_dict()
    with pytest.raises(ValueError, match=f"{choices[0]} or {choices[1]}.*--format"):
        recognise(content(a, b))
    taken = [recognise(content(a, b), name).tensors["conv1.weight"] for name in choices]
    assert not torch.equal(taken[0], taken[1])
    assert recognise(content(a, a)).tensors  # the same tensors twice are no choice


def test_detectron2_names_alone_do_not_tell_the_convention() -> None:
    content = {"model": as_detectron2(resnet(1))}
    with pytest.raises(ValueError, match="detectron2 or detectron2-msra"):
        recognise(content)
    assert recognise(content, "detectron2").source.convention == sources.TORCHVISION
    assert recognise(content, "detectron2-msra").source.convention == sources.MSRA


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
            recognise(content)
        return
    found = recognise(content)
    assert found.source.convention == convention
    assert (list(convention.pixel_mean), list(convention.pixel_std)) == (mean, std)


def test_one_format_that_fits_two_places_is_refused() -> None:
    content = {"model": resnet(1).state_dict(), "state_dict": resnet(2).state_dict()}
    with pytest.raises(ValueError, match="several different backbones"):
        recognise(content, "torchvision")


def test_a_key_with_and_without_its_wrapper_is_refused() -> None:
    tensors = resnet(1).state_dict()
    tensors["module.conv1.weight"] = torch.zeros(64, 3, 7, 7)
    with pytest.raises(ValueError, match="same tensor but for a wrapper"):
        recognise(tensors)


def deep_stem() -> nn.Module:
    network = resnet(1)
    layers = [nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3)]
    network.conv1 = nn.Sequential(*layers)
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


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (deep_stem, "deep stem"),
        (pooled_shortcut, "average-pooled shortcut"),
        (attention, "attention"),
        (small_generator, "ResNetGenerator"),
        (biased, "convolutions with a bias"),
        (lambda: torchvision.models.vit_b_32(), "vision transformer"),
        (lambda: torchvision.models.vgg11(), "no known format fits"),
    ],
)
def test_what_detectron2_cannot_hold_is_refused_with_the_reason(
    network: Callable[[], nn.Module], reason: str
) -> None:
    with torch.device("meta"):
        tensors = network().state_dict()
    with pytest.raises(ValueError, match=reason):
        recognise(tensors)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "a list, not a dict"),
        ({}, "none at all"),
        ({"epoch": 3, "state_dict": {}}, "epoch, state_dict"),
        ({"best": {"net": {"student": {"layer1.0.conv1.weight": 0}}}}, r"best\.net\.student\."),
    ],
)
def test_what_is_no_checkpoint_is_refused(content: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        recognise(content)


def test_an_insisted_format_must_fit_and_exist() -> None:
    with pytest.raises(ValueError, match="not of the format moco"):
        recognise(resnet(1).state_dict(), "moco")
    with pytest.raises(ValueError, match=r"'mocov9' is unknown.*moco-v3"):
        recognise(resnet(1).state_dict(), "mocov9")


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
