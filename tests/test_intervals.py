"""Intervals beside their Δ, precision curves and AP per class: hand-made rows and files."""

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest

from core.errors import InputError
from core.results import ResultRow, append_rows
from report.formats import to_csv, to_latex, to_markdown
from report.html import Page, write_report
from report.intervals import read_intervals, with_intervals
from report.runs import find_runs
from report.sections import class_tables, evaluated_groups, precision_groups
from report.tables import Options, build_tables

BASE = ResultRow(
    step="detection", protocol="p", dataset="d", split="val", metric="bbox/AP", value=0.0,
    unit="%", init="ce", seed=1, config="f" * 64, code="a" * 40, time="2026-01-01T00:00:00",
)  # fmt: skip
VALUES = {("ce", 1): 10.0, ("ce", 2): 11.0, ("ctc", 1): 12.0, ("ctc", 2): 14.0, ("moco", 1): 9.0}
ROWS = [dataclasses.replace(BASE, init=i, seed=s, value=v) for (i, s), v in VALUES.items()]


def interval_row(init: str, delta: float, low: float, high: float, **changes: object) -> ResultRow:
    details = {"baseline": "ce", "compared": "bbox/AP", "interval": [low, high], "level": 0.95}
    details |= {"resamples": 1000, "seeds": [1, 2]}
    row = dataclasses.replace(
        BASE, metric="bbox/AP minus ce", init=init, value=delta, seed=0, details=details
    )
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


def test_an_interval_stands_beside_its_delta_and_marks_what_leaves_0_out():
    (plain,) = build_tables(ROWS)
    rows = [interval_row("ctc", 2.5, 0.4, 4.6), interval_row("moco", -1.5, -3.0, 0.2)]
    table = with_intervals(plain, rows)
    by_init = {line.init: line.cells["bbox/AP"] for line in table.lines}
    assert (by_init["ctc"].interval, by_init["ctc"].is_real) == ((0.4, 4.6), True)
    assert (by_init["moco"].is_real, by_init["ce"].interval) == (False, None)
    text = to_markdown(table)
    assert "+2.50 [+0.40, +4.60]*" in text
    assert "−1.50 [−3.00, +0.20] |" in text
    assert "leaves 0 out" in text
    assert "leaves 0 out" not in to_markdown(plain)
    assert "{[}+0.40, +4.60{]}*" in to_latex(table)
    lines = csv.DictReader(io.StringIO(to_csv([table])))
    read = {row["initialisation"]: row for row in lines if row["metric"] == "bbox/AP"}
    assert (read["ctc"]["delta_low"], read["ctc"]["delta_high"]) == ("0.4", "4.6")
    assert read["ce"]["delta_low"] == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"value": 2.4},
        {"protocol": "q"},
        {"config": "e" * 64},
        {"split": "test"},
        {"epoch": 7},
        {"details": {**interval_row("ctc", 2.5, 0, 1).details, "baseline": "random"}},
    ],
)
def test_an_interval_of_something_else_is_not_shown(changes: dict):
    (plain,) = build_tables(ROWS)
    table = with_intervals(plain, [interval_row("ctc", 2.5, 0.4, 4.6, **changes)])
    assert all(line.cells["bbox/AP"].interval is None for line in table.lines)
    stale = any("makes them anew" in note for note in table.notes)
    assert stale == ("value" in changes)


def test_intervals_are_read_the_newest_first_and_damage_is_named(tmp_path: Path):
    old = interval_row("ctc", 2.5, 0.0, 9.0, time="2026-01-01T00:00:00")
    new = interval_row("ctc", 2.5, 0.4, 4.6, time="2026-01-02T00:00:00")
    append_rows(tmp_path / "suite/bootstrap.jsonl", [new, old])
    assert [row.details["interval"] for row in read_intervals([tmp_path])] == [[0.4, 4.6]]
    append_rows(tmp_path / "bootstrap.jsonl", [BASE])
    with pytest.raises(InputError, match=r"bootstrap\.jsonl has a row without interval"):
        read_intervals([tmp_path])


def write_run(folder: Path, row: ResultRow, precision: list[float], heart: float | None) -> None:
    append_rows(folder / "results.jsonl", [row])
    judged = {
        "per_class": {"heart": heart, "moon": 50.0},
        "recall": [0.0, 0.5, 1.0],
        "precision": {"0.5": precision, "0.75": []},
    }
    (folder / "inference").mkdir()
    (folder / "inference/coco_metrics.json").write_text(json.dumps({"bbox": judged, "odd": 3}))


def test_classes_and_precision_are_means_over_the_trials_of_a_table(tmp_path: Path):
    write_run(tmp_path / "a", ROWS[0], [1.0, 0.5, 0.0], 20.0)
    write_run(tmp_path / "b", ROWS[1], [0.8, 0.3, 0.0], 40.0)
    write_run(tmp_path / "c", ROWS[2], [0.9, 0.9, 0.9], None)
    runs = find_runs([tmp_path])
    tables = build_tables([row for run in runs for row in run.rows])
    groups = evaluated_groups(runs, tables)
    (view,) = class_tables(groups, {"ce": "CE", "ctc": "CTC"})
    assert view["labels"] == ["CE", "CTC"]
    assert view["lines"] == [("heart", [30.0, None]), ("moon", [50.0, 50.0])]
    (curves,) = precision_groups(groups)
    assert (list(curves.curves), curves.x) == (["bbox precision, IoU 0.50"], "recall")
    (_, ce), (_, ctc) = curves.curves["bbox precision, IoU 0.50"]
    assert [x for x, _ in ce] == [0.0, 0.5, 1.0]
    assert [y for _, y in ce] == pytest.approx([0.9, 0.4, 0.0])
    assert [y for _, y in ctc] == pytest.approx([0.9] * 3)
    page = Page(options=Options(baseline="ce"), intervals=(interval_row("ctc", 1.5, 0.1, 3),))
    write_report(runs, tmp_path / "report", page)
    text = (tmp_path / "report/report.html").read_text()
    for expected in ("[+0.10, +3.00]*", 'id="precision"', "bbox AP per class, p on d (val)"):
        assert expected in text
    assert "seed 1: 10.00, seed 2: 11.00" in text  # the trials of a mean
    (tmp_path / "a/inference/coco_metrics.json").write_text("{")
    assert find_runs([tmp_path / "a"])[0].evaluation == {}
