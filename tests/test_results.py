"""Result rows: nothing is lost by a crash, nothing wrong is taken for a number."""

import json
import subprocess
from pathlib import Path

import pytest

from core.config import InputError
from core.results import ResultRow, append_rows, code_version, latest, read_rows


def _row(value: float | None = 1.0, **changes: object) -> ResultRow:
    content = {
        "step": "detection", "protocol": "p", "dataset": "d", "split": "val",
        "metric": "bbox/AP", "unit": "%", "init": "ce", "seed": 1,
    }  # fmt: skip
    return ResultRow(value=value, **{**content, **changes})  # type: ignore[arg-type]


def test_rows_come_back_as_they_were_written_with_time_and_code(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    append_rows(path, [_row(1.5, details={"world_size": 2}), _row(None)])
    append_rows(path, [_row(2.5)])
    rows = read_rows(path)
    assert [row.value for row in rows] == [1.5, None, 2.5]
    assert rows[0].details == {"world_size": 2}
    assert rows[0].time.endswith("+00:00")
    assert rows[0].code == code_version()


def test_a_row_that_a_crash_cut_short_is_skipped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_rows(path, [_row(1.0), _row(2.0)])
    path.write_bytes(path.read_bytes()[:-40])
    assert [row.value for row in read_rows(path)] == [1.0]
    append_rows(path, [_row(3.0)])
    assert [row.value for row in read_rows(path)] == [1.0, 3.0]


@pytest.mark.parametrize("line", ["[1]", '{"step": "cooking"}', "hello", '{"step": "detection"}'])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    append_rows(path, [_row()])
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(InputError, match=r"results\.jsonl:1 "):
        read_rows(path)


def test_rows_of_a_newer_schema_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_rows(path, [_row()])
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}) + "\n")
    with pytest.raises(InputError, match="newer"):
        read_rows(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_no_result(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        _row(value)


def test_the_newest_of_one_measurement_stands_and_others_are_kept() -> None:
    rows = [_row(1.0), _row(2.0, seed=2), _row(3.0), _row(4.0, weights="b"), _row(5.0, epoch=3)]
    rows += [_row(6.0, data="a/b"), _row(7.0, data="c/b")]
    assert [row.value for row in latest(rows)] == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_the_code_version_is_the_commit_of_the_checkout() -> None:
    root = Path(__file__).resolve().parent.parent
    head = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert code_version().removesuffix("+dirty") == head
