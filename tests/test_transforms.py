"""Views and augmentations of images, against hand-made cases and independent references."""

import numpy as np
import pytest
import torch
from PIL import Image

from core.seeds import torch_seeded
from data.transforms import AUGMENTATIONS, crop_flip, cutout, evaluation_view, normalise


def _numbered(height, width):
    """An image in which every pixel is another: channels hold row + 1, column + 1 and 7."""
    rows = torch.arange(1, height + 1)[:, None].expand(height, width)
    columns = torch.arange(1, width + 1)[None].expand(height, width)
    return torch.stack([rows, columns, torch.full((height, width), 7)]).to(torch.uint8)


def test_normalise_equals_the_definition_in_float64():
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    expected = (images.double() / 255 - torch.tensor(mean)[:, None, None].double()) / torch.tensor(
        std
    )[:, None, None].double()
    result = normalise(images, mean, std)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=3e-6, rtol=0)


def test_normalise_keeps_the_input_and_its_memory_format():
    images = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    result = normalise(images, (0.5,) * 3, (0.5,) * 3)
    assert int(images.min()) == 100
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_evaluation_view_of_an_image_of_that_size_is_the_image():
    image = _numbered(32, 32)
    assert torch.equal(evaluation_view(image, 32, 0.0), image)


@pytest.mark.parametrize(("height", "width"), [(90, 60), (60, 90), (75, 75)])
def test_imagenet_view_equals_pillow_resize_and_centre_crop(height, width):
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    short, size = 32, 28
    w, h = (short, int(short * height / width)) if width <= height else (
        int(short * width / height), short,
    )  # fmt: skip
    resized = picture.resize((w, h), Image.Resampling.BILINEAR)
    top, left = round((h - size) / 2), round((w - size) / 2)
    expected = np.array(resized)[top : top + size, left : left + size]
    result = evaluation_view(image, size, short / size)
    assert result.shape == (3, size, size)
    difference = result.permute(1, 2, 0).numpy().astype(int) - expected.astype(int)
    assert np.abs(difference).max() <= 2


def test_crop_flip_yields_every_window_of_the_padded_image_and_its_mirror():
    image = _numbered(16, 16)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    windows = {}
    for top in range(5):
        for left in range(5):
            window = padded[:, top : top + 16, left : left + 16]
            windows[window.contiguous().numpy().tobytes()] = (top, left, False)
            windows[window.flip(2).contiguous().numpy().tobytes()] = (top, left, True)
    seen = set()
    for draw in range(600):
        with torch_seeded(draw):
            seen.add(windows[crop_flip(image, 16).numpy().tobytes()])
    assert len(seen) == 5 * 5 * 2


def test_cutout_fills_one_square_with_the_mean_and_nothing_else():
    """As zeros after normalisation would: within half a step of uint8 of zero."""
    image, mean, std = _numbered(32, 32), (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    colour = torch.tensor([129, 124, 112], dtype=torch.uint8)
    assert not (image == colour[:, None, None]).all(0).any()
    for draw in range(50):
        with torch_seeded(draw):
            result = cutout(image, 16, mean)
        filled = (result == colour[:, None, None]).all(0)
        assert torch.equal(result[:, ~filled], image[:, ~filled])
        assert float(normalise(result, mean, std)[:, filled].abs().max()) <= 0.5 / 255 / min(std)
        rows, columns = filled.any(1).sum(), filled.any(0).sum()
        assert filled.sum() == rows * columns
        assert 8 <= rows <= 16
        assert 8 <= columns <= 16


@pytest.mark.parametrize("name", [name for name, augment in AUGMENTATIONS.items() if augment])
@pytest.mark.parametrize("shape", [(32, 32), (40, 57), (57, 31), (20, 20)])
def test_every_augmentation_gives_uint8_squares_and_draws_from_the_torch_seed(name, shape):
    augment = AUGMENTATIONS[name]
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    kept = image.clone()
    views = []
    for seed in (1, 1, 2, 3, 4):
        with torch_seeded(seed):
            views.append(augment(image, 32, (0.5, 0.4, 0.3)))
    assert all(view.shape == (3, 32, 32) and view.dtype == torch.uint8 for view in views)
    assert torch.equal(views[0], views[1])
    assert any(not torch.equal(views[0], view) for view in views[2:])
    assert torch.equal(image, kept)
