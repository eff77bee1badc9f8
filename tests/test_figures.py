"""Figures: what is thinned keeps its level, what is drawn is told apart without colour."""

import re

import matplotlib
import numpy as np
import pytest

from core.results import ResultRow
from report.figures import (
    PALETTE,
    curves_figure,
    inline_svg,
    save_figure,
    styles,
    thinned,
    trials_figure,
)  # fmt: skip
from report.tables import build_tables


def test_thinning_keeps_short_curves_and_the_mean_of_long_ones():
    short = [(float(n), float(n)) for n in range(5)]
    assert thinned(short, 5) == short
    long = [(float(n), float(n % 7)) for n in range(1000)]
    thin = thinned(long, 50)
    assert len(thin) == 50
    assert np.mean([y for _, y in thin]) == pytest.approx(np.mean([y for _, y in long]))
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)


def test_every_point_of_an_uneven_curve_counts_once():
    curve = [(float(n), 1.0) for n in range(103)]
    edges = [round(n * 103 / 10) for n in range(11)]
    assert edges[-1] == 103
    assert thinned(curve, 10)[-1][0] == np.mean([float(n) for n in range(edges[-2], 103)])


def test_initialisations_differ_in_colour_and_also_in_dash_and_marker():
    looks = list(styles([f"i{n}" for n in range(6)]).values())
    assert len({look.colour for look in looks}) == 6
    assert len({look.dashes for look in looks}) == 6
    assert len({look.marker for look in looks}) == 6
    many = list(styles([f"i{n}" for n in range(12)]).values())
    assert len({(look.colour, look.dashes) for look in many}) == 12


def _luminance(colour: str) -> float:
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("paper", ["#fdfdfc", "#141618"])
def test_the_first_three_colours_stand_out_on_light_and_dark_paper(paper):
    for colour in PALETTE[:3]:
        light, dark = sorted((_luminance(colour), _luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3.0  # WCAG 2.1, graphical objects


def test_names_are_text_not_mathematics_nor_markup():
    style = styles(["a"])
    figure = curves_figure([("a", [(0, 1.0), (1, 2.0)])], style, "loss_$x$ <b>")
    svg = inline_svg(figure, "f", 'say "<hi>"')
    assert "loss_$x$ &lt;b&gt;" in svg
    assert 'aria-label="say &quot;&lt;hi>&quot;"' in svg
    assert not re.search(r"https?://", svg)


def test_global_settings_stay_as_they_were(tmp_path):
    before = dict(matplotlib.rcParams)
    figure = curves_figure([("a", [(0, 1.0), (1, 2.0)])], styles(["a"]), "t")
    paths = save_figure(figure, tmp_path, "t")
    assert [path.suffix for path in paths] == [".png", ".svg"]
    assert paths[0].read_bytes()[1:4] == b"PNG"
    assert dict(matplotlib.rcParams) == before


def test_the_same_figure_is_the_same_file(tmp_path):
    for name in ("one", "two"):
        figure = curves_figure([("a", [(0, 1.0), (1, 2.0)])], styles(["a"]), "t")
        save_figure(figure, tmp_path, name)
    for suffix in (".png", ".svg"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_every_trial_is_a_mark_of_its_own():
    row = ResultRow(
        step="detection", protocol="p", dataset="d", split="val", metric="bbox/AP", value=1.0,
        unit="%", init="ce", seed=1, weights="a",
    )  # fmt: skip
    rows = [row, ResultRow(**{**vars(row), "seed": 2, "value": 3.0, "weights": "b"})]
    (table,) = build_tables(rows)
    axes = trials_figure(table, "bbox/AP", styles(["ce"])).axes[0]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [[1.0, 3.0]]
