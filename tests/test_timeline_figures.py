"""Figures checked by the numbers they hold, not by their pixels."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex

from core.config import InputError
from core.results import ResultRow
from report.figures import inline_svg, styles
from report.timeline import axis, correlation, gather, paths, scatter, series, summaries, to_csv
from report.timeline_figures import NamedFigure, draw, save_timeline_figures, timeline_figures

EPOCHS = (0, 10, 20, 30)


def row(
    init: str, seed: int, epoch: int, metric: str, value: float, dataset: str, split: str
) -> ResultRow:
    details = {"role": "source" if dataset == "src" else "target"}
    details |= {"boundary": 20} if init == "ctc" else {"boundary": None}
    unit = "nat" if metric.startswith("mi") else "%"
    return ResultRow(
        "analysis", "tiny", dataset, split, metric, value, unit, init, seed, epoch,
        weights=f"{init}{seed}{epoch}", details=details,
    )  # fmt: skip


def value(init: str, seed: int, epoch: int, metric: str, dataset: str) -> float:
    """A made-up number that tells its row from all others."""
    return (
        (100 if init == "ctc" else 0)
        + 3 * seed
        + epoch
        + {"recall@1": 0.1, "nmi": 0.2, "linear/top1": 0.3, "mi_xt": 0.4, "mi_ty": 0.5}[metric]
        + (0.05 if dataset == "src" else 0)
    )


def rows(
    inits: tuple[str, ...] = ("ctc", "ce"), seeds: tuple[int, ...] = (0, 1)
) -> list[ResultRow]:
    found = []
    for init in inits:
        for seed in seeds:
            for epoch in EPOCHS:
                for metric, dataset, split in (
                    ("recall@1", "src", "train"), ("recall@1", "src", "test"),
                    ("nmi", "src", "train"), ("linear/top1", "src", "train"),
                    ("linear/top1", "tgt", "train"), ("linear/top1", "tgt", "test"),
                    ("mi_xt", "src", "all"), ("mi_xt", "tgt", "all"),
                    ("mi_ty", "src", "all"), ("mi_ty", "tgt", "all"),
                ):  # fmt: skip
                    number = value(init, seed, epoch, metric, dataset)
                    number += 7.0 if split == "train" and dataset == "tgt" else 0.0
                    found.append(row(init, seed, epoch, metric, number, dataset, split))
    return found


def drawn(name: str, found: list[ResultRow]) -> NamedFigure:
    return next(one for one in timeline_figures(found) if one.name == name)


def lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def test_series_is_mean_and_std_over_seeds_by_epoch() -> None:
    band = series(gather(rows())["tiny"], "ce", "linear/top1", "tgt")
    assert band.epochs == list(EPOCHS)
    assert band.seeds == [0, 1]
    assert band.mean == pytest.approx([epoch + 1.5 + 0.3 for epoch in EPOCHS])  # test, not train
    assert band.std == pytest.approx([3 / math.sqrt(2)] * 4)


def test_epochs_that_a_seed_lacks_are_left_out_of_the_mean() -> None:
    found = [r for r in rows() if not (r.seed == 1 and r.epoch == 20)]
    assert series(gather(found)["tiny"], "ce", "mi_xt", "tgt").epochs == [0, 10, 30]


def test_the_newest_of_two_rows_counts_and_protocols_stay_apart() -> None:
    found = rows(("ce",), (0,))
    again = row("ce", 0, 10, "mi_xt", 55.0, "tgt", "all")
    other = ResultRow(**{**vars(again), "protocol": "other", "value": -1.0})
    data = gather([*found, again, other])
    assert series(data["tiny"], "ce", "mi_xt", "tgt").mean[1] == 55.0
    assert series(data["other"], "ce", "mi_xt", "tgt").mean == [-1.0]
    names = [one.name for one in timeline_figures([*found, again, other])]
    assert "tiny_tradeoff_ce" in names
    assert len(set(names)) == len(names)


def test_a_quick_look_with_other_settings_at_some_epochs_leaves_the_curve_as_it_is() -> None:
    found = rows(("ce",))
    quick = [
        dataclasses.replace(one, config="other", value=0.0, time="2030")
        for one in found
        if one.metric == "linear/top1" and one.epoch in (0, 20)
    ]
    before = series(gather(found)["tiny"], "ce", "linear/top1", "tgt")
    data = gather([*found, *quick])["tiny"]
    assert series(data, "ce", "linear/top1", "tgt") == before
    assert data.notes[0] == (
        "linear probe, top-1 (%) on src, train: 4 rows of other settings, data or versions are "
        "left out."
    )
    again = [dataclasses.replace(one, config="other", value=1.0, time="2030") for one in found]
    data = gather([*found, *again])["tiny"]  # all of it measured anew: the newest counts
    assert series(data, "ce", "linear/top1", "tgt").mean == [1.0] * 4


def test_points_of_unknown_identity_never_join_a_curve_of_known_ones() -> None:
    found = rows(("ce",))
    old = [dataclasses.replace(one, schema=1, seed=7, value=99.0) for one in found]
    data = gather([*found, *old])["tiny"]
    assert series(data, "ce", "recall@1", "src", "train").seeds == [0, 1]
    (alone,) = gather(old).values()
    assert series(alone, "ce", "recall@1", "src", "train").mean == [99.0] * 4
    assert alone.notes[-1].startswith("Unknown identity")


def test_a_timeline_says_how_many_probes_chose_at_the_edge_of_the_grid() -> None:
    edge = {"role": "target", "at_grid_edge": True, "converged": False}
    found = [
        dataclasses.replace(one, details=edge) if one.epoch == 10 else one
        for one in rows(("ce",), (0,))
        if one.metric == "linear/top1" and one.dataset == "tgt"
    ]
    notes = gather(found)["tiny"].notes
    assert notes[0].startswith("1 of 1 linear probes chose C at the edge")
    assert notes[1] == "1 of 1 linear probes ended before they converged."


def test_tradeoff_has_discriminability_left_transferability_right_and_the_boundary() -> None:
    left, right = drawn("tradeoff_ctc", rows()).figure.axes
    assert lines(left)["← Recall@1"].get_ydata() == pytest.approx([e + 101.65 for e in EPOCHS])
    assert lines(left)["← NMI × 100"].get_ydata() == pytest.approx(
        [100 * (e + 101.75) for e in EPOCHS]
    )
    assert list(lines(right)) == ["tgt →"]
    assert lines(right)["tgt →"].get_ydata() == pytest.approx([e + 101.8 for e in EPOCHS])
    assert lines(left)["start of stage 2"].get_xdata() == [20, 20]
    assert left.get_ylabel() == "Recall@1 (%), NMI × 100"
    assert "top-1 (%)" in right.get_ylabel()
    assert left.get_xlabel() == "epoch"
    assert "start of stage 2" not in lines(drawn("tradeoff_ce", rows()).figure.axes[0])


def test_information_shows_source_and_target_in_nats() -> None:
    top, bottom = drawn("information_ce", rows()).figure.axes
    assert (top.get_ylabel(), bottom.get_ylabel()) == ("I(X;T) (nat)", "I(T;Y) (nat)")
    assert set(lines(top)) == {"src (source)", "tgt (target)"}
    assert lines(bottom)["tgt (target)"].get_ydata() == pytest.approx([e + 2.0 for e in EPOCHS])


def test_plane_pairs_both_informations_of_an_epoch_and_colours_by_it() -> None:
    data = gather(rows())["tiny"]
    assert paths(data, "ce", "tgt") == [
        (e, pytest.approx(e + 1.9), pytest.approx(e + 2.0)) for e in EPOCHS
    ]
    source, target, bar = drawn("plane", rows()).figure.axes
    assert (source.get_title("left"), target.get_title("left")) == ("src (source)", "tgt (target)")
    assert bar.get_ylabel() == "epoch"
    ce, ctc = target.collections
    assert ce.get_array().tolist() == list(EPOCHS)
    assert ctc.get_offsets()[0].tolist() == pytest.approx([101.9, 102.0])
    assert (target.get_xlabel(), target.get_ylabel()) == ("I(X;T) (nat)", "I(T;Y) (nat)")


def test_methods_are_compared_with_bands_over_seeds() -> None:
    probe, xt, ty = drawn("compared_tgt", rows()).figure.axes
    assert xt.get_ylabel() == "I(X;T) (nat)"
    assert ty.get_ylabel() == "I(T;Y) (nat)"
    assert list(lines(probe)) == ["ce", "ctc", "start of stage 2"]
    source = drawn("compared_src", rows()).figure.axes
    assert [axes.get_ylabel() for axes in source][:2] == ["Recall@1 (%)", "NMI (0…1)"]
    band = probe.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0 + 1.8 - 3 / math.sqrt(2))
    assert band[:, 1].max() == pytest.approx(30 + 1.8 + 3 / math.sqrt(2))
    assert "ce 2, ctc 2" in drawn("compared_tgt", rows()).description
    assert not any("compared" in one.name for one in timeline_figures(rows(("ce",))))


def test_methods_differ_in_colour_and_in_dash_or_marker() -> None:
    found = lines(drawn("compared_tgt", rows()).figure.axes[0])
    assert to_hex(found["ce"].get_color()) != to_hex(found["ctc"].get_color())
    assert found["ce"].get_marker() != found["ctc"].get_marker()


def test_correlation_takes_every_checkpoint_but_the_untrained() -> None:
    data = gather(rows())["tiny"]
    points = scatter(data, "ce", "tgt")
    assert len(points) == 2 * 3
    assert min(points) == (pytest.approx(10.4), pytest.approx(10.3))
    assert "r = 1.00 (n = 12)" in drawn("correlation", rows()).description
    assert correlation([(0.0, 1.0), (1.0, 0.0), (2.0, -1.0)]) == pytest.approx(-1.0)
    assert correlation([(0.0, 1.0), (1.0, 0.0)]) is None
    assert correlation([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]) is None


def test_figures_fit_one_column_and_are_written_in_both_formats(tmp_path: Path) -> None:
    found = timeline_figures(rows())
    assert [one.name for one in found] == [
        "tradeoff_ce", "tradeoff_ctc", "compared_src", "compared_tgt",
        "information_ce", "information_ctc", "plane", "correlation",
    ]  # fmt: skip
    assert all(one.figure.get_figwidth() <= 3.5 for one in found)
    few = [r for r in rows(("ce",), (0,)) if r.metric in ("recall@1", "linear/top1")]
    written = save_timeline_figures(few, tmp_path)
    assert sorted(path.name for path in written) == ["tradeoff_ce.png", "tradeoff_ce.svg"]
    assert all(path.stat().st_size > 1000 for path in written)


def test_other_estimators_have_figures_of_their_own() -> None:
    """Also where MINE is not there at all."""
    informations = [r for r in rows() if r.metric.startswith("mi_")]
    others = [
        dataclasses.replace(r, metric=f"{r.metric}/infonce", value=(r.value or 0) - 1)
        for r in informations
    ]
    names = {one.name for one in timeline_figures([*rows(), *others])}
    kinds = ("information_ce", "information_ctc", "plane", "correlation")
    assert names >= {*kinds, *(f"{kind}_infonce" for kind in kinds), "companions_tgt"}
    panels = drawn("companions_tgt", [*rows(), *others]).figure.axes
    assert panels[0].get_ylabel() == axis("mi_xt/infonce") == "I(X;T) InfoNCE (nat)"
    assert lines(panels[0])["ce"].get_ydata() == pytest.approx([e + 0.9 for e in EPOCHS])
    alone = [r for r in rows() if r not in informations] + others
    assert "plane_infonce" in {one.name for one in timeline_figures(alone)}
    assert drawn("compared_tgt", alone).figure.axes[1].get_ylabel() == "I(X;T) InfoNCE (nat)"
    assert "by InfoNCE" in drawn("correlation_infonce", alone).description


def test_correlation_is_also_told_within_each_method() -> None:
    """Two methods that differ in both can agree with a law that neither follows."""
    found = [r for r in rows() if r.metric != "linear/top1" or r.split == "train"]
    for init, base in (("ce", 0.0), ("ctc", 100.0)):
        for seed in (0, 1):
            for epoch in EPOCHS:
                value = base - 0.3 * epoch - 3 * seed * 0.3
                found.append(row(init, seed, epoch, "linear/top1", value, "tgt", "test"))
    said = drawn("correlation", found).description
    assert re.search(r"tgt: r = 0\.\d\d \(n = 12\), within ce −1\.00, ctc −1\.00", said)


def test_a_course_tells_the_highest_mean_and_the_way_to_the_end_paired_by_seed() -> None:
    heights = {0: [1.0, 5.0, 4.0], 1: [3.0, 6.0, 3.0]}  # by seed, at epochs 0, 10, 20
    found = [
        row("ce", seed, epoch, "linear/top1", value, "tgt", "test")
        for seed, values in heights.items()
        for epoch, value in zip(EPOCHS, values, strict=False)
    ]
    found.append(row("random", 0, 0, "linear/top1", 9.0, "tgt", "test"))  # of one epoch: no course
    (course,) = summaries(gather(found)["tiny"])
    half = math.sqrt(0.5)
    assert (course.init, course.dataset, course.split) == ("ce", "tgt", "test")
    assert course.seeds == [0, 1]
    assert course.highest == (10, 5.5, pytest.approx(half))
    assert course.last == (20, 3.5, pytest.approx(half))
    assert course.change == (-2.0, pytest.approx(2 * half))  # −1 and −3
    text = to_csv(gather(found)).splitlines()
    assert text[0] == "protocol,dataset,role,split,metric,init,epoch,mean,std,seeds"
    assert "tiny,tgt,target,test,linear/top1,random,0,9.0,0.0,0" in text
    assert len(text) == 1 + 3 + 1


def test_order_labels_and_looks_can_be_those_of_a_page() -> None:
    style = styles(["random", "ctc", "ce"])
    data = gather(rows(), list(style), {"ctc": "CTC (ours)"})["tiny"]
    assert data.inits == ["ctc", "ce"]
    (found,) = (one for one in draw(data, style) if one.name == "compared_tgt")
    line = lines(found.figure.axes[0])["CTC (ours)"]
    assert line.get_color() == style["ctc"].colour
    assert "CTC (ours) 2, ce 2" in found.description


def test_one_epoch_is_no_line() -> None:
    """An untrained network beside the others is a point in their figures, and has none alone."""
    alone = [dataclasses.replace(r, init="random") for r in rows(("ce",)) if r.epoch == 0]
    names = {one.name for one in timeline_figures([*rows(), *alone])}
    assert "tradeoff_random" not in names
    assert "information_random" not in names
    assert lines(drawn("compared_tgt", [*rows(), *alone]).figure.axes[0])["random"] is not None
    assert [one.name for one in timeline_figures(alone)] == ["plane"]


def test_no_rows_is_said() -> None:
    with pytest.raises(InputError, match="no rows of step analysis"):
        timeline_figures([])


def test_figures_stand_in_a_page_without_outside_addresses() -> None:
    one = drawn("plane", rows(("ce",), (0,)))
    svg = inline_svg(one.figure, one.name, one.description)
    assert svg.startswith("<svg")
    assert "http" not in svg
    assert "coloured by epoch" in svg
