"""The data sets this suite knows. To add one: write its reader, then one entry in ``DATASETS``."""

import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path

from core.errors import InputError
from data.readers import listed, plain, shards, torchvision_sets
from data.shapes import images as shapes
from data.source import Request, Source

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
    augmentation: str = "imagenet"  # of training, a key of data.transforms.AUGMENTATIONS, likewise
    folder: str = ""  # where it lies under the data folder; "": by its name
    resize_ratio: float = CENTRE_CROP  # see data.transforms.evaluation_view
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
        augmentation="crop_flip",
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
        augmentation="crop_flip",
        resize_ratio=WHOLE_IMAGE,
        counts={"train": 50_000, "test": 10_000},
        classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar10_subset": DatasetInfo(
        read=plain.read_npz,
        how="{root} holds one .npz file with x_train y_train x_test y_test classes: 15,000 + 4,000 "
        "images of CIFAR-10 (a subset of no official kind, for two cores)",
        image_size=32,
        augmentation="crop_flip",
        folder="cifar10",
        resize_ratio=WHOLE_IMAGE,
        counts={"train": 15_000, "test": 4_000},
        classes=10,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
    ),
    "cifar100": DatasetInfo(
        read=torchvision_sets.read_cifar100,
        how="unpack https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz in {root}, "
        "so that {root}/cifar-100-python/train exists",
        image_size=32,
        augmentation="crop_flip",
        resize_ratio=WHOLE_IMAGE,
        counts={"train": 50_000, "test": 10_000},
        classes=100,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
    ),
    "stl10": DatasetInfo(
        read=torchvision_sets.read_stl10,
        how="unpack http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz in {root}, so that "
        "{root}/stl10_binary/train_X.bin exists",
        image_size=96,
        augmentation="crop_flip",
        resize_ratio=WHOLE_IMAGE,
        counts={"train": 5_000, "test": 8_000},
        classes=10,
    ),
    "svhn": DatasetInfo(
        read=torchvision_sets.read_svhn,
        how="put train_32x32.mat and test_32x32.mat from http://ufldl.stanford.edu/housenumbers "
        "in {root}",
        image_size=32,
        augmentation="crop_flip",
        resize_ratio=WHOLE_IMAGE,
        counts={"train": 73_257, "test": 26_032},
        classes=10,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
    ),
    "cinic10": DatasetInfo(
        read=listed.read_cinic10,
        how="unpack CINIC-10.tar.gz from https://datashare.ed.ac.uk/handle/10283/3192 in {root}, "
        "so that {root}/{{train,valid,test}}/CLASS/*.png exist",
        image_size=32,
        augmentation="crop_flip",
        resize_ratio=WHOLE_IMAGE,
        counts={"train": 90_000, "val": 90_000, "test": 90_000},
        classes=10,
        mean=(0.4789, 0.4723, 0.4305),
        std=(0.2421, 0.2383, 0.2587),
    ),
    "cub200": DatasetInfo(
        read=listed.read_cub200,
        how="unpack CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158 in {root}, "
        "so that {root}/CUB_200_2011/images.txt exists",
        counts={"train": 5_994, "test": 5_794},
        classes=200,
    ),
    "aircraft": DatasetInfo(
        read=torchvision_sets.read_aircraft,
        how="unpack https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/"
        "fgvc-aircraft-2013b.tar.gz in {root}, so that {root}/fgvc-aircraft-2013b/data exists",
        counts={"train": 3_334, "val": 3_333, "test": 3_333},
        classes=100,
        # the paper reports top-1; the authors' mean per class hardly differs (33 or 34 images each)
    ),
    "cars": DatasetInfo(
        read=torchvision_sets.read_cars,
        how="the original site is gone: find a copy of Stanford Cars and lay it out as "
        "{root}/stanford_cars/{{devkit,cars_train,cars_test,cars_test_annos_withlabels.mat}}",
        counts={"train": 8_144, "test": 8_041},
        classes=196,
    ),
    "flowers17": DatasetInfo(
        read=plain.read_folder,
        how="get 17flowers.tgz from https://www.robots.ox.ac.uk/~vgg/data/flowers/17, laid out as "
        "{root}/{{train,test}}/CLASS/*.jpg, 60 + 20 images a class (128 px are enough)",
        image_size=64,  # for networks with a CIFAR stem, on two cores
        folder="flowers17_128",
        counts={"train": 1_020, "test": 340},
        classes=17,
    ),
    "flowers102": DatasetInfo(
        read=torchvision_sets.read_flowers102,
        how="get 102flowers.tgz, imagelabels.mat and setid.mat from https://www.robots.ox.ac.uk/"
        "~vgg/data/flowers/102 and lay them out as {root}/flowers-102/{{jpg,imagelabels.mat,"
        "setid.mat}}",
        counts={"train": 1_020, "val": 1_020, "test": 6_149},
        classes=102,
        metric="mean_per_class",
    ),
    "pets": DatasetInfo(
        read=listed.read_pets,
        how="unpack images.tar.gz and annotations.tar.gz from https://www.robots.ox.ac.uk/~vgg/"
        "data/pets in {root}, so that {root}/images and {root}/annotations/trainval.txt exist",
        counts={"train": 3_680, "test": 3_669},  # train is the authors' "trainval"
        classes=37,
        metric="mean_per_class",
    ),
    "dtd": DatasetInfo(
        read=listed.read_dtd,
        how="unpack https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz in "
        "{root}, so that {root}/dtd/labels/train1.txt exists",
        counts={"train": 1_880, "val": 1_880, "test": 1_880},
        classes=47,
    ),
    "food101": DatasetInfo(
        read=torchvision_sets.read_food101,
        how="unpack http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz in {root}, so that "
        "{root}/food-101/meta/train.json exists",
        counts={"train": 75_750, "test": 25_250},
        classes=101,
    ),
    "caltech101": DatasetInfo(
        read=listed.read_caltech101,
        how="unpack caltech-101.zip from https://data.caltech.edu/records/mzrjq-6wc02 and the "
        "archive in it, so that {root}/101_ObjectCategories exists",
        counts={"train": 3_060, "test": 6_084},  # no official split: see its reader
        classes=102,
        metric="mean_per_class",
    ),
    "voc07": DatasetInfo(
        read=listed.read_voc07,
        how="unpack VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar from "
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007 in {root}, so that "
        "{root}/VOCdevkit/VOC2007/ImageSets exists",
        counts={"train": 2_501, "val": 2_510, "test": 4_952},
        classes=20,
        metric="voc07_map",
    ),
    "inat18": DatasetInfo(
        read=listed.read_inat18,
        how="unpack train_val2018.tar.gz, train2018.json.tar.gz and val2018.json.tar.gz from "
        "https://github.com/visipedia/inat_comp/tree/master/2018 in {root}, so that "
        "{root}/train2018.json and {root}/train_val2018 exist",
        counts={"train": 437_513, "val": 24_426},
        classes=8_142,
    ),
    "places205": DatasetInfo(
        read=listed.read_places205,
        how="get the resized images and the train/val split of Places205 from "
        "http://places.csail.mit.edu/downloadData.html, so that {root}/train_places205.csv and "
        "{root}/images256 exist",
        counts={"train": 2_448_873, "val": 20_500},
        classes=205,
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
    "shards": DatasetInfo(
        read=shards.read_shards,
        how="lay it out as {root}/{{train,val,test}}/*.tar of KEY.jpg with KEY.cls or KEY.json, as "
        "webdataset and tools/make_shards.py write them",
        find_splits=shards.shard_splits,
    ),
    "npz": DatasetInfo(
        read=plain.read_npz,
        how="{root} is one .npz file with x_train y_train x_test y_test classes "
        "(uint8 N×H×W×3, integers, names)",
        image_size=32,
        augmentation="crop_flip",
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
