"""Drawing: polygons, textures and the final reduction do what geometry says, in integers."""

import math

import cv2
import numpy as np
import pytest

from core.seeds import Dice
from data.shapes import drawing
from data.shapes.drawing import FINE, SUB, TEXTURES, TURN, UNIT, Canvas


def _window(size):
    return slice(0, size), slice(0, size)


@pytest.mark.parametrize("angle", [0, 17, 64, 100, 200])
@pytest.mark.parametrize("aspect", [12, 16, 21])
def test_placed_silhouette_is_the_rotated_and_stretched_one(angle, aspect):
    points = np.array([(-1024, -512), (1024, -512), (1024, 512), (0, 900)])
    placed = drawing.place(points, (100, 60), 40, aspect, angle)
    turn = 2 * math.pi * angle / TURN
    stretched = points * np.array([aspect / 16, (256 // aspect) / 16]) * 40 / UNIT
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    expected = stretched @ rotation + (100, 60)
    assert np.abs(placed / 2**SUB - expected).max() < 0.2  # fine pixels


@pytest.mark.parametrize("corners", [3, 5, 12])
def test_filled_pixels_are_those_whose_centres_lie_inside(corners):
    star = drawing.radial([UNIT, UNIT // 2] * corners)
    polygon = drawing.place(star, (50, 40), 27, 14, 9)
    mask, rows, columns = drawing.filled(polygon, 90, 100)
    whole = np.zeros((90, 100), bool)
    whole[rows, columns] = mask
    contour = (polygon / 2**SUB).astype(np.float32)
    for y in range(90):
        for x in range(100):
            distance = cv2.pointPolygonTest(contour, (x, y), True)
            if abs(distance) > 1e-3:
                assert whole[y, x] == (distance > 0)


def test_abutting_polygons_share_no_pixel_and_leave_no_gap():
    left = np.array([(0, 0), (331, 0), (205, 640), (0, 640)])
    right = np.array([(331, 0), (640, 0), (640, 640), (205, 640)])
    total = np.zeros((40, 40), int)
    for polygon in (left, right):
        mask, rows, columns = drawing.filled(polygon, 40, 40)
        total[rows, columns] += mask
    assert (total == 1).all()


def test_filled_outside_the_canvas_is_empty_and_at_its_border_is_cut():
    ball = drawing.radial([UNIT] * 32)
    mask, _, _ = drawing.filled(drawing.place(ball, (-60, 20), 20, 16, 0), 64, 64)
    assert not mask.any()
    mask, rows, columns = drawing.filled(drawing.place(ball, (0, 20), 20, 16, 0), 64, 64)
    assert columns.start == 0
    assert mask.shape == (rows.stop - rows.start, columns.stop - columns.start)
    assert abs(mask.sum() - math.pi * 20**2 / 2) < 0.06 * mask.sum()


def test_border_is_what_lies_within_its_width_of_the_outside():
    canvas = Canvas(np.zeros((40, 40, 3), np.uint8))
    square = np.array([(-20, 10), (20, 10), (20, 30), (-20, 30)]) << SUB  # cut off at the left
    mask, rows, columns = canvas.border(canvas.patch(square), 3)
    whole = np.zeros((40, 40), bool)
    whole[rows, columns] = mask
    expected = np.zeros((40, 40), bool)
    expected[10:30, 0:20] = True
    expected[13:27, 0:17] = False
    assert np.array_equal(whole, expected)


def test_bar_has_its_width_and_length():
    for end in ((300, 400), (-300, 400), (500, 0), (0, -500)):
        corners = drawing.bar((0, 0), end, 6)
        contour = corners.astype(np.float32) / 2**SUB
        assert abs(cv2.contourArea(contour) - 6 * 500 / 2**SUB) < 4


def test_stripes_run_along_one_axis_with_their_period():
    stripes = drawing.texture("striped", *_window(64), (0, 0), 0, 8)
    assert (stripes == stripes[:1]).all()
    assert stripes[0].tolist() == [0] * 8 + [1] * 8 + [0] * 8 + [1] * 8 + [0] * 8 + [1] * 8 + (
        [0] * 8 + [1] * 8
    )
    turned = drawing.texture("striped", *_window(64), (0, 0), TURN // 4, 8)
    assert (turned == turned[:, :1]).all()


@pytest.mark.parametrize("angle", [0, 23])
def test_checks_are_two_crossed_stripes(angle):
    where = (*_window(160), (5, 9))
    across = drawing.texture("striped", *where, angle, 10)
    along = drawing.texture("striped", *where, angle + TURN // 4, 10)
    assert np.array_equal(drawing.texture("checked", *where, angle, 10), across ^ along)


def test_dots_cover_their_share_and_plain_has_no_pattern():
    dots = drawing.texture("dotted", *_window(160), (0, 0), 31, 10)
    assert abs(dots.mean() - math.pi * 0.45 / 4) < 0.02
    assert not drawing.texture("plain", *_window(160), (0, 0), 31, 10).any()
    with pytest.raises(ValueError, match="striped"):
        drawing.texture("woven", *_window(160), (0, 0), 0, 10)


def test_light_rises_towards_its_direction():
    ramp = drawing.light(*_window(40), 0, 20).astype(int)
    assert (np.diff(ramp, axis=1) >= 0).all()
    assert ramp[0, -1] - ramp[0, 0] > drawing.LEVELS // 4
    assert (ramp == ramp[:1]).all()


def test_colour_pairs_differ_in_brightness():
    dice = Dice(2)
    for _ in range(200):
        first, second = drawing.colour_pair(dice, 60)
        assert abs(drawing.brightness(first) - drawing.brightness(second)) >= 60


@pytest.mark.parametrize("pattern", TEXTURES)
def test_paint_owns_exactly_the_pixels_that_it_changes_apart_from_the_shadow(pattern):
    before = np.full((120, 120, 3), 255, np.uint8)  # white: no ramp reaches it over a whole object
    canvas = Canvas(before.copy(), np.zeros((120, 120), np.int16))
    polygon = drawing.place(drawing.radial([UNIT] * 5), (60, 60), 30, 16, 3)
    colours = np.array([[10, 200, 30], [30, 20, 90]])
    drawing.paint(canvas, polygon, pattern, colours, Dice(6), 30, number=7)
    owned = canvas.owner == 7
    changed = (canvas.pixels != before).any(2)
    grey = (canvas.pixels == canvas.pixels[:, :, :1]).all(2)  # white, or white in shadow
    assert (owned == (changed & ~grey)).all()
    area = cv2.contourArea((polygon / 2**SUB).astype(np.float32))
    assert abs(owned.sum() - area) < 0.1 * area


def test_later_pieces_take_pixels_away_from_earlier_ones():
    canvas = Canvas(np.zeros((64, 64, 3), np.uint8), np.full((64, 64), 3, np.int16))
    for seed in range(8):
        drawing.clutter(canvas, Dice(seed), (32, 32), 12)
    assert (canvas.owner == 0).any()
    untouched = (canvas.pixels == 0).all(2)
    assert (canvas.owner[untouched] == 3).mean() > 0.95  # ink may be black


def test_develop_halves_by_the_rounded_mean_of_four():
    pixels = Dice(8).noise(40, 60, 3)
    dice = Dice(1)
    result = drawing.develop(Canvas(pixels), dice)
    assert result.shape == (40 // FINE, 60 // FINE, 3)
    blocks = pixels.reshape(20, 2, 30, 2, 3).astype(int)
    expected = (blocks.sum((1, 3)) + 2) // 4
    again = Dice(1)
    gain, lift = again.between(180, 290), again.between(-24, 24)
    exposed = np.clip((expected * gain >> 8) + lift, 0, 255)
    inner = (exposed > 8) & (exposed < 247)
    difference = (result.astype(int) - exposed)[inner]
    assert difference.min() >= -8
    assert difference.max() <= 7
    assert abs(difference.mean()) < 1
