"""The rename is a bijection, agrees with real networks on both sides, and refuses all else."""

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from convert import names

NETWORKS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"]


def torchvision_keys(arch: str) -> list[str]:
    with torch.device("meta"):
        network = getattr(torchvision.models, arch)()
    return [key for key in network.state_dict() if not key.startswith("fc.")]


def test_there_and_back_is_the_identity() -> None:
    """For every name that there is: four stages of up to 36 blocks, and the stem."""
    table = names.TO_TORCHVISION["torchvision"]
    assert len(table) == 6 + 4 * 36 * 4 * 6
    there = {name: names.to_detectron2(name) for name in table}
    assert len(set(there.values())) == len(there)
    assert all(names.to_torchvision(name) == hub for hub, name in there.items())
    assert set(there.values()) == set(names.TO_TORCHVISION["detectron2"])


@given(st.text(alphabet="layerconvbstmdw.01234_", max_size=30))
def test_a_name_is_renamed_reversibly_or_refused(name: str) -> None:
    for there, back in [
        (names.to_detectron2, names.to_torchvision),
        (names.to_torchvision, names.to_detectron2),
    ]:
        try:
            renamed = there(name)
        except ValueError:
            continue
        assert back(renamed) == name


@pytest.mark.parametrize("arch", NETWORKS)
def test_the_image_of_a_torchvision_network_is_a_detectron2_network(arch: str) -> None:
    """Both key sets come from the libraries' own constructors."""
    from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet

    depth = int("".join(c for c in arch.split("_")[0] if c.isdigit()))
    with torch.device("meta"):
        kind = None if depth < 50 else BottleneckBlock
        stages = ResNet.make_default_stages(depth, kind, norm="BN")
        theirs = set(ResNet(BasicStem(norm="BN"), stages).state_dict())
    renamed = [names.to_detectron2(key) for key in torchvision_keys(arch)]
    assert len(set(renamed)) == len(renamed)
    assert set(renamed) == theirs


@pytest.mark.parametrize(
    "name",
    ["fc.weight", "layer5.0.conv1.weight", "layer1.0.conv4.weight", "conv2.weight", "bn2.bias",
     "layer1.00.conv1.weight", "layer3.36.conv1.weight",
     "layer1.\u0661.conv1.weight", "layer1.0.conv1.bias", "conv1.weight ",
     "xconv1.weight",
     "layer1.0.downsample.1.running", "conv1.0.weight", "layer1.0.se.fc1.weight", ""],
)  # fmt: skip
def test_what_is_no_backbone_tensor_is_refused_there(name: str) -> None:
    with pytest.raises(ValueError):
        names.to_detectron2(name)


@pytest.mark.parametrize(
    "name",
    ["stem.fc.weight", "res1.0.conv1.weight", "res2.0.conv1.norm", "stem.conv2.weight",
     "stem.shortcut.weight", "linear.weight", "backbone.res2.0.conv1.weight"],
)  # fmt: skip
def test_what_is_no_backbone_tensor_is_refused_back(name: str) -> None:
    with pytest.raises(ValueError):
        names.to_torchvision(name)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_detectron2_reads_a_blob_as_we_do(arch: str) -> None:
    """Blobs are spelled from a real network's keys; the reference is detectron2's legacy rename."""
    from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names

    blobs = {}
    for key in torchvision_keys(arch):
        if "num_batches" not in key:
            blobs[spell_blob(names.to_detectron2(key))] = key
    theirs = convert_basic_c2_names(list(blobs))
    for (blob, key), detectron2_name in zip(blobs.items(), theirs, strict=True):
        assert names.to_torchvision(blob, "caffe2") == key
        assert names.to_detectron2(names.to_torchvision(blob, "caffe2")) == detectron2_name


def spell_blob(name: str) -> str:
    """Write a detectron2 name the way Caffe2 does: res2.0.conv1.norm.bias, res2_0_branch2a_bn_b."""
    name = name.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.conv1", "conv1")
    for layer, branch in [("shortcut", "1"), ("conv1", "2a"), ("conv2", "2b"), ("conv3", "2c")]:
        if name.startswith("res") and not name.startswith("res_"):
            name = name.replace(layer, f"branch{branch}").replace(".norm.", "_bn_")
    name = name.replace("running_mean", "rm").replace("running_var", "riv")
    norm = "_bn_" in name or "_bn." in name
    name = name.replace("weight", "s" if norm else "w").replace("bias", "b")
    return name.replace(".", "_")


@pytest.mark.parametrize(
    "blob",
    ["conv1_b", "fc1000_w", "pred_b", "res2_0_branch2d_w", "res2_0_branch2a_bn_x", "lr",
     "res2_0_branch1_w_momentum"],
)  # fmt: skip
def test_other_blobs_are_refused(blob: str) -> None:
    with pytest.raises(ValueError):
        names.to_torchvision(blob, "caffe2")


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_sequential_of_the_children_keeps_its_tensors(arch: str) -> None:
    network = getattr(torchvision.models, arch)()
    whole = network.state_dict()
    cut = torch.nn.Sequential(*list(network.children())[:-1]).state_dict()
    renamed = {names.to_torchvision(key, "numbered"): value for key, value in cut.items()}
    assert set(renamed) == {key for key in whole if not key.startswith("fc.")}
    assert all(value.data_ptr() == whole[key].data_ptr() for key, value in renamed.items())


@pytest.mark.parametrize("name", ["2.weight", "8.weight", "4.weight", "0.bias", "9.0.conv1.weight"])
def test_other_numbers_are_refused(name: str) -> None:
    with pytest.raises(ValueError):
        names.to_torchvision(name, "numbered")
