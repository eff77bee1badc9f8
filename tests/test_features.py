"""Companions of a representation against their definitions; images as X; a run's features."""

from pathlib import Path

import pytest
import torch

from analysis.features import (
    Extraction,
    effective_rank,
    feature_norm,
    features_of,
    network_of,
    open_as,
    pixels_of,
)
from core.errors import InputError
from data.datasets import DataConfig, normalise
from models.checkpoint import Checkpoint, Facts, load_checkpoint, save_checkpoint
from models.resnet import create_model

CPU = torch.device("cpu")
NO_CACHE = Extraction(batch_size=7, cache=False)


def test_effective_rank_is_the_number_of_equal_directions() -> None:
    """k orthogonal directions of equal strength: rank k, whatever D, scale, rotation and offset."""
    draw = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(9, 9, generator=draw)).Q
    for k in (1, 3, 9):
        corners = torch.eye(9)[:k]
        points = torch.cat([corners, -corners]) @ turn * 40 + 5
        assert effective_rank(points) == pytest.approx(k, abs=1e-4)


def test_effective_rank_is_the_definition_for_few_and_for_many_images() -> None:
    draw = torch.Generator().manual_seed(1)
    for n, d in ((6, 20), (40, 5)):
        features = torch.randn(n, d, generator=draw)
        singular = torch.linalg.svdvals(features.double() - features.double().mean(0))
        share = singular[singular > 1e-9] / singular.sum()
        expected = float((-share * share.log()).sum().exp())
        assert effective_rank(features) == pytest.approx(expected, rel=1e-6)
        assert effective_rank(features) <= min(n - 1, d) + 1e-6


def test_collapsed_features_have_no_rank_and_norms_are_means() -> None:
    assert effective_rank(torch.full((5, 3), 2.0)) == 0.0
    assert feature_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]])) == pytest.approx(3.0)


def checkpoint_in(folder: Path, classes: int = 3) -> Checkpoint:
    torch.manual_seed(0)
    model = create_model("resnet18_cifar_w16", classes)
    facts = Facts(
        "resnet18_cifar_w16", classes, "ce", 1, 0, "tiny", 16, (0.4, 0.4, 0.4), (0.2, 0.3, 0.2)
    )
    save_checkpoint(folder / "a.pth", model.state_dict(), facts)
    return load_checkpoint(folder / "a.pth")


def test_features_are_the_networks_on_images_normalised_as_it_was_trained(
    tmp_path: Path, tiny_npz: Path
) -> None:
    checkpoint = checkpoint_in(tmp_path)
    dataset = open_as(DataConfig(name="npz", root=str(tiny_npz)), checkpoint, "test")
    assert dataset.image_size == 16  # the network's, where the data set's own is 32
    found = features_of(checkpoint, dataset, CPU, NO_CACHE)
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    model = network_of(checkpoint).eval()
    with torch.no_grad():
        x = normalise(images, checkpoint.facts.mean, checkpoint.facts.std)
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_pixels_are_the_chosen_images_averaged_down(tmp_path: Path, tiny_npz: Path) -> None:
    checkpoint = checkpoint_in(tmp_path)
    dataset = open_as(DataConfig(name="npz", root=str(tiny_npz)), checkpoint, "test")
    rows = torch.tensor([1, 5, 6])
    whole = pixels_of(dataset, rows, 0)
    assert whole.shape == (3, 3 * 16 * 16)
    expected = normalise(torch.stack([dataset[int(i)][0] for i in rows]), dataset.mean, dataset.std)
    torch.testing.assert_close(whole, expected.flatten(1))
    quarter = pixels_of(dataset, rows, 4).view(3, 3, 4, 4)
    torch.testing.assert_close(quarter[:, :, 0, 0], expected[:, :, :4, :4].mean((2, 3)))
    assert torch.equal(pixels_of(dataset, rows, 64), whole)  # never enlarged


def test_a_checkpoint_that_is_not_its_architecture_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_in(tmp_path)
    del checkpoint.model["layer4.1.conv2.weight"]
    with pytest.raises(InputError, match=r"does not fit its own architecture.*layer4\.1\.conv2"):
        network_of(checkpoint)
