"""Images in, squares out: evaluation transforms and augmentations of uint8 tensors.

N images, C = 3 channels (RGB), H×W as stored, S the side of the square a network sees.
An augmentation draws from torch's global CPU generator; its caller seeds that (``core.seeds``).
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

# (3×H×W uint8, S, the data's mean colour in 0..1) -> 3×S×S uint8
Augmentation = Callable[[Tensor, int, Sequence[float]], Tensor]

BLACK = (0.0, 0.0, 0.0)

CUTOUT_SIDE = 16  # pixels at S = 32; DeVries and Taylor, arXiv 1708.04552, CIFAR-10
CROP_PADDING = 8  # a border of S / 8 before a random crop: 4 pixels at 32, as on CIFAR


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images / 255 − mean) / std as float32, on the images' device.

    Args:
        images: …×3×S×S, uint8.
        mean, std: of RGB in 0..1.
    """
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    return images.float().mul_(scale[:, None, None]).add_(shift[:, None, None])


def evaluation_view(image: Tensor, size: int, resize_ratio: float) -> Tensor:
    """Return the deterministic S×S view of an image.

    Args:
        image: 3×H×W, uint8.
        resize_ratio: the short side becomes S × this, then the centre S×S is cut; 256/224 is
            ImageNet's habit. Below 1 (0): the whole image is resized to S×S, as for images that
            are square already.
    """
    if image.shape[1:] == (size, size):
        return image
    if resize_ratio < 1:
        return v2.functional.resize(image, [size, size], antialias=True)
    image = v2.functional.resize(image, [round(size * resize_ratio)], antialias=True)
    return v2.functional.center_crop(image, [size, size])


def crop_flip(image: Tensor, size: int, mean: Sequence[float] = BLACK) -> Tensor:
    """Random S×S crop from the image padded by S / 8 zeros on each side, flipped half the time."""
    image = _short_side(image, size)
    border = size // CROP_PADDING
    rows, columns = image.shape[1] + 2 * border - size, image.shape[2] + 2 * border - size
    draw = torch.randint(0, 1 << 30, (3,)).tolist()
    top, left = draw[0] % (rows + 1), draw[1] % (columns + 1)
    image = F.pad(image, (border, border, border, border))
    image = image[:, top : top + size, left : left + size]
    return image.flip(2) if draw[2] & 1 else image.contiguous()


def crop_flip_aa(image: Tensor, size: int, mean: Sequence[float] = BLACK) -> Tensor:
    """``crop_flip``, then the CIFAR-10 AutoAugment policy (arXiv 1805.09501), then Cutout."""
    image = _auto_augment(v2.AutoAugmentPolicy.CIFAR10)(crop_flip(image, size))
    return cutout(image, round(CUTOUT_SIDE * size / 32), mean)


def imagenet(image: Tensor, size: int, mean: Sequence[float] = BLACK) -> Tensor:
    """A random 8 to 100% of the area, aspect 3/4 to 4/3, resized to S×S, flipped half the time."""
    return _random_resized_crop(size)(image)


def imagenet_aa(image: Tensor, size: int, mean: Sequence[float] = BLACK) -> Tensor:
    """``imagenet``, then the ImageNet AutoAugment policy (arXiv 1805.09501)."""
    return _auto_augment(v2.AutoAugmentPolicy.IMAGENET)(imagenet(image, size))


def cutout(image: Tensor, side: int, mean: Sequence[float]) -> Tensor:
    """Fill a side×side square around a random pixel with the mean; it may reach over the border.

    The released CTC code, as the original, zeroes the square after normalisation: zero is the mean.

    Args:
        mean: RGB in 0..1, which becomes the nearest uint8 colour.
    """
    height, width = image.shape[1:]
    draw = torch.randint(0, 1 << 30, (2,)).tolist()
    top, left = draw[0] % height - side // 2, draw[1] % width - side // 2
    colour = torch.tensor([round(255 * m) for m in mean], dtype=torch.uint8)
    image = image.clone()
    square = image[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)]
    square.copy_(colour[:, None, None])
    return image


AUGMENTATIONS: dict[str, Augmentation | None] = {
    "none": None,  # the evaluation view
    "crop_flip": crop_flip,  # small images: CIFAR's pad 4, crop, flip
    "crop_flip_aa": crop_flip_aa,  # the paper's "+AA" on CIFAR
    "imagenet": imagenet,
    "imagenet_aa": imagenet_aa,  # the paper's "+AA" on ImageNet
}


def _short_side(image: Tensor, size: int) -> Tensor:
    if min(image.shape[1:]) == size:
        return image
    return v2.functional.resize(image, [size], antialias=True)


@functools.cache
def _auto_augment(policy: v2.AutoAugmentPolicy) -> v2.AutoAugment:
    return v2.AutoAugment(policy)


@functools.cache
def _random_resized_crop(size: int) -> v2.Transform:
    return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
