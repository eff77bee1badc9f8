"""One table of several: hand-made rows of both steps, each number in its row and column."""

import csv
import dataclasses
from pathlib import Path

import pytest

from core.results import ResultRow
from report.formats import to_latex, to_markdown
from report.html import Page, write_report
from report.overview import overviews
from report.runs import read_run
from report.tables import Options, Table, build_tables

BASE = ResultRow(
    step="transfer", protocol="linear", dataset="cub200", split="test", metric="top1", value=0.0,
    unit="%", init="ce", seed=1, weights="w", code="a" * 40, time="2026-01-01T00:00:00",
)  # fmt: skip
OPTIONS = Options(order=("random", "ce", "ctc"), labels={"ctc": "CTC"})


def row(value: float, **changes: object) -> ResultRow:
    return dataclasses.replace(BASE, value=value, **changes)  # type: ignore[arg-type]


def box(value: float, **changes: object) -> ResultRow:
    place = {"step": "detection", "protocol": "mask_rcnn", "dataset": "coco", "split": "val"}
    return row(value, **{**place, "metric": "bbox/AP", **changes})


ROWS = [
    box(30.0), box(40.0, init="ctc"), box(41.0, init="ctc", metric="segm/AP"),
    box(50.0, metric="bbox/AP50"),
    row(60.0), row(61.0, init="ctc"), row(63.0, init="ctc", seed=2),
    row(80.0, protocol="finetune"), row(70.0, protocol="finetune", dataset="aircraft"),
    row(76.0, step="pretrain", protocol="ce_imagenet", dataset="imagenet", split="val"),
    row(1.0, step="analysis", metric="mi_xt", unit="nats"),
]  # fmt: skip


def joined(rows: list[ResultRow], options: Options = OPTIONS) -> list[Table]:
    return overviews(build_tables(rows, options), options)


def test_both_steps_make_one_table_with_a_row_for_each_initialisation():
    (table,) = joined(ROWS)
    assert table.columns == (
        "AP^bbox", "AP^mask", "cub200 †", "cub200 ‡", "aircraft ‡", "imagenet source",
    )  # fmt: skip
    means = {line.label: [cell.mean for cell in line.cells.values()] for line in table.lines}
    assert means == {
        "ce": [30.0, None, 60.0, 80.0, 70.0, 76.0],
        "CTC": [40.0, 41.0, 62.0, None, None, None],
    }
    assert table.lines[1].seeds == (1, 2)
    assert "–: not measured." in table.notes
    assert "Not every column has every trial." in table.notes  # box AP has one of two


def test_it_reads_in_every_format(tmp_path: Path):
    (tmp_path / "run").mkdir()
    run = dataclasses.replace(read_run(tmp_path / "run"), rows=tuple(ROWS))
    tables = write_report([run], tmp_path, Page(options=OPTIONS))
    markdown, latex = to_markdown(tables[0]), to_latex(tables[0])
    heads = [word.strip() for word in markdown.splitlines()[2].strip("|").split("|")]
    assert heads == ["initialisation", *tables[0].columns, "trials"]
    assert r"AP$^{\mathrm{bbox}}$ & AP$^{\mathrm{mask}}$ & cub200 \dag{} & cub200 \ddag{}" in latex
    page = (tmp_path / "report.html").read_text()
    assert "AP<sup>bbox</sup>" in page
    assert page.index("All initialisations") < page.index("mask_rcnn on coco")
    with (tmp_path / "overview.csv").open() as file:
        ce, ctc = csv.DictReader(file)
    assert (ce["initialisation"], ce["cub200 ‡"], ce["AP^mask"]) == ("ce", "80.0", "")
    assert (ctc["cub200 †"], ctc["trials"]) == ("62.0", "2")
    assert "overview" not in (tmp_path / "table.csv").read_text()  # each number once


def test_one_table_needs_no_overview():
    assert joined([box(30.0), box(20.0, metric="segm/AP"), ROWS[-2]]) == []


def test_keypoint_ap_has_a_column():
    (table,) = joined([box(30.0), box(50.0, metric="keypoints/AP"), row(1.0)])
    assert table.columns == ("AP^bbox", "AP^keypoint", "cub200 †")
    assert table.lines[0].cells["AP^keypoint"].mean == 50.0


def test_columns_that_would_read_alike_are_told_apart():
    rows = [box(30.0), box(31.0, protocol="other"), row(1.0, protocol="linear_64px"), row(2.0)]
    (table,) = joined(rows)
    assert table.columns == (
        "box AP coco mask_rcnn", "box AP coco other", "cub200 † 64px", "cub200 †",
    )  # fmt: skip
    rows = [box(30.0, data="a/v"), box(31.0, data="b/v"), row(1.0)]
    (table,) = joined(rows)
    assert table.columns[0] == "box AP coco mask_rcnn val last data a/v"
    assert [cell.mean for cell in table.lines[0].cells.values()] == [30.0, 31.0, 1.0]
    rows = [row(1.0), row(2.0, split="val"), row(3.0, split="val", selection="best on val")]
    (table,) = joined(rows)
    assert len(set(table.columns)) == 3
    assert [cell.mean for cell in table.lines[0].cells.values()] == [1.0, 2.0, 3.0]


def test_small_figures_stand_in_a_table_of_their_own():
    names = ("linear", "finetune", "knn_20", "few_shot_5", "knn_20_64px")
    main, minor = joined([row(float(n), protocol=name) for n, name in enumerate(names)])
    assert main.columns == ("cub200 †", "cub200 ‡")
    assert minor.columns == ("cub200 20-NN", "cub200 5-shot", "cub200 20-NN 64px")
    assert [cell.mean for cell in minor.lines[0].cells.values()] == [2.0, 3.0, 4.0]


def test_a_column_shows_one_recipe_that_of_most_initialisations_or_the_newest():
    rows = [row(60.0), row(80.0, protocol="finetune")]
    rows += [row(64.0, config="other", weights="v", time="2026-02-01T00:00:00")]
    (table,) = joined(rows)
    assert table.lines[0].cells["cub200 †"].mean == 64.0
    assert any("Measured in several ways" in note for note in table.notes)
    (table,) = joined([*rows, row(50.0, init="ctc")])  # both have this recipe
    assert [line.cells["cub200 †"].mean for line in table.lines] == [60.0, 50.0]


@pytest.mark.parametrize(
    ("protocol", "heading"),
    [
        ("linear", "cub200 †"),
        ("linear_limit1000", "cub200 † limit1000"),
        ("finetune_600", "cub200 ‡ 600"),
        ("finetune_600+ab12cd", "cub200 ‡ 600+ab12cd"),
        ("finetune+ab12cd", "cub200 ‡ +ab12cd"),
        ("linearly", "cub200 linearly"),
        ("linear_released", "cub200 † released"),
    ],
)
def test_headings_keep_what_tells_a_protocol_from_the_plain_one(protocol: str, heading: str):
    (table,) = joined([row(1.0, protocol=protocol), row(2.0, protocol="finetune", dataset="dtd")])
    assert table.columns == (heading, "dtd ‡")
    assert any(note.startswith("†") for note in table.notes)
