"""The data sets this suite knows. To add one: write its reader, then one entry in ``DATASETS``."""

import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path

from core import shapes
from core.errors import InputError
from core.readers import plain, torchvision_sets
from core.source import Request, Source

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # CIFAR-100's
WHOLE_IMAGE = 0.0  # evaluation: the image resized to a square
CENTRE_CROP = 256 / 224  # evaluation: short side to 256 for a 224 crop, ImageNet's habit


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is fixed about a data set, official figures where there are any."""

    read: Callable[[Request], Source]
    how: str  # one sentence: how to get it and how it must lie on disk, {root} being its folder
    image_size: int = 224  # side in pixels that networks see unless a config says otherwise
    resize_ratio: float = CENTRE_CROP  # see core.transforms.evaluation_view
    counts: dict[str, int] = dataclasses.field(default_factory=dict)  # images per official split
    classes: int = 0  # 0: whatever is found
    find_splits: Callable[[Path], list[str]] | None = None  # where ``counts`` does not say
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of RGB in 0..1
    std: tuple[float, float, float] = IMAGENET_STD
    metric: str = "top1"  # as the field has it: "top1", "mean_per_class" or "voc07_map"
    drawn: bool = False  # made by this program: nothing lies on disk


DATASETS: dict[str, DatasetInfo] = {
    "shapes": DatasetInfo(
        read=plain.read_shapes,
        how="drawn by this program",
        image_size=shapes.IMAGE_SIZE,
        resize_ratio=WHOLE_IMAGE,
        counts=dict(shapes.COUNTS),
        classes=len(shapes.CLASSES),
        drawn=True,
    ),
    "cifar10": DatasetInfo(
        read=torchvision_sets.read_cifar10,
        how="unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz in {root}, "
        "so that {root}/cifar-10-batches-py/data_batch_1 exists",
        image_size=32,
        resize_ratio=WHOLE_IMAGE,
        counts={"train": 50_000, "test": 10_000},
        classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": DatasetInfo(
        read=torchvision_sets.read_cifar100,
        how="unpack https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz in {root}, "
        "so that {root}/cifar-100-python/train exists",
        image_size=32,
        resize_ratio=WHOLE_IMAGE,
        counts={"train": 50_000, "test": 10_000},
        classes=100,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
    ),
    "imagenet": DatasetInfo(
        read=plain.read_folder,
        how="get ILSVRC2012 from https://image-net.org and sort it into "
        "{root}/train/WNID/*.JPEG and {root}/val/WNID/*.JPEG",
        counts={"train": 1_281_167, "val": 50_000},
        classes=1000,
    ),
    "folder": DatasetInfo(
        read=plain.read_folder,
        how="lay it out as {root}/{{train,val,test}}/CLASS/*.jpg, or as {root}/CLASS/*.jpg",
        find_splits=plain.folder_splits,
    ),
    "npz": DatasetInfo(
        read=plain.read_npz,
        how="{root} is one .npz file with x_train y_train x_test y_test classes "
        "(uint8 N×H×W×3, integers, names)",
        image_size=32,
        resize_ratio=WHOLE_IMAGE,
        find_splits=plain.npz_splits,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
    ),
}


def look_up(name: str) -> DatasetInfo:
    """Return a data set's entry.

    Raises:
        InputError: unknown; the sentence names the nearest.
    """
    if name in DATASETS:
        return DATASETS[name]
    near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else "any image folder can be read as 'folder'"
    raise InputError(f"data set {name!r} is not one of {', '.join(DATASETS)}; {hint}")
