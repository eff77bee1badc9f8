"""Features: each image once, whatever the batches and ranks; the cache never serves old ones."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from core.errors import InputError
from data.datasets import DataConfig, open_dataset
from models import features as module
from models.features import InputSpec, NonFiniteFeatures, cached, extract, weights_signature
from models.resnet import create_model

ARCH = "resnet18_cifar_w16"


class Network(nn.Module):
    """The least that has weights, statistics, features and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def get_classifier(self) -> torch.nn.Module:
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(3)
    model = Network()
    model.bn.running_mean.normal_()  # type: ignore[operator]
    return model


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 256, (20, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_row_i_is_the_pooled_feature_of_image_i(tiny_npz: Path) -> None:
    """Of a real network, against a plain loop over single images."""
    torch.manual_seed(0)
    network = create_model(ARCH, 2)
    dataset = open_dataset(DataConfig(name="npz", root=str(tiny_npz), image_size=16), "test")
    found = extract(network, dataset, batch_size=7)
    network.eval()
    mean, std = torch.tensor(dataset.mean), torch.tensor(dataset.std)
    for i in range(0, len(dataset), 5):
        pixels = dataset[i][0].float() / 255
        x = (pixels - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            plain = network.forward_features(x[None]).mean((2, 3))[0]
        assert torch.allclose(found.features[i], plain, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.labels, dataset.labels)
    assert torch.equal(found.index, torch.arange(24))


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (5, 2), (48, 0), (999, 0)])
def test_features_do_not_depend_on_batches_or_workers(
    network: Network, tiny_npz: Path, batch_size: int, workers: int
) -> None:
    dataset = open_dataset(DataConfig(name="npz", root=str(tiny_npz)), "train")
    reference = extract(network, dataset, batch_size=16).features
    found = extract(network, dataset, batch_size=batch_size, workers=workers).features
    assert torch.allclose(found, reference, atol=1e-5, rtol=1e-5)


def test_features_do_not_depend_on_the_number_of_ranks(
    run_ranks: Callable[..., None], tmp_path: Path, tiny_npz: Path
) -> None:
    """Seven images over two ranks: unequal shares; every rank gets all of them, warm or cold."""
    script = """
import torch
from core import dist
from data.datasets import DataConfig, open_dataset
from models.features import cached
from models.resnet import create_model
dist.init("cpu")
torch.manual_seed(0)
model = create_model("resnet18_cifar_w16", 1)
dataset = open_dataset(DataConfig(name="npz", root=sys.argv[1], limit=7), "test")
for name in ("cold", "warm"):
    found = cached(model, dataset, batch_size=2, folder=sys.argv[2] + "/cache")
    torch.save(found.features, f"{sys.argv[2]}/{dist.rank()}_{name}.pt")
dist.shutdown()
"""
    run_ranks(script, 2, tiny_npz, tmp_path)
    torch.manual_seed(0)
    dataset = open_dataset(DataConfig(name="npz", root=str(tiny_npz), limit=7), "test")
    alone = extract(create_model(ARCH, 1), dataset).features
    assert alone.shape == (7, 128)
    found = list(tmp_path.glob("*.pt"))
    assert len(found) == 4
    for path in found:
        assert torch.allclose(torch.load(path), alone, atol=1e-5, rtol=1e-5)


def test_the_network_stays_as_it_was_to_the_last_flag(network: Network, tiny_npz: Path) -> None:
    network.train()
    network.bn.eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    flags = [m.training for m in network.modules()]
    extract(network, open_dataset(DataConfig(name="npz", root=str(tiny_npz)), "train"))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert [m.training for m in network.modules()] == flags
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


def test_features_can_be_learnt_from(network: Network, tiny_npz: Path) -> None:
    """They are ordinary tensors, not those of inference mode, which autograd refuses."""
    dataset = open_dataset(DataConfig(name="npz", root=str(tiny_npz), limit=6), "train")
    found = extract(network, dataset).features
    weight = torch.zeros(8, requires_grad=True)
    (found @ weight).pow(2).sum().backward()


def test_a_second_call_reads_the_cache(
    network: Network, tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(DataConfig(name="npz", root=str(tiny_npz)), "train")
    first = cached(network, dataset, folder=tmp_path)
    monkeypatch.setattr(module, "extract", None)  # computing again would fail
    network.fc = torch.nn.Linear(8, 9)  # the head is no part of it
    second = cached(network, dataset, batch_size=3, folder=tmp_path)
    assert torch.equal(first.features, second.features)


def test_the_cache_is_not_asked_for_what_differs(
    network: Network, tiny_npz: Path, tmp_path: Path
) -> None:
    """A changed weight, buffer, view, normalisation, split, label or pixel is another key."""
    config = DataConfig(name="npz", root=str(tiny_npz))
    seen = set()

    def files_after(model: Network, how: DataConfig, split: str = "test", **more: object) -> int:
        cached(model, open_dataset(how, split), folder=tmp_path, **more)  # type: ignore[arg-type]
        seen.update(tmp_path.glob("*.pth"))
        return len(seen)

    assert files_after(network, config) == 1
    assert files_after(network, config) == 1
    assert files_after(network, dataclasses.replace(config, image_size=12)) == 2
    smaller = dataclasses.replace(config, image_size=12, resize_ratio=1.2)
    assert files_after(network, smaller) == 3
    assert files_after(network, config, inputs=InputSpec((0.5,) * 3, (0.5,) * 3)) == 4
    assert files_after(network, config, "train") == 5
    assert files_after(network, config, dtype=torch.float16) == 6
    assert files_after(network, config, amp="bf16") == 7
    content = dict(np.load(tiny_npz))
    content["y_test"] = content["y_test"][::-1]
    np.savez(tmp_path / "tiny.npz", **content)
    assert files_after(network, dataclasses.replace(config, root=str(tmp_path / "tiny.npz"))) == 8
    content["x_test"][3, 2, 1, 0] ^= 1
    np.savez(tmp_path / "tiny.npz", **content)
    assert files_after(network, dataclasses.replace(config, root=str(tmp_path / "tiny.npz"))) == 9
    with torch.no_grad():
        network.bn.running_var[5] += 1e-3  # type: ignore[operator, index]
    assert files_after(network, config) == 10
    with torch.no_grad():
        network.conv.weight[0, 0, 0, 0] += 1e-3
    assert files_after(network, config) == 11


def test_a_changed_image_file_is_seen(network: Network, image_folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(
        DataConfig(name="folder", root=str(image_folder), image_size=16), "train"
    )
    before = cached(network, dataset, folder=tmp_path / "cache").features
    path = image_folder / "a" / "2.png"
    Image.new("RGB", (20, 20), "red").save(path)
    os.utime(path, ns=(1, 1))
    after = cached(network, dataset, folder=tmp_path / "cache").features
    assert not torch.equal(before[2], after[2])
    assert torch.allclose(before[3:], after[3:], atol=1e-5)


def test_a_damaged_cache_file_is_computed_anew(
    network: Network, tiny_npz: Path, tmp_path: Path
) -> None:
    dataset = open_dataset(DataConfig(name="npz", root=str(tiny_npz)), "test")
    first = cached(network, dataset, folder=tmp_path).features
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:500])
    assert torch.equal(cached(network, dataset, folder=tmp_path).features, first)
    assert path.stat().st_size > 500


def test_half_precision_is_stored_and_close(network: Network, tiny_npz: Path) -> None:
    dataset = open_dataset(DataConfig(name="npz", root=str(tiny_npz)), "test")
    half = extract(network, dataset, dtype=torch.float16).features
    assert half.dtype == torch.float16
    assert torch.allclose(half.float(), extract(network, dataset).features, rtol=2e-3, atol=1e-3)


def test_unreadable_images_are_named_and_counted(network: Network, image_folder: Path) -> None:
    (image_folder / "a" / "1.png").write_bytes(b"not an image")
    (image_folder / "b" / "3.png").write_bytes(b"")
    dataset = open_dataset(
        DataConfig(name="folder", root=str(image_folder), image_size=16), "train"
    )
    with pytest.raises(InputError, match=r"2 of the 8 images") as caught:
        extract(network, dataset, batch_size=3)
    assert "a/1.png" in str(caught.value)
    assert "b/3.png" in str(caught.value)


def test_features_that_are_not_finite_are_refused(network: Network, tiny_npz: Path) -> None:
    with torch.no_grad():
        network.bn.weight[0] = float("nan")
    dataset = open_dataset(DataConfig(name="npz", root=str(tiny_npz)), "test")
    with pytest.raises(NonFiniteFeatures, match=r"24 of the 24 features"):
        extract(network, dataset)


def test_the_signature_tells_networks_of_equal_tensors_apart() -> None:
    """ResNets that differ in structure alone, such as where the stride stands, share no cache."""
    first, second = create_model(ARCH, 1), create_model(ARCH, 1)
    second.load_state_dict(first.state_dict())
    assert weights_signature(first) == weights_signature(second)
    second.arch = f"{ARCH} (stride in the 1×1)"
    assert weights_signature(first) != weights_signature(second)
