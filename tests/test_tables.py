"""What a table may average, what it must say, and that its three formats hold up."""

import csv
import dataclasses
import io
import re
import shutil
import subprocess

import pytest

from core.results import ResultRow
from report.formats import latex_text, signed, to_csv, to_latex, to_markdown
from report.reference import load_reference
from report.tables import DETECTION_COLUMNS, Options, Table, build_tables, heading

BASE = ResultRow(
    step="detection", protocol="quick", dataset="shapes", split="val", metric="bbox/AP",
    value=0.0, unit="%", init="ce", seed=1, weights="w", code="a" * 40, time="2026-01-01T00:00:00",
)  # fmt: skip


def row(value: float | None, **changes: object) -> ResultRow:
    return dataclasses.replace(BASE, value=value, **changes)  # type: ignore[arg-type]


def one(rows: list[ResultRow], **options: object) -> Table:
    tables = build_tables(rows, Options(**options))  # type: ignore[arg-type]
    assert len(tables) == 1
    return tables[0]


def test_mean_sample_deviation_and_delta_by_hand():
    rows = [row(v, seed=s, weights=f"ce{s}") for s, v in enumerate([10.0, 12.0, 14.0])]
    rows += [row(v, init="ctc", seed=s, weights=f"ctc{s}") for s, v in enumerate([13.0, 15.0])]
    ce, ctc = one(rows, columns=("bbox/AP",), order=("ce", "ctc")).lines
    assert ce.cells["bbox/AP"].mean == 12.0
    assert ce.cells["bbox/AP"].std == 2.0  # sample deviation; the population's would be 1.63
    assert ce.cells["bbox/AP"].delta is None
    assert ctc.cells["bbox/AP"].delta == pytest.approx(2.0)
    assert [seed for seed, _ in ce.cells["bbox/AP"].trials] == [0, 1, 2]


@pytest.mark.parametrize(
    "change", [{"protocol": "other"}, {"dataset": "coco"}, {"split": "test"}, {"selection": "best"}]
)
def test_rows_of_another_protocol_data_split_or_selection_stand_in_another_table(change):
    tables = build_tables([row(10.0), row(20.0, seed=2, **change)])
    assert [t.lines[0].cells["bbox/AP"].mean for t in tables] == [10.0, 20.0]


def test_other_annotations_of_one_name_have_a_table_that_says_which():
    rows = [row(10.0), row(20.0, data="a/v"), row(22.0, data="a/v", seed=2), row(30.0, data="b/v")]
    rows += [row(21.5, data="a/v", init="ctc")]
    tables = build_tables(rows)
    assert [t.lines[0].cells["bbox/AP"].mean for t in tables] == [10.0, 21.0, 30.0]
    titles = [f"quick on shapes (val), data {data}" for data in ("unknown", "a/v", "b/v")]
    assert [table.title for table in tables] == titles
    assert "Data b/v" in tables[2].footnotes[0]
    assert tables[1].lines[1].cells["bbox/AP"].delta == 0.5  # against the baseline on equal data
    (alone,) = build_tables([row(10.0, data="a/v"), row(12.0, data="a/v", seed=2)])
    assert (alone.title, alone.footnotes) == ("quick on shapes (val)", ())


@pytest.mark.parametrize("step", ["detection", "transfer"])
@pytest.mark.parametrize("change", [{"epoch": 7}, {"config": "c"}, {"version": 2}, {"schema": 1}])
def test_rows_of_other_epoch_or_identity_are_not_averaged(step, change):
    table = one([row(10.0, step=step), row(20.0, step=step, seed=2, weights="v", **change)])
    assert sorted(line.cells["bbox/AP"].mean for line in table.lines) == [10.0, 20.0]
    assert any(line.marks or "epoch" in line.label for line in table.lines)


def test_trials_measured_at_two_commits_share_a_mean():
    table = one([row(10.0), row(20.0, seed=2, weights="v", code="b" * 40)])
    assert [line.cells["bbox/AP"].mean for line in table.lines] == [15.0]
    assert "Code aaaaaaaa, bbbbbbbb." in to_markdown(table)


def test_rows_of_unknown_identity_say_so_and_their_code_parts_them():
    rows = [row(10.0, schema=1), row(20.0, schema=1, seed=2, weights="v", code="b" * 40)]
    table = one(rows)
    assert [line.cells["bbox/AP"].mean for line in table.lines] == [10.0, 20.0]
    assert table.notes[0].startswith("Unknown identity: written before")
    mixed = one([row(10.0), row(20.0, schema=1, seed=2)])
    said = {line.seeds: [mixed.footnotes[m - 1][:16] for m in line.marks] for line in mixed.lines}
    assert said == {(1,): [], (2,): ["Unknown identity"]}


def test_fits_at_the_edge_of_the_grid_or_cut_short_are_said():
    place = {"step": "transfer", "metric": "top1", "weights": "v"}
    found = {1: {"at_grid_edge": True}, 2: {"at_grid_edge": False, "converged": False}}
    rows = [row(10.0, **place, seed=s, details=d) for s, d in found.items()]
    (line,) = (table := one([*rows, row(9.0, **place, seed=3)])).lines
    assert [table.footnotes[mark - 1] for mark in line.marks] == [
        "C was chosen at the edge of its grid (seed 1): widen linear.log10_c_min or "
        "linear.log10_c_max.",
        "The fit ended at linear.iterations before it converged (seed 2).",
    ]


def test_different_code_of_unknown_identity_is_said_in_a_footnote_of_each_line():
    old = {"schema": 1}
    table = one([row(10.0, **old), row(20.0, **old, init="ctc", code="b" * 40 + "+dirty")])
    said = {line.init: [table.footnotes[m - 1] for m in line.marks] for line in table.lines}
    assert "aaaaaaaa" in said["ce"][0]
    assert "bbbbbbbb with uncommitted changes" in said["ctc"][0]
    assert any("Δ compares different recipes or code" in text for text in said["ctc"])
    assert "different code" not in " ".join(one([row(10.0), row(20.0, init="ctc")]).footnotes)


def test_a_seed_measured_again_counts_once_with_its_newest_weights():
    old, new = row(10.0, weights="old"), row(20.0, weights="new", time="2026-02-01T00:00:00")
    for rows in ([old, new], [new, old]):
        (line,) = (table := one(rows)).lines
        assert line.cells["bbox/AP"].trials == ((1, 20.0),)
        assert "more than once for seed 1" in table.footnotes[0]


def test_configs_of_schema_1_hold_the_seed_and_do_not_part_the_trials():
    old = {"step": "transfer", "metric": "top1", "schema": 1}
    rows = [row(10.0, **old, config="x"), row(20.0, **old, config="y", seed=2, weights="v")]
    (line,) = one(rows).lines
    assert line.cells["top1"].mean == 15.0


def test_pretraining_recipes_are_compared_in_one_table_that_names_them():
    rows = [row(50.0, step="pretrain", metric="top1", protocol="ce_quick")]
    rows += [row(52.0, step="pretrain", metric="top1", protocol="ctc_quick", init="ctc")]
    table = one(rows, expected={"ce": 1, "ctc": 1, "moco": 1})
    assert [line.cells["top1"].delta for line in table.lines] == [None, 2.0]
    assert table.footnotes == ("Recipe ce_quick.", "Recipe ctc_quick.")


def test_small_numbers_get_a_second_decimal():
    assert re.search(r"\|\s+0\.04 \|", to_markdown(one([row(0.04)])))
    assert "12.3 |" in to_markdown(one([row(12.34)]))


def test_what_a_changed_protocol_changes_is_said():
    table = one([row(10.0, details={"overrides": {"MODEL.BACKBONE.FREEZE_AT": 5}})])
    assert "MODEL.BACKBONE.FREEZE_AT 5" in table.notes[0]


def test_missing_trials_and_initialisations_are_said():
    table = one([row(10.0)], expected={"ce": 3, "ctc": 3}, order=("ctc", "ce"))
    assert [line.init for line in table.lines] == ["ctc", "ce"]
    assert table.lines[0].cells["bbox/AP"].mean is None
    assert "1 of 3 trials" in " ".join(table.footnotes)
    assert "baseline 'ce' has no rows" in " ".join(one([row(1.0, init="ctc")]).notes)


def test_published_rows_stand_beside_only_where_protocol_and_data_are_the_same():
    place = {"protocol": "mask_rcnn_R50_FPN_1x", "dataset": "coco_2017", "split": "val"}
    table = one([row(39.0, init="ctc", **place)])
    assert [line.init for line in table.published] == ["random", "moco_v2", "infomin", "ce", "ctc"]
    assert table.published[-1].values == {"bbox/AP": 39.5, "bbox/AP50": 58.7, "bbox/AP75": 42.0}
    assert "R50-C4 1× rows" in " ".join(table.notes)  # the provenance note goes with it
    for key, value in (("protocol", "quick"), ("dataset", "shapes"), ("split", "test")):
        table = one([row(39.0, init="ctc", **(place | {key: value}))])
        assert not table.published
        assert "No published numbers stand beside" in " ".join(table.notes)


def test_published_numbers_are_complete_and_cite_their_source():
    tables = load_reference().tables
    assert {"table5", "fpn_1x_infomin", "c4_1x", "detectron2_zoo", "cub_aircraft", "inat18"} <= set(
        tables
    )
    for table in tables.values():
        for published in table.rows:
            assert published.source
            assert published.dataset or all(column.dataset for column in table.columns)
            assert len(published.values) == len(table.columns)
    # the claim of the provenance note, checked against the numbers themselves
    c4 = {r.init: r.values for r in tables["c4_1x"].rows}
    seed = {r.init: (r.values[0], r.values[3]) for r in tables["table5"].rows}
    assert seed["ce"] == c4["ce"]
    assert seed["moco_v2"] == c4["moco_v1"]
    assert seed["infomin"] == c4["infomin_200"]


@pytest.mark.parametrize("name", ["fpn_1x_infomin", "c4_1x"])
def test_published_rows_of_moco_v2_and_infomin_name_their_true_source_and_epochs(name):
    rows = {row.init: row for row in load_reference().tables[name].rows}
    for init in ("moco_v2", "moco_v2_200"):  # PyContrast's README has no such row at 1×
        assert "InstanceLoc" in rows[init].source
    assert "PyContrast" in rows["infomin_200"].source
    assert "200 epochs" in rows["infomin_200"].label
    assert "infomin" not in rows  # in the suites that is InfoMin_800.pth


def test_headings_are_those_of_table_5():
    names = [heading(column, DETECTION_COLUMNS) for column in DETECTION_COLUMNS]
    assert names == ["AP^bbox", "AP50", "AP75", "AP^mask", "AP50", "AP75"]
    assert heading("segm/AP50", ("segm/AP50",)) == "AP50^mask"  # alone it needs its family


@pytest.mark.parametrize(
    ("metrics", "headings"),
    [
        (["bbox/AP", "keypoints/APl", "keypoints/AP", "keypoints/AP50", "keypoints/AP75"],
         ["AP^bbox", "AP50", "AP75", "AP^keypoint", "AP50", "AP75"]),
        (["bbox/AP", "bbox/APf", "bbox/APr", "bbox/APc", "segm/AP", "segm/APr"],
         ["AP^bbox", "AP50", "AP75", "APr", "APc", "APf", "AP^mask", "AP50", "AP75", "APr"]),
        (["segm/AP", "bbox/AP", "bbox/APs"],
         ["AP^bbox", "AP50", "AP75", "AP^mask", "AP50", "AP75"]),
    ],
)  # fmt: skip
def test_keypoints_and_rare_classes_have_columns_where_they_were_judged(metrics, headings):
    table = one([row(float(n), metric=metric) for n, metric in enumerate(metrics)])
    assert [heading(column, table.columns) for column in table.columns] == headings
    (line,) = table.lines
    assert all(line.cells[m].mean == n for n, m in enumerate(metrics) if m in table.columns)


def test_an_undefined_value_is_a_dash_and_leaves_the_mean_alone():
    (line,) = one([row(10.0), row(None, seed=2, weights="v")]).lines
    assert line.cells["bbox/AP"].mean == 10.0
    (line,) = (table := one([row(None)])).lines
    assert line.cells["bbox/AP"].mean is None
    assert "–" in to_markdown(table)


def test_markdown_has_as_many_cells_in_every_row_whatever_the_names():
    table = one([row(10.0), row(12.5, init="a|b <i>\nc")])
    lines = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "+2.5" in lines[-1]
    assert "<i>" not in to_markdown(table).replace("\\<", "")


def test_signed_differences():
    assert [signed(v, 1) for v in (1.25, -0.31, 0.04, -0.04, None)] == [
        "+1.2", "−0.3", "0.0", "0.0", "",
    ]  # fmt: skip


def test_csv_reads_back_unrounded():
    rows = [row(1 / 3), row(2 / 3, init='x,"y"')]
    read = list(csv.DictReader(io.StringIO(to_csv(build_tables(rows)))))
    values = {r["initialisation"]: r for r in read if r["metric"] == "bbox/AP"}
    assert float(values["ce"]["mean"]) == 1 / 3
    assert float(values['x,"y"']["delta"]) == 2 / 3 - 1 / 3


def test_latex_escapes_every_special_character():
    text = latex_text(r"a_b & 100% #1 $x$ {y} ~z ^w \cmd")
    assert not re.search(r"(?<!\\)[&%#_]", text)
    assert r"\textbackslash{}cmd" in text
    assert r"\textasciitilde{}z" in text
    assert latex_text("[2pt]") == "{[}2pt{]}"  # after a line end it would be read as a length


def test_latex_table_is_balanced_and_compiles(tmp_path):
    rows = [row(10.0), row(12.0, seed=2, weights="v"), row(12.5, init=r"mo_co & 50% \x")]
    latex = to_latex(one(rows, columns=DETECTION_COLUMNS))
    body = latex.split(r"\midrule")[1].split(r"\bottomrule")[0]
    columns = re.search(r"tabular}{(l?r*)}", latex)
    assert columns
    for line in body.strip().splitlines():
        assert len(re.findall(r"(?<!\\)&", line)) == len(columns[1]) - 1
    assert latex.count("{") - latex.count(r"\{") == latex.count("}") - latex.count(r"\}")
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex to compile the table with")
    document = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n" + latex
    (tmp_path / "t.tex").write_text(document + "\\end{document}")
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]
