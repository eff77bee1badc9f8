"""Readers: files become labels and pixels exactly as they lie there."""

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import InputError
from data.source import balanced_positions, read_image


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("P", 3, None),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_kind_of_image_becomes_three_channels_red_first(tmp_path, mode, colour, expected):
    path = tmp_path / "image.png"
    Image.new(mode, (7, 5), colour).save(path)
    image = read_image(path)
    assert (image.shape, image.dtype) == ((3, 5, 7), torch.uint8)
    assert image.is_contiguous()
    if expected:
        assert image[:, 2, 3].tolist() == list(expected)


@pytest.mark.parametrize("content", [b"", b"no image", "cut"])
def test_what_does_not_decode_is_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    if content == "cut":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:-800]
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.jpg does not decode"):
        read_image(path)
    with pytest.raises(InputError, match=r"none\.jpg does not exist"):
        read_image(tmp_path / "none.jpg")


def test_balanced_positions_take_the_first_of_each_class_in_turn():
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2, 1, 0])
    assert balanced_positions(labels, 5).tolist() == [0, 1, 4, 5, 7]
    assert balanced_positions(labels, 7).tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert balanced_positions(labels, 0).tolist() == list(range(9))
    assert balanced_positions(labels, 99).tolist() == list(range(9))
    assert balanced_positions(torch.zeros(10, 4), 3).tolist() == [0, 3, 6]
