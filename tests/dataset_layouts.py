"""Tiny copies of the catalogue's data sets: the official lay-outs, with a few flat images.

Every image of class k has the red value ``red(k)``, so that a label can be read off its picture.
Each builder fills a folder and returns the labels of each split, in the order of its listing.
"""

import json
import pickle
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

Labels = dict[str, list[int]]


def red(label: int) -> int:
    return 10 + 20 * label


def picture(path: Path, label: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 32), (red(label), 90, 60)).save(path)


def text(path: Path, *lines: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def cub200(root: Path) -> Labels:
    base = root / "CUB_200_2011"
    labels, train = [0, 0, 1, 2, 2, 1], [1, 0, 1, 1, 0, 0]
    names = [f"{k + 1:03}.Bird_{k}/Bird_{i}.jpg" for i, k in enumerate(labels)]
    for name, label in zip(names, labels):
        picture(base / "images" / name, label)
    text(base / "images.txt", *(f"{i} {name}" for i, name in enumerate(names, 1)))
    text(base / "image_class_labels.txt", *(f"{i} {k + 1}" for i, k in enumerate(labels, 1)))
    text(base / "train_test_split.txt", *(f"{i} {t}" for i, t in enumerate(train, 1)))
    text(base / "classes.txt", *(f"{k + 1} {k + 1:03}.Bird_{k}" for k in range(3)))
    return {"train": [0, 1, 2], "test": [0, 2, 1]}


def aircraft(root: Path) -> Labels:
    data = root / "fgvc-aircraft-2013b" / "data"
    text(data / "variants.txt", "707-320", "BAE 146-200", "F/A-18")
    variants = ["707-320", "BAE 146-200", "F/A-18"]
    splits = {"train": [2, 0, 1], "val": [1, 2], "test": [0, 1, 2]}
    for s, (split, labels) in enumerate(splits.items()):
        for i, label in enumerate(labels):
            picture(data / "images" / f"{s}00{i}.jpg", label)
        lines = [f"{s}00{i} {variants[label]}" for i, label in enumerate(labels)]
        text(data / f"images_variant_{split}.txt", *lines)
    return splits


def cars(root: Path) -> Labels:
    base = root / "stanford_cars"
    splits = {"train": [0, 2, 1], "test": [1, 0]}
    (base / "devkit").mkdir(parents=True)
    kind = [("fname", "O"), ("class", "O")]
    for split, labels in splits.items():
        entries = np.array([(f"{i:05}.jpg", k + 1) for i, k in enumerate(labels)], dtype=kind)
        where = "devkit/cars_train_annos" if split == "train" else "cars_test_annos_withlabels"
        scipy.io.savemat(base / f"{where}.mat", {"annotations": entries})
        for i, label in enumerate(labels):
            picture(base / f"cars_{split}" / f"{i:05}.jpg", label)
    names = np.array(["Audi S4", "BMW M3", "Fiat 500"], dtype=object)
    scipy.io.savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    return splits


def flowers102(root: Path) -> Labels:
    base, labels = root / "flowers-102", [2, 0, 1, 1, 0, 2, 0]
    for i, label in enumerate(labels, 1):
        picture(base / "jpg" / f"image_{i:05}.jpg", label)
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array(labels) + 1})
    ids = {"trnid": [1, 2, 3], "valid": [5, 4], "tstid": [7, 6]}
    scipy.io.savemat(base / "setid.mat", ids)
    return {"train": [2, 0, 1], "val": [0, 1], "test": [0, 2]}


def pets(root: Path) -> Labels:
    breeds = ["Abyssinian", "american_bulldog", "Bengal"]
    splits = {"train": [0, 1, 2, 1], "test": [2, 1, 0]}
    for split, labels in splits.items():
        lines = []
        for i, label in enumerate(labels):
            name = f"{breeds[label]}_{split}{i}".replace(
                f"_{split}", "_1" if split == "train" else "_2"
            )
            picture(root / "images" / f"{name}.jpg", label)
            lines.append(f"{name} {label + 1} 1 {label}")
        text(root / "annotations" / f"{'trainval' if split == 'train' else split}.txt", *lines)
    return splits


def dtd(root: Path) -> Labels:
    textures = ["banded", "dotted", "woven"]
    splits = {"train": [0, 1, 2, 1], "val": [2, 0], "test": [1, 2]}
    for split, labels in splits.items():
        names = [f"{textures[k]}/{textures[k]}_{split}{i}.jpg" for i, k in enumerate(labels)]
        for name, label in zip(names, labels):
            picture(root / "dtd" / "images" / name, label)
        text(root / "dtd" / "labels" / f"{split}1.txt", *names)
    return splits


def food101(root: Path) -> Labels:
    base, dishes = root / "food-101", ["apple_pie", "bibimbap"]
    splits = {"train": [0, 0, 1], "test": [0, 1]}
    for split, labels in splits.items():
        listing: dict[str, list[str]] = {dish: [] for dish in dishes}
        for i, label in enumerate(labels):
            name = f"{dishes[label]}/{split}{i}"
            listing[dishes[label]].append(name)
            picture(base / "images" / f"{name}.jpg", label)
        text(base / "meta" / f"{split}.json", json.dumps(listing))
    return splits


def caltech101(root: Path) -> Labels:
    for label, name in enumerate(("BACKGROUND_Google", "accordion", "yin_yang")):
        for i in range(33):
            picture(root / "101_ObjectCategories" / name / f"image_{i:04}.jpg", label)
    text(root / "101_ObjectCategories" / "BACKGROUND_Google" / "tmp", "no image")
    return {"train": [0] * 30 + [1] * 30 + [2] * 30, "test": [0] * 3 + [1] * 3 + [2] * 3}


def cinic10(root: Path) -> Labels:
    for split in ("train", "valid", "test"):
        for label, name in enumerate(("airplane", "bird")):
            for i in range(2):
                picture(root / split / name / f"{i}.png", label)
    return {"train": [0, 0, 1, 1], "val": [0, 0, 1, 1], "test": [0, 0, 1, 1]}


def inat18(root: Path) -> Labels:
    categories = [{"id": k, "name": f"species {k}"} for k in (4, 9, 7)]
    label_of = {4: 0, 7: 1, 9: 2}
    splits = {"train": [9, 4, 7], "val": [7, 9]}
    for split, ids in splits.items():
        images = []
        for i, category in enumerate(ids):
            name = f"train_val2018/Aves/{category}/{split}{i}.jpg"
            picture(root / name, label_of[category])
            images.append({"id": 100 + i, "file_name": name})
        marks = [{"image_id": 100 + i, "category_id": c} for i, c in enumerate(ids)][::-1]
        content = {"images": images, "annotations": marks, "categories": categories}
        text(root / f"{split}2018.json", json.dumps(content))
    return {split: [label_of[c] for c in ids] for split, ids in splits.items()}


def places205(root: Path) -> Labels:
    scenes = ["a/abbey", "a/apartment_building/outdoor", "y/yard"]
    splits = {"train": [0, 1, 2, 1], "val": [2, 0, 1]}
    for split, labels in splits.items():
        names = [f"{scenes[k]}/{split} {i}.jpg" for i, k in enumerate(labels)]
        for name, label in zip(names, labels):
            picture(root / "images256" / name, label)
        lines = [f"{name} {label}" for name, label in zip(names, labels)]
        text(root / f"{split}_places205.csv", *lines)
    return splits


def imagenet(root: Path) -> Labels:
    for split in ("train", "val"):
        for label, name in enumerate(("n01440764", "n01443537")):
            for i in range(2):
                picture(root / split / name / f"{name}_{i}.JPEG", label)
    return {"train": [0, 0, 1, 1], "val": [0, 0, 1, 1]}


def _flat(labels: list[int], side: int) -> np.ndarray:
    """Images of those classes, N×3×side×side."""
    images = np.full((len(labels), 3, side, side), 60, np.uint8)
    images[:, 0] = np.array([red(label) for label in labels])[:, None, None]
    return images


def cifar10(root: Path) -> Labels:
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    batches = {f"data_batch_{i}": [i % 3, (i + 1) % 3] for i in range(1, 6)}
    for name, labels in {**batches, "test_batch": [2, 1]}.items():
        content = {"data": _flat(labels, 32).reshape(len(labels), -1), "labels": labels}
        (base / name).write_bytes(pickle.dumps(content))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog", "eel"]}))
    return {"train": sum(batches.values(), []), "test": [2, 1]}  # noqa: RUF017


def cifar100(root: Path) -> Labels:
    base, splits = root / "cifar-100-python", {"train": [0, 2, 1], "test": [1, 2]}
    base.mkdir(parents=True)
    for name, labels in splits.items():
        pixels = _flat(labels, 32).reshape(len(labels), -1)
        content = {"data": pixels, "fine_labels": labels, "coarse_labels": [9] * len(labels)}
        (base / name).write_bytes(pickle.dumps(content))
    names = {"fine_label_names": ["a", "b", "c"], "coarse_label_names": ["x"]}
    (base / "meta").write_bytes(pickle.dumps(names))
    return splits


def stl10(root: Path) -> Labels:
    base, splits = root / "stl10_binary", {"train": [0, 1, 2], "test": [2, 0]}
    base.mkdir(parents=True)
    for split, labels in splits.items():
        _flat(labels, 96).transpose(0, 1, 3, 2).tofile(base / f"{split}_X.bin")  # column-major
        (np.array(labels, np.uint8) + 1).tofile(base / f"{split}_y.bin")
    text(base / "class_names.txt", "airplane", "bird", "car")
    text(base / "fold_indices.txt")
    return splits


def svhn(root: Path) -> Labels:
    root.mkdir(parents=True, exist_ok=True)
    splits = {"train": [0, 3, 2, 3], "test": [1, 0]}
    for split, labels in splits.items():
        digits = np.array([label or 10 for label in labels])[:, None]  # the digit 0 is called 10
        content = {"X": _flat(labels, 32).transpose(2, 3, 1, 0), "y": digits}
        scipy.io.savemat(root / f"{split}_32x32.mat", content)
    return splits


BUILDERS = {
    builder.__name__: builder
    for builder in (
        cub200, aircraft, cars, flowers102, pets, dtd, food101, caltech101, cinic10, inat18,
        places205, imagenet, cifar10, cifar100, stl10, svhn,
    )
}  # fmt: skip


def voc07(root: Path) -> dict[str, list[list[int]]]:
    """VOC has several labels an image: classes 0 (aeroplane) and 19 (tvmonitor) occur here."""
    from data.readers.listed import VOC_CLASSES

    base = root / "VOCdevkit" / "VOC2007"
    marks = {"train": [(1, -1), (-1, 1)], "val": [(1, 1)], "test": [(1, 0), (-1, 1), (1, -1)]}
    shown = {1: 1, -1: 0, 0: -1}
    splits = {}
    for split, pairs in marks.items():
        names = [f"{split}_{i:04}" for i in range(len(pairs))]
        for name in names:
            picture(base / "JPEGImages" / f"{name}.jpg", 3)
        main = base / "ImageSets" / "Main"
        text(main / f"{split}.txt", *names)
        for k, voc_class in enumerate(VOC_CLASSES):
            place = {0: 0, 19: 1}.get(k)
            values = [-1 if place is None else pair[place] for pair in pairs]
            lines = [f"{name} {value:2d}" for name, value in zip(names, values)]
            text(main / f"{voc_class}_{split}.txt", *lines)
        splits[split] = [[shown[p[0]], *[0] * 18, shown[p[1]]] for p in pairs]
    return splits
