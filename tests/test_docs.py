"""What ``docs`` claims: every number of its tables follows from the rows beside it, every command
names tools and configs that are there, every picture exists."""

import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from core.config import ROOT, find_config
from core.results import ResultRow, latest, read_rows
from report.timeline import gather, summaries

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*/README.md"))
SUBSET = {
    "random": "random",
    "CE": "ce",
    "CE, matched": "ce_matched",
    "CTC, transferability": "ctc",
    "CTC, discriminability": "ctc_discriminability",
}
DETECTION = {"random init.": "random", "CE": "ce", "CTC": "ctc"}
TIMELINE = {
    "Recall@1, source train, %": ("recall@1", "cifar100", "train"),
    "linear probe, source test, %": ("linear/top1", "cifar100", "test"),
    "linear probe, CIFAR-10, %": ("linear/top1", "cifar10", "test"),
    "linear probe, Flowers-17 at 32 px, %": ("linear/top1", "flowers17_128", "test"),
    "I(X;T), source, InfoNCE, nat": ("mi_xt/infonce", "cifar100", "all"),
    "I(X;T), CIFAR-10, InfoNCE, nat": ("mi_xt/infonce", "cifar10", "all"),
    "I(X;T), Flowers-17, InfoNCE, nat": ("mi_xt/infonce", "flowers17_128", "all"),
    "I(T;Y), source, InfoNCE, nat": ("mi_ty/infonce", "cifar100", "all"),
}


def table(page: str) -> list[list[str]]:
    """Return the cells of a page's only table, without its head."""
    lines = (DOCS / page / "README.md").read_text().splitlines()
    rows = [[c.strip() for c in ln.strip("|").split("|")] for ln in lines if ln.startswith("|")]
    assert len(rows) > 2
    return rows[2:]


def said(values: Iterable[float | None], digits: int) -> str:
    """Return mean ± sample standard deviation as the pages print it; "" for no values."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    return f"{statistics.fmean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


def difference(values: list[float | None], base: list[float | None], digits: int) -> str:
    """Return the mean difference of three seeds with its 95% t-interval, as the pages print it."""
    steps = [a - b for a, b in zip(values, base, strict=True) if a is not None and b is not None]
    assert len(steps) == 3
    mean, half = statistics.fmean(steps), 4.302653 * statistics.stdev(steps) / 3**0.5
    low, high = mean - half, mean + half
    text = f"{mean:+.{digits}f} ({low:+.{digits}f} … {high:+.{digits}f})"
    return text.replace("-", "−")


def choose(
    rows: list[ResultRow], init: str, test: Callable[[ResultRow], bool]
) -> list[float | None]:
    found = [row for row in rows if row.init == init and test(row)]
    assert [row.seed for row in found] in ([], [1, 2, 3])
    return [row.value for row in found]


def rows_of(page: str) -> list[ResultRow]:
    return sorted(latest(read_rows(DOCS / page / "results.jsonl")), key=lambda row: row.seed)


def test_the_transfer_table_is_that_of_its_rows() -> None:
    rows = rows_of("subset")
    assert [cells[0] for cells in table("subset")] == list(SUBSET)
    places = [(p, d) for p in ("linear", "finetune") for d in ("cifar10", "flowers17_128")]
    for name, _, *cells, source in table("subset"):
        init = SUBSET[name]
        for printed, (protocol, dataset) in zip(cells, places, strict=True):
            expected = choose(
                rows, init,
                lambda r, p=protocol, d=dataset: r.protocol.startswith(p) and r.dataset == d,
            )  # fmt: skip
            assert printed == said(expected, 2)
        assert source == said(choose(rows, init, lambda r: r.step == "pretrain"), 2)


def test_the_transfer_pages_intervals_follow_from_its_rows() -> None:
    text = " ".join((DOCS / "subset/README.md").read_text().split())
    for dataset in ("cifar10", "flowers17_128"):
        ctc, ce = (
            choose(
                rows_of("subset"), init,
                lambda r, d=dataset: r.protocol.startswith("finetune") and r.dataset == d,
            )
            for init in ("ctc", "ce_matched")
        )  # fmt: skip
        mean, _, interval = difference(ctc, ce, 1).partition(" (")
        assert f"{mean.lstrip('−')} " in text
        assert interval.rstrip(")") in text


def test_the_detection_table_is_that_of_its_rows() -> None:
    rows = rows_of("detection")
    base = {m: choose(rows, "ce", lambda r, m=m: r.metric == m) for m in ("bbox/AP", "segm/AP")}
    assert [cells[0] for cells in table("detection")] == list(DETECTION)
    for name, box, mask, box_delta, mask_delta, source in table("detection"):
        init = DETECTION[name]
        for metric, printed, delta in (("bbox/AP", box, box_delta), ("segm/AP", mask, mask_delta)):
            values = choose(rows, init, lambda r, m=metric: r.metric == m)
            assert printed == said(values, 2)
            if init != "ce":
                assert delta == difference(values, base[metric], 2)
        assert source == said(choose(rows, init, lambda r: r.step == "pretrain"), 1)


def test_two_judges_of_one_file_of_detections_agree() -> None:
    judges = {"pycocotools": "results.jsonl", "hotcoco": "hotcoco.jsonl"}
    found = {}
    for (name, *cells), (judge, file) in zip(table("coco_mini"), judges.items(), strict=True):
        rows = read_rows(DOCS / "coco_mini" / file)
        assert {row.details["coco_backend"] for row in rows} == {name} == {judge}
        found[judge] = {row.metric: row.value or 0.0 for row in rows}
        printed = [
            f"{task}/{metric}" for task in ("bbox", "segm") for metric in ("AP", "AP50", "APl")
        ]
        assert cells == [f"{found[judge][metric]:.4f}" for metric in printed]
    assert found["pycocotools"] == pytest.approx(found["hotcoco"], abs=1e-8)
    assert len(found["hotcoco"]) == 12


def test_the_timelines_table_is_that_of_its_rows() -> None:
    (data,) = gather(read_rows(DOCS / "timeline/results.jsonl")).values()
    found = {(c.metric, c.dataset, c.split, c.init): c for c in summaries(data)}
    assert [cells[0] for cells in table("timeline")] == list(TIMELINE)
    for name, *cells in table("timeline"):
        printed = []
        for init in ("ce", "ctc"):
            course = found[(*TIMELINE[name], init)]
            assert course.seeds == [1, 2]
            printed += [f"{course.highest[1]:.1f} ({course.highest[0]})", f"{course.last[1]:.1f}"]
        assert cells == printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_commands_and_pictures_of_a_page_name_what_is_there(page: Path) -> None:
    text = page.read_text()
    tools = re.findall(r"^\s*(tools/\S+)", text, re.MULTILINE)
    assert tools
    assert all((ROOT / tool).is_file() for tool in tools)
    for name in re.findall(r"--config (\S+)", text):
        assert find_config(name, name.split("/")[0]).is_file()
    for link in re.findall(r"\]\(([^):]+)\)", text):
        assert (page.parent / link).is_file()
