"""The networks: torchvision's functions under torchvision's names, and the published shapes."""

import pytest
import torch
import torchvision
from torch import nn

from core.errors import InputError
from models.resnet import ARCHITECTURES, BLOCKS, create_model


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_torchvisions_network_with_our_weights_is_the_same_function(arch: str) -> None:
    ours = create_model(arch, 5).eval()
    theirs = getattr(torchvision.models, arch)(num_classes=5).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_initial_weights_have_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    ours = create_model("resnet18", 5).state_dict()
    theirs = torchvision.models.resnet18(num_classes=5).state_dict()
    for key in ("conv1.weight", "layer4.1.conv2.weight", "layer2.0.downsample.0.weight"):
        assert ours[key].std().item() == pytest.approx(theirs[key].std().item(), rel=0.05)


@pytest.mark.parametrize("arch", [a for a, s in ARCHITECTURES.items() if sum(s.layers) <= 16])
def test_head_of_features_is_the_whole_and_d_is_as_declared(arch: str) -> None:
    spec = ARCHITECTURES[arch]
    model = create_model(arch, 4).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.forward_features(images)
        pooled = model.forward_head(features, pre_logits=True)
        assert torch.equal(model.forward_head(features), model(images))
    assert pooled.shape == (2, spec.num_features) == (2, model.num_features)
    expected = 1 if spec.stem == "imagenet" else 32 // 2 ** (len(spec.layers) - 1)
    assert features.shape[-1] == expected


def test_the_published_sizes_of_the_cifar_networks() -> None:
    """D = 512 for resnext32_16x4d at 32×32; 5.9 M parameters for WRN-28-4 (arXiv 1605.07146)."""
    assert create_model("resnext32_16x4d", 100).num_features == 512
    parameters = sum(p.numel() for p in create_model("wrn_28_4", 10).parameters())
    assert parameters == pytest.approx(5.9e6, rel=0.02)


@pytest.mark.parametrize(("arch", "tensors"), [("resnet50", 265), ("resnet18", 100)])
def test_the_number_of_backbone_tensors(arch: str, tensors: int) -> None:
    keys = [k for k in create_model(arch, 1).state_dict() if not k.startswith("fc.")]
    assert sum("num_batches" not in key for key in keys) == tensors


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="'resnet50'"):
        create_model("resnet5O", 10)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "wrn_28_4"])
def test_zero_init_residual_makes_every_block_the_identity(arch: str) -> None:
    network = create_model(arch, 3)
    blocks = [m for m in network.modules() if isinstance(m, tuple(BLOCKS.values()))]
    block = next(b for b in reversed(blocks) if b.downsample is None)  # ends its stage
    channels = next(c for c in block.modules() if isinstance(c, nn.Conv2d)).in_channels
    x = torch.rand(2, channels, 4, 4)  # not negative, as what leaves a ReLU
    assert not torch.equal(block(x), x)
    network.zero_init_residual()
    assert torch.equal(block(x), x)
