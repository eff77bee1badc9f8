"""Readers of data sets whose files are listed in text, JSON or folders, each in its own way.

N images, K classes. Where torchvision has a loader too, it hides the paths (Oxford Pets), fixes a
folder name that the archive does not have (DTD), leaves the splits out (Caltech-101, iNaturalist),
or is made for detection (VOC).
"""

import json
from pathlib import Path

import torch

from core.errors import InputError
from core.seeds import shuffled
from data.source import Request, Source, image_files, inside, one_sentence, subfolders

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
VOC_LABELS = {"1": 1, "-1": 0, "0": -1}  # present, absent, difficult: not evaluated
CALTECH_TRAIN = 30  # images a class to learn from, the field's habit; the set has no official split


def read_cub200(request: Request) -> Source:
    """CUB-200-2011: ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``."""
    root = inside(request.root, "CUB_200_2011")
    with one_sentence(root):
        paths = _pairs(root / "images.txt")
        labels = _pairs(root / "image_class_labels.txt")
        in_train = _pairs(root / "train_test_split.txt")
        wanted = "1" if request.split == "train" else "0"
        chosen = [key for key in paths if in_train[key] == wanted]
        classes = list(_pairs(root / "classes.txt").values())
        files = [root / "images" / paths[key] for key in chosen]
        return _source(files, [int(labels[key]) - 1 for key in chosen], classes, root)


def read_pets(request: Request) -> Source:
    """Oxford-IIIT Pets, 37 breeds: ``annotations/{trainval,test}.txt`` of name, label, …."""
    root = inside(request.root, "oxford-iiit-pet")
    with one_sentence(root):
        part = "trainval" if request.split == "train" else "test"
        lines = [line.split() for line in _lines(root / "annotations" / f"{part}.txt")]
        names = {int(line[1]): line[0].rsplit("_", 1)[0] for line in lines}
        files = [root / "images" / f"{line[0]}.jpg" for line in lines]
        classes = [names[label] for label in sorted(names)]
        return _source(files, [int(line[1]) - 1 for line in lines], classes, root)


def read_dtd(request: Request) -> Source:
    """Describable Textures, the first of its ten partitions, as the field reports it."""
    root = inside(request.root, "dtd")
    with one_sentence(root):
        names = _lines(root / "labels" / f"{request.split}1.txt")
        classes = sorted({name.split("/")[0] for name in _lines(root / "labels" / "train1.txt")})
        labels = [classes.index(name.split("/")[0]) for name in names]
        return _source([root / "images" / name for name in names], labels, classes, root)


def read_caltech101(request: Request) -> Source:
    """Caltech-101 with its background class: 30 images a class to learn from, the rest to test.

    The set has no official split; which 30 is this project's own choice, fixed by a seed.
    """
    root = inside(inside(request.root, "caltech-101"), "101_ObjectCategories")
    files: list[Path] = []
    labels: list[int] = []
    classes = subfolders(root)
    for label, name in enumerate(classes):
        found = image_files(root / name)
        order = shuffled(len(found), 101, label)
        train, test = order[:CALTECH_TRAIN], order[CALTECH_TRAIN:]
        chosen = sorted((train if request.split == "train" else test).tolist())
        files += [found[i] for i in chosen]
        labels += [label] * len(chosen)
    return _source(files, labels, classes, root)


def read_cinic10(request: Request) -> Source:
    """CINIC-10: ``{train,valid,test}/CLASS/*.png``."""
    folder = request.root / ("valid" if request.split == "val" else request.split)
    classes = subfolders(request.root / "train")
    found = [image_files(folder / name) for name in classes]
    labels = [label for label, files in enumerate(found) for _ in files]
    return _source([file for files in found for file in files], labels, classes, folder)


def read_inat18(request: Request) -> Source:
    """iNaturalist 2018: ``{train,val}2018.json`` in COCO's manner, and the images they name."""
    listing = request.root / f"{request.split}2018.json"
    with one_sentence(listing):
        content = json.loads(listing.read_text(encoding="utf-8"))
        ids = sorted(category["id"] for category in content["categories"])
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        number = {category: k for k, category in enumerate(ids)}
        label = {a["image_id"]: number[a["category_id"]] for a in content["annotations"]}
        images = content["images"]
        files = [request.root / image["file_name"] for image in images]
        labels = [label[image["id"]] for image in images]
        return _source(files, labels, [names[category] for category in ids], listing)


def read_places205(request: Request) -> Source:
    """Places205: ``{train,val}_places205.csv`` of path and label, images below ``images256``."""
    root = request.root
    listing = inside(root, "trainvalsplit_places205") / f"{request.split}_places205.csv"
    pictures = inside(root, "data/vision/torralba/deeplearning/images256")
    pictures = inside(root, "images256") if pictures == root else pictures
    with one_sentence(listing):
        lines = [line.rsplit(" ", 1) for line in _lines(listing)]
        labels = [int(label) for _, label in lines]
        names = {label: name.rsplit("/", 1)[0] for (name, _), label in zip(lines, labels)}
        classes = [names[label] for label in sorted(names)]
        return _source([pictures / name for name, _ in lines], labels, classes, listing)


def read_voc07(request: Request) -> Source:
    """PASCAL VOC 2007 classification: 20 labels an image, 1, 0 or −1 (difficult: not evaluated)."""
    root = inside(request.root, "VOCdevkit/VOC2007")
    lists = root / "ImageSets" / "Main"
    with one_sentence(root):
        names = _lines(lists / f"{request.split}.txt")
        columns = []
        for name in VOC_CLASSES:
            marks = dict(line.split() for line in _lines(lists / f"{name}_{request.split}.txt"))
            columns.append([VOC_LABELS[marks[image]] for image in names])
        files = [root / "JPEGImages" / f"{name}.jpg" for name in names]
        return Source(files, torch.tensor(columns).T.contiguous(), list(VOC_CLASSES), str(root))


def _source(files: list[Path], labels: list[int], classes: list[str], where: Path) -> Source:
    if not files:
        raise InputError(f"{where} holds no images")
    if min(labels) < 0 or max(labels) >= len(classes):
        raise InputError(f"{where} has labels outside its {len(classes)} classes")
    return Source(files, torch.tensor(labels), classes, str(where))


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _pairs(path: Path) -> dict[str, str]:
    """Return the lines ``key value`` of a text file."""
    return dict(line.split(maxsplit=1) for line in _lines(path))
