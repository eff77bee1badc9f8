"""The embedded classification set: fixed, balanced, and neither trivial nor leaking."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np

from data.shapes import images as shapes

ROOT = Path(__file__).resolve().parent.parent
FIRST = tuple(range(40))


def test_labels_are_balanced_in_every_split():
    for split, count in shapes.COUNTS.items():
        counts = np.bincount(shapes.labels(split), minlength=len(shapes.CLASSES))
        assert counts.sum() == count
        assert counts.max() - counts.min() <= 1


def test_an_image_does_not_depend_on_which_others_are_drawn():
    whole = shapes.images("val", 48, FIRST)
    few = shapes.images("val", 48, (31, 4))
    assert np.array_equal(few, whole[[31, 4]])


def test_splits_and_images_are_all_different():
    digests = {
        hashlib.sha256(image.tobytes()).digest()
        for split in shapes.COUNTS
        for image in shapes.images(split, 32, FIRST)
    }
    assert len(digests) == 3 * len(FIRST)


def test_the_set_is_the_same_on_every_machine():
    """The pixels are integers throughout, so one digest holds for every platform and version.

    It is written down here: should it ever change, results on ``shapes`` are on other data.
    """
    digest = hashlib.sha256(shapes.images("train", 64, FIRST).tobytes())
    digest.update(shapes.labels("train").astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "6a1a7beff191dc30"


def test_another_process_with_other_threads_draws_the_same():
    code = (
        "import cv2, hashlib; cv2.setNumThreads(3)\n"
        "from data.shapes import images as shapes\n"
        "print(hashlib.sha256(shapes.images('test', 40, (3, 9)).tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    here = hashlib.sha256(shapes.images("test", 40, (3, 9)).tobytes()).hexdigest()
    assert other.stdout.strip() == here, other.stderr


def test_class_means_of_pixels_and_of_colours_hardly_tell_the_classes_apart():
    """Not trivially solved: a nearest-mean rule on pixels stays close to chance (5%)."""
    count = 600
    train = shapes.images("train", 32, tuple(range(count))).reshape(count, -1) / 255.0
    held = shapes.images("val", 32, tuple(range(300))).reshape(300, -1) / 255.0
    labels = shapes.labels("train")[:count]
    means = np.stack([train[labels == k].mean(0) for k in range(len(shapes.CLASSES))])
    nearest = ((held[:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == shapes.labels("val")[:300]).mean() < 0.2


def test_textures_are_told_apart_by_edges_so_labels_mean_something():
    """Plain objects have the fewest edges: the texture in the class name is in the picture."""
    pictures = shapes.images("train", 64, tuple(range(800))).astype(int)
    edges = np.abs(np.diff(pictures, axis=2)).mean((1, 2, 3))
    texture = shapes.labels("train")[:800] % 4
    means = [np.median(edges[texture == k]) for k in range(4)]
    assert means[0] < 0.9 * min(means[1:])


def test_classes_of_the_detection_set_are_other_classes():
    assert not {name.split("_")[1] for name in shapes.CLASSES} & set(shapes.DETECTION_CLASSES)
    assert len(set(shapes.CLASSES)) == 20
