"""Outlines: polygons and run lengths mean, to pycocotools, the mask that they were made from."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from data.shapes.outlines import outlines, run_lengths, simplified


def _raster(polygons, height, width):
    rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return coco_mask.decode(rle).astype(bool)


def test_outline_of_a_rectangle_is_its_four_corners():
    mask = np.zeros((40, 60), bool)
    mask[8:20, 10:50] = True
    (polygon,) = outlines(mask, 2)
    corners = {(polygon[k], polygon[k + 1]) for k in range(0, len(polygon), 2)}
    assert corners == {(5.0, 4.0), (25.0, 4.0), (25.0, 10.0), (5.0, 10.0)}
    assert outlines(np.zeros((9, 9), bool)) == []


def test_outlines_leave_holes_out_and_keep_separate_parts():
    mask = np.zeros((80, 80), bool)
    mask[10:70, 10:60] = True
    mask[24:50, 20:44] = False  # a hole
    mask[30:40, 26:36] = True  # an island in it
    mask[20:50, 68:78] = True  # a part apart
    again = _raster(outlines(mask), 80, 80)
    assert (again != mask).sum() <= 8  # at inner corners, of 2.9 thousand pixels
    assert not again[25:30, 21:43].any()
    assert again[31:39, 27:35].all()
    assert np.array_equal(_raster(outlines(mask, 2), 40, 40), mask[::2, ::2])


@pytest.mark.parametrize("seed", range(6))
def test_outlines_of_blobs_are_within_a_pixel_of_them(seed):
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:90, :90]
    mask = np.zeros((90, 90), bool)
    for _ in range(5):
        cx, cy, a, b = (
            generator.uniform(15, 75),
            generator.uniform(15, 75),
            *generator.uniform(5, 20, 2),
        )
        mask |= ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1
    mask &= (x - 45) ** 2 + (y - 45) ** 2 > 80
    again = _raster(outlines(mask), 90, 90)
    near = np.zeros_like(mask)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            near |= np.roll(mask, (dy, dx), (0, 1)) != mask
    assert not ((again != mask) & ~near).any()
    assert (again != mask).sum() < 0.12 * mask.sum()


def test_simplified_passes_within_its_tolerance_of_every_point_and_drops_most():
    angles = np.arange(400) * 2 * np.pi / 400
    circle = np.stack([200 + 150 * np.cos(angles), 200 + 150 * np.sin(angles)], 1).round()
    corners = simplified(circle.astype(int), 2)
    assert 3 <= len(corners) < 60
    ring = np.concatenate([corners, corners[:1]]).astype(float)
    for point in circle:
        chords = ring[1:] - ring[:-1]
        along = ((point - ring[:-1]) * chords).sum(1) / (chords**2).sum(1)
        nearest = ring[:-1] + np.clip(along, 0, 1)[:, None] * chords
        assert np.sqrt(((point - nearest) ** 2).sum(1)).min() <= 2.01


def test_simplified_keeps_a_sliver_a_polygon():
    assert len(simplified(np.array([(0, 0), (40, 0), (40, 1), (0, 1)]), 2)) == 3
    corners = simplified(np.array([(0, 0), (9, 0), (9, 9), (0, 9)]), 2)
    assert sorted(map(tuple, corners.tolist())) == [(0, 0), (0, 9), (9, 0), (9, 9)]


@pytest.mark.parametrize("density", [0.0, 0.2, 0.7, 1.0])
def test_run_lengths_are_those_of_pycocotools(density):
    mask = np.random.default_rng(0).random((13, 17)) < density
    segmentation = {"size": [13, 17], "counts": run_lengths(mask)}
    rle = coco_mask.frPyObjects(segmentation, 13, 17)
    assert np.array_equal(coco_mask.decode(rle).astype(bool), mask)
    assert sum(segmentation["counts"]) == 13 * 17
