"""Networks by name: timm's and a user's answer to the same calls as our own."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from core.errors import InputError
from models import checkpoint, factory, resnet
from models.base import head_prefixes, stride_of, sync_batch_norm
from models.checkpoint import Facts, load_checkpoint, save_checkpoint
from models.features import weights_signature

SMALL = ("test_convnext", "test_vit", "test_resnet", "test_efficientnet", "mobilenetv3_small_050")
NETWORKS = {
    "maps": """
class Net(nn.Module):
    image_size, mean = 64, (0.1, 0.2, 0.3)
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 6, 2, 2)
    def forward(self, x):
        x = self.a(x)
        return {"fine": x, "coarse": self.b(x)}
def net():
    return Net()
""",
    "map": "def net():\n    return nn.Conv2d(3, 5, 16, 16)\n",
    "vector": "def net():\n    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())\n",
}


def user(folder: Path, body: str, name: str = "net") -> str:
    """Write a user's file and return the name of its network."""
    path = folder / "mine.py"
    path.write_text(f"from torch import nn\n{body}")
    return f"{path}:{name}"


def seeded(create: Any) -> Any:
    torch.manual_seed(3)
    return create()


@pytest.mark.parametrize("short", SMALL)
def test_a_timm_network_is_timms_own_under_timms_names(short: str) -> None:
    ours = seeded(lambda: factory.create_model(f"timm/{short}", 5)).eval()
    theirs = seeded(lambda: timm.create_model(short, num_classes=5)).eval()
    x = torch.randn(2, 3, 160, 160)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))
        pooled = ours.forward_head(ours.forward_features(x), pre_logits=True)
        logits = ours.get_classifier()(pooled)
    assert pooled.shape == (2, ours.head_hidden_size)
    assert torch.equal(logits, theirs(x))


@pytest.mark.parametrize(
    ("short", "channels_last"),
    [("test_convnext", False), ("swin_s3_tiny_224", True), ("test_efficientnet", False)],
)
def test_maps_equal_those_of_timms_features_only(short: str, channels_last: bool) -> None:
    """An independent way through timm, whose Swin gives N×h×w×C there."""
    network = seeded(lambda: factory.create_model(f"timm/{short}", 2)).eval()
    size = factory.describe(f"timm/{short}").image_size
    reference = timm.create_model(short, features_only=True).eval()
    state = network.state_dict()
    dotted = {
        key: re.sub(r"\b(stages|layers|stem)_", r"\1.", key) for key in reference.state_dict()
    }
    reference.load_state_dict({key: state[name] for key, name in dotted.items()})
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        maps, expected = factory.forward_maps(network, x), reference(x)
    described = factory.describe(f"timm/{short}").maps
    assert [entry.stride for entry in described] == reference.feature_info.reduction()
    for entry, (name, value), other in zip(described, maps.items(), expected, strict=True):
        other = other.permute(0, 3, 1, 2) if channels_last else other
        assert (entry.name, entry.channels) == (name, value.shape[1])
        assert value.shape[-1] == size // entry.stride
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize("arch", ["resnet18", "resnet18_cifar_w16", "resnext32_16x4d", "wrn_28_4"])
def test_the_maps_of_our_own_are_as_described(arch: str) -> None:
    network = resnet.create_model(arch, 2).eval()
    described = factory.describe(arch)
    with torch.inference_mode():
        maps = factory.forward_maps(network, torch.randn(1, 3, 64, 64))
    found = [(name, value.shape[1], 64 // value.shape[-1]) for name, value in maps.items()]
    assert found == [(entry.name, entry.channels, entry.stride) for entry in described.maps]
    assert described.num_features == network.head_hidden_size
    assert described.kind == "pyramid"


@pytest.mark.parametrize(
    ("short", "kind", "patch"), [("test_vit", "plain", 16), ("test_convnext", "pyramid", 0)]
)
def test_transformers_and_pyramids_take_other_sizes(short: str, kind: str, patch: int) -> None:
    name = f"timm/{short}"
    network = factory.create_model(name, 2).eval()
    described = factory.describe(name)
    assert (described.kind, described.patch) == (kind, patch)
    with torch.inference_mode():
        maps = factory.forward_maps(network, torch.randn(1, 3, 64, 96))
    for entry in described.maps:
        assert maps[entry.name].shape[-2:] == (64 // entry.stride, 96 // entry.stride)
    factory.check_image_size(name, 64)


def test_a_network_of_one_size_refuses_others() -> None:
    factory.check_image_size("timm/hiera_tiny_224", 224)
    with pytest.raises(InputError, match=r"does not take images of 96×96.*usual size is 224×224"):
        factory.check_image_size("timm/hiera_tiny_224", 96)


def test_a_description_draws_no_random_number() -> None:
    factory.describe.cache_clear()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    factory.describe("timm/test_vit")
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet5O", "did you mean 'resnet50'"),
        ("timm/convnext_ato", "'timm/convnext_atto'"),
        ("convnext_atto", "'timm/convnext_atto'"),
        ("timm/test_vit.nothing", r"test_vit one of .*, not 'nothing'"),
        ("no/such/file.py:net", r"file.py does not exist"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        factory.create_model(name, 2)
    with pytest.raises(InputError, match=sentence):
        factory.check_name(name)


def test_options_reach_timm_and_wrong_ones_are_one_sentence() -> None:
    network: Any = factory.create_model("timm/test_vit", 2, drop_path_rate=0.3)
    assert network.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    with pytest.raises(InputError, match=r"timm cannot build test_vit with wings=2"):
        factory.create_model("timm/test_vit", 2, wings=2)
    with pytest.raises(InputError, match="takes no options; drop_path_rate"):
        factory.create_model("resnet18", 2, drop_path_rate=0.3)


def test_a_users_maps_are_described_named_and_pooled(tmp_path: Path) -> None:
    name = user(tmp_path, NETWORKS["maps"])
    described = factory.describe(name)
    assert [(m.channels, m.stride) for m in described.maps] == [(4, 4), (6, 8)]
    assert (described.image_size, described.mean[0], described.kind) == (64, 0.1, "pyramid")
    network: Any = factory.create_model(name, 3)
    x = torch.randn(2, 3, 64, 64)
    maps = factory.forward_maps(network, x)
    assert [tuple(v.shape) for v in maps.values()] == [(2, 4, 16, 16), (2, 6, 8, 8)]
    pooled = network.forward_head(network.forward_features(x), pre_logits=True)
    expected = network.body.b(network.body.a(x)).mean((2, 3))
    torch.testing.assert_close(pooled, expected)
    assert network(x).shape == (2, 3)
    assert head_prefixes(network) == ("fc.",)


@pytest.mark.parametrize(("body", "kind"), [("map", "plain"), ("vector", "vector")])
def test_what_a_users_network_gives_decides_what_it_is(
    tmp_path: Path, body: str, kind: str
) -> None:
    described = factory.describe(user(tmp_path, NETWORKS[body]))
    assert (described.kind, described.head_hidden_size) == (kind, {"map": 5, "vector": 12}[body])


def test_one_seed_gives_one_network_also_of_a_users(tmp_path: Path) -> None:
    name = user(tmp_path, NETWORKS["maps"])
    first, second = (seeded(lambda: factory.create_model(name, 3)).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize(
    ("body", "name", "sentence"),
    [
        ("import nothing_like_it\n", "net", r"mine.py: net fails with ModuleNotFoundError: No mod"),
        ("def net():\n    return 1 / 0\n", "net", r"net fails with ZeroDivisionError"),
        ("def net():\n    return 7\n", "net", r"net returned a int, not a torch.nn.Module"),
        ("def other():\n    pass\n", "net", r"has no function net; it has other"),
        ("def net():\n    return nn.Linear(3, 4)\n", "net", r"mine.py: net fails with"),
        ("def net():\n    return nn.Flatten(2)\n", "net", r"must be a map N×C×h×w"),
    ],
)
def test_a_users_file_that_fails_is_one_sentence(
    tmp_path: Path, body: str, name: str, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        factory.create_model(user(tmp_path, body, name), 2)


def test_features_are_cached_under_a_users_code_and_without_the_classifier(tmp_path: Path) -> None:
    network = factory.create_model(user(tmp_path, NETWORKS["map"]), 3)
    before = weights_signature(network)
    network.reset_classifier(4)
    assert weights_signature(network) == before
    (tmp_path / "mine.py").write_text(f"{(tmp_path / 'mine.py').read_text()}\n# changed\n")
    changed = factory.create_model(f"{tmp_path / 'mine.py'}:net", 3)
    changed.load_state_dict(network.state_dict() | {k: v for k, v in changed.state_dict().items()
                                                    if k.startswith("fc.")})  # fmt: skip
    assert weights_signature(changed) != before


@pytest.mark.parametrize("short", ["test_efficientnet", "test_vit", "test_convnext"])
def test_the_classifier_is_found_by_what_it_is(short: str) -> None:
    network = factory.create_model(f"timm/{short}", 3)
    old = weights_signature(network)
    network.reset_classifier(7)
    prefixes = head_prefixes(network)
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items() if k.startswith(prefixes)}
    width = network.head_hidden_size
    assert sorted(shapes.values()) == [(7,), (7, width)]
    assert weights_signature(network) == old


def test_a_synchronised_norm_of_timm_keeps_its_activation() -> None:
    """torch's own conversion would drop it, for timm's norm is a subclass of BatchNorm."""
    network = seeded(lambda: factory.create_model("timm/test_efficientnet", 3)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = network(x)
        converted = sync_batch_norm(network).eval()
        torch.testing.assert_close(converted(x), expected)
    kinds = {type(m) for m in converted.modules() if hasattr(m, "running_mean")}
    assert all(issubclass(kind, torch.nn.SyncBatchNorm) for kind in kinds)


def test_a_checkpoint_never_runs_a_file_of_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    user(tmp_path, "raise SystemExit('run')\n")
    rgb = (0.5, 0.5, 0.5)
    facts = Facts("mine.py:net", 2, "ce", 1, 1, "data", 32, rgb, rgb)
    save_checkpoint(tmp_path / "epoch.pth", {"a": torch.zeros(1)}, facts)
    with pytest.raises(InputError, match="relative path"):
        load_checkpoint(tmp_path / "epoch.pth")
    assert factory.canonical("mine.py:net") == f"{tmp_path / 'mine.py'}:net"
    assert checkpoint.VERSION == 1


@pytest.mark.parametrize(("size", "side", "stride"), [(224, 7, 32), (299, 147, 2), (518, 37, 14)])
def test_a_stride_is_exact_or_a_power_of_two(size: int, side: int, stride: int) -> None:
    assert stride_of(size, side) == stride
