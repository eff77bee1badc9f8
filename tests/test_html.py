"""The page: complete, escaped, self-contained, and without errors in a browser."""

import dataclasses
import html.parser
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from core.errors import InputError
from core.results import ResultRow, append_rows
from report.gallery import draw_gallery, draw_objects, mask_of
from report.html import Page, write_report
from report.runs import find_runs, read_curves, read_run
from report.tables import DETECTION_COLUMNS, Options

NASTY = "<b>ctc & $x_1$</b>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in BROWSERS if (found := shutil.which(name))), None)


def fabricate_data(folder: Path) -> dict:
    """Write six images of 64 px with two objects each, as COCO does; return dataset.json."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for n in range(6):
        picture = np.full((64, 64, 3), 40 + 20 * n, np.uint8)
        cv2.imwrite(str(folder / "images" / f"{n}.png"), picture)
        images.append({"id": n, "file_name": f"{n}.png", "height": 64, "width": 64})
        for k, box in enumerate(([4, 4, 20, 20], [30, 30, 24, 20])):
            x, y, w, h = box
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {"id": 2 * n + k, "image_id": n, "category_id": k + 1, "bbox": box,
                 "segmentation": [polygon], "area": w * h, "iscrowd": 0}
            )  # fmt: skip
    categories = [{"id": 1, "name": "heart"}, {"id": 2, "name": "<moon>"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "val.json").write_text(json.dumps(content))
    places = {"json": str(folder / "val.json"), "images": str(folder / "images")}
    return places | {"classes": ["heart", "<moon>"], "name": "shapes", "split": "val"}


def fabricate_timeline(init: str, n: int) -> list[ResultRow]:
    """Return rows of three epochs, on source and target; the probe falls at the end."""
    return [
        ResultRow(
            step="analysis", protocol="<tiny>", dataset=dataset, split="test", metric=metric,
            value=value, unit="1", init=init, seed=1, epoch=epoch, weights=f"{n}{epoch}" * 32,
            config=metric, code="c" * 40, details={"role": role, "boundary": 1},
        )
        for dataset, role in (("shapes", "source"), ("a & <b>", "target"))
        for metric in ("recall@1", "linear/top1", "mi_xt", "mi_ty")
        for epoch, value in enumerate((1.0, 3.0 + n, 2.0))
    ]  # fmt: skip


def fabricate_suite(root: Path, inits: tuple[str, ...] = ("random", "ce", NASTY)) -> Path:
    """Write pretraining and detection run folders as the tools leave them; return their parent."""
    dataset = fabricate_data(root / "data")
    for n, init in enumerate(inits):
        stem = f"init{n}-s1"
        pretrain, detection = root / "runs/pretrain" / stem, root / "runs/quick" / stem
        pretrain.mkdir(parents=True)
        (detection / "inference").mkdir(parents=True)
        with (pretrain / "log.jsonl").open("w") as log:
            for i in range(50):
                line = {"iteration": i, "loss": 4 * math.exp(-i / 30) + n, "loss_ce": 4 - n}
                log.write(json.dumps(line | {"lr": 0.1, "method": init}) + "\n")
        row = ResultRow(
            step="pretrain", protocol="p", dataset="shapes", split="val", metric="top1", value=50.0,
            unit="%", init=init, seed=1, code="c" * 40,
        )  # fmt: skip
        append_rows(pretrain / "results.jsonl", [row, *fabricate_timeline(init, n)])
        row = ResultRow(
            step="detection", protocol="quick", dataset="shapes", split="val", metric="", value=0.0,
            unit="%", init=init, seed=1, epoch=n, weights=f"{n}" * 64, config="f" * 64,
            code="c" * 40, details={"device": "cpu", "images": {"val": 6}},
        )  # fmt: skip
        rows = [
            dataclasses.replace(row, metric=metric, value=5.0 + 3 * n + 0.7 * k)
            for k, metric in enumerate(DETECTION_COLUMNS)
        ]
        append_rows(detection / "results.jsonl", rows)
        (detection / "config.yaml").write_text("MODEL: {DEVICE: cpu}\n")
        (detection / "dataset.json").write_text(json.dumps(dataset))
        with (detection / "metrics.json").open("w") as log:
            for i in range(0, 60, 2):
                log.write(
                    json.dumps(
                        {"iteration": i, "total_loss": 3 - i / 40, "lr": 0.1, "data_time": 0.0}
                    )
                    + "\n"
                )
        found = [
            {"image_id": i, "category_id": 1, "bbox": [5, 5, 20, 18], "score": 0.3 + 0.3 * n}
            for i in range(6)
        ]
        (detection / "inference/coco_instances_results.json").write_text(json.dumps(found))
        judged = {"per_class": {"heart": 10.0 + n, "<moon>": None}, "recall": [0.0, 0.5, 1.0]}
        judged |= {"precision": {"0.5": [0.9, 0.5, 0.1], "0.75": [0.8, 0.2, 0.0]}}
        (detection / "inference/coco_metrics.json").write_text(json.dumps({"bbox": judged}))
    return root / "runs"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a report of three initialisations, one of them with a nasty name."""
    root = tmp_path_factory.mktemp("suite")
    runs = find_runs([fabricate_suite(root)])
    settings = Page(
        title="A <title> & more",
        options=Options(order=("random", "ce", NASTY)),
        images=3,
        remarks=("<script>alert(1)</script> has failed",),
    )
    write_report(runs, root / "report", settings)
    return root / "report"


class _Elements(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_page_asks_for_nothing_outside_itself(page: Path):
    text = (page / "report.html").read_text()
    for tag, attributes in _Elements(text).found:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
    assert not re.search(r"url\((?!#|['\"]?data:)", text)
    assert "@import" not in text


def test_names_and_remarks_are_escaped_everywhere(page: Path):
    text = (page / "report.html").read_text()
    assert "<script>alert" not in text
    assert "<b>ctc" not in text
    assert "<moon>" not in text
    assert "A &lt;title&gt; &amp; more" in text


def test_ids_on_the_page_are_unique_and_references_meet_one(page: Path):
    text = (page / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
    assert references
    assert set(references) <= set(ids)


def test_every_section_is_there(page: Path):
    text = (page / "report.html").read_text()
    tags = [tag for tag, _ in _Elements(text).found]
    assert text.count("data:image/webp") == 3 * 4  # three images, ground truth + three inits
    assert tags.count("svg") >= 2 + 2 + 1  # trial dots, pretraining, detection
    words = ("Provenance", "heart", "Table 5", "R50-C4 1×", "No published numbers stand")
    for word in (*words, "Precision and recall", "of these waiting for data"):
        assert word in text
    assert (page / "table.md").read_text().count("| random") >= 1
    assert (page / "table.csv").exists()
    assert (page / "table.tex").exists()
    assert {p.suffix for p in (page / "figures").iterdir()} == {".png", ".svg"}


def test_a_timeline_has_figures_and_a_course_and_no_tables_of_epochs(page: Path):
    text = (page / "report.html").read_text()
    section = text[text.index('<section id="timeline">') :].partition("</section>")[0]
    assert section.count("<figure") == section.count("<figcaption>") >= 8
    assert "Information plane: I(X;T) against I(T;Y), by MINE" in section
    assert "a &amp; &lt;b&gt; (target), test" in section
    assert ">−1.000</td>" in section  # of the first initialisation's probe: from 3 to 2
    drawn = {path.suffix for path in (page / "figures").glob("timeline--tiny--tradeoff-ce.*")}
    assert drawn == {".png", ".svg"}
    assert "recall@1" not in (page / "table.csv").read_text()
    assert "<tiny>,a & <b>,target,test,linear/top1,ce,1,4.0,0.0,1" in (
        page / "timeline.csv"
    ).read_text().replace('"', "")
    assert "epoch 1" not in text[text.index('id="results"') : text.index('id="timeline"')]
    provenance = text[text.index('<section id="provenance">') :]
    assert provenance.count("&lt;tiny&gt;") == 3 * 2  # a line a run and data set


def test_a_run_with_a_timeline_alone_is_reported(tmp_path: Path):
    append_rows(tmp_path / "run" / "results.jsonl", fabricate_timeline("ce", 0))
    assert write_report([read_run(tmp_path / "run")], tmp_path / "out", Page()) == []
    text = (tmp_path / "out/report.html").read_text()
    assert "No rows but those over time." in text
    assert 'href="#timeline"' in text


def test_figures_on_the_page_take_its_ink(page: Path):
    inline = re.findall(r"<svg.*?</svg>", (page / "report.html").read_text(), re.DOTALL)
    assert any("currentColor" in svg for svg in inline)
    assert not any("#1b1c1d" in svg or "<metadata" in svg for svg in inline)
    assert "#1b1c1d" in next((page / "figures").glob("curve*.svg")).read_text()


def test_gallery_shows_the_same_images_and_says_when_nothing_is_above_the_score(tmp_path: Path):
    runs = find_runs([fabricate_suite(tmp_path, ("random", "ce"))])
    gallery = draw_gallery(runs, {"ce": "CE", "random": "random"}, images=2, score=0.5)
    strips = gallery.strips
    assert not gallery.note
    assert [p.title for p in strips[0].pictures] == ["ground truth", "CE", "random"]
    assert strips[0].pictures[1].note == "1 at score ≥ 0.5"
    assert strips[0].pictures[2].note == "none; highest score 0.30"
    assert strips[0].pictures[2].uri != strips[0].pictures[1].uri


def test_where_nothing_reaches_the_score_a_lower_one_serves_all_and_is_said(tmp_path: Path):
    runs = find_runs([fabricate_suite(tmp_path, ("random", "ce"))])  # scores 0.3 and 0.6
    gallery = draw_gallery(runs, {}, images=2, score=0.9)
    assert gallery.score == 0.45
    assert "Nothing in these images reaches a score of 0.9" in gallery.note
    assert [p.note for p in gallery.strips[0].pictures[1:]] == [
        "none; highest score 0.30",
        "1 at score ≥ 0.45",
    ]


def test_gallery_without_the_images_says_so(tmp_path: Path):
    runs = find_runs([fabricate_suite(tmp_path, ("ce",))])
    shutil.rmtree(tmp_path / "data")
    gallery = draw_gallery(runs, {}, images=2, score=0.5)
    assert not gallery.strips
    assert "cannot be drawn" in gallery.note


def test_masks_from_polygon_rle_and_box_agree():
    square = [10, 10, 20, 10, 20, 30, 10, 30]
    polygon = mask_of({"segmentation": [square], "bbox": [10, 10, 10, 20]}, 40, 50)
    counts = [10 * 40 + 10] + [20, 20] * 9 + [20, 40 * 30 + 10]  # column by column
    rle = mask_of({"segmentation": {"size": [40, 50], "counts": counts}}, 40, 50)
    box = mask_of({"bbox": [10, 10, 10, 20]}, 40, 50)
    assert polygon.shape == (40, 50)
    assert polygon.sum() == 200
    assert (polygon == rle).all()
    assert (polygon == box).all()


def test_drawing_colours_inside_the_mask_and_leaves_the_rest():
    picture = np.full((360, 360, 3), 100, np.uint8)
    item = {"bbox": [100, 100, 100, 100], "category_id": 1}
    drawn = draw_objects(picture, [item], {1: "x"}, lambda _: (255, 0, 0))
    assert drawn[150, 150].tolist() == [165, 58, 58]  # 0.58 · 100 + 0.42 · (255, 0, 0)
    assert drawn[300, 300].tolist() == [100, 100, 100]
    assert picture[150, 150].tolist() == [100, 100, 100]


def test_curves_of_a_resumed_run_take_the_later_line_and_skip_what_is_broken(tmp_path: Path):
    lines = [
        '{"iteration": 1, "loss": 5}',
        '{"iteration": 0, "loss": 9}',
        '{"iteration": 1, "loss": 4.5}',
        '{"iteration": 2, "loss": NaN, "ok": true}',
        "junk",
        '{"iteration": 3, "lo',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert read_curves(tmp_path / "log.jsonl") == {"loss": [(0, 9.0), (1, 4.5)]}


def test_set_aside_runs_do_not_count(tmp_path: Path):
    runs = fabricate_suite(tmp_path, ("ce",))
    shutil.copytree(runs / "quick/init0-s1", runs / "quick/init0-s1.old1")
    assert [run.path.name for run in find_runs([runs])] == ["init0-s1", "init0-s1"]
    assert {run.path.parent.name for run in find_runs([runs])} == {"pretrain", "quick"}


def test_no_runs_is_a_clear_error(tmp_path: Path):
    with pytest.raises(InputError, match="no runs to report"):
        find_runs([tmp_path])
    with pytest.raises(InputError, match="does not exist"):
        find_runs([tmp_path / "nowhere"])


def test_a_run_without_anything_but_rows_is_reported(tmp_path: Path):
    row = ResultRow(
        step="detection", protocol="quick", dataset="shapes", split="val", metric="bbox/AP",
        value=None, unit="%", init="ce", seed=1,
    )  # fmt: skip
    append_rows(tmp_path / "run" / "results.jsonl", [row])
    write_report([read_run(tmp_path / "run")], tmp_path / "out", Page())
    assert "No run has both its detections" in (tmp_path / "out/report.html").read_text()


PROBE = """
<script>
window.addEventListener("load", () => {
  const table = document.querySelector("table.sortable");
  const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent.trim());
  const before = names();
  table.tHead.rows[0].cells[1].querySelector("button").click();
  const after = names();
  const broken = [...document.images].filter((i) => !(i.complete && i.naturalWidth)).length;
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.title = JSON.stringify({before, after, broken, wide,
    images: document.images.length, tables: document.querySelectorAll("table").length,
    errors: window.seen});
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")
@pytest.mark.parametrize("width", [1280, 500])  # headless chromium opens no narrower window
def test_page_in_a_browser(page: Path, tmp_path: Path, width: int):
    text = (page / "report.html").read_text().replace(' loading="lazy"', "")
    catch = "<script>window.seen = []; window.onerror = (m) => { window.seen.push(m); };</script>"
    text = text.replace("<head>", "<head>" + catch, 1).replace("</body>", PROBE + "</body>", 1)
    (tmp_path / "probe.html").write_text(text)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
         "--enable-logging=stderr", "--dump-dom", (tmp_path / "probe.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr[-2000:]
    seen = json.loads(html.unescape(title[1]))
    assert seen["errors"] == []
    assert "CONSOLE" not in done.stderr
    assert seen["broken"] == 0
    assert seen["images"] == 12
    assert seen["tables"] >= 3
    assert seen["wide"] <= 0  # tables scroll in themselves, the page does not
    assert seen["before"] == ["random", "ce", NASTY]
    assert seen["after"] == [NASTY, "ce", "random"]  # the first press: best first
