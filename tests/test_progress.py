"""Progress in a log: plain lines, an honest ETA, and silence where another process speaks."""

import pytest

from core import progress
from core.progress import Progress, format_seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_at_most_every_ten_seconds_and_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Progress(40, "train")
    for _ in range(40):
        clock[0] += 1.0
        bar.update(1, loss=0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0] == "train: 10/40  eta 0:30  loss 0.5"
    assert lines[-1] == "train: 40/40  eta 0:00  loss 0.5"
    assert not any("\r" in line for line in lines)


def test_the_eta_counts_only_this_runs_own_speed(clock: list[float]) -> None:
    bar = Progress(100, "train", done=50)
    assert format_seconds(bar.eta()) == "--:--"
    clock[0] = 20.0
    bar.update(10)
    assert bar.eta() == pytest.approx(80.0)
    assert bar.rate() == pytest.approx(0.5)


def test_a_lap_leaves_out_what_is_between_laps(clock: list[float]) -> None:
    bar = Progress(100, "train")
    clock[0] = 10.0
    bar.update(20)
    assert bar.lap_rate() == pytest.approx(2.0)
    clock[0] = 50.0  # an evaluation
    bar.start_lap()
    clock[0] = 60.0
    bar.update(40)
    assert bar.lap_rate() == pytest.approx(4.0)


def test_a_quiet_one_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, "x", quiet=True) as bar:
        bar.update()
        bar.say("hello")
    assert capsys.readouterr().err == ""


def test_seconds_read_as_a_clock() -> None:
    assert [format_seconds(s) for s in (3, 63.4, 3723)] == ["0:03", "1:03", "1:02:03"]
