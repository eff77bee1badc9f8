"""CTC cut at every kind of moment, on one process and on two, resumes to the uninterrupted run.

The whole recipe runs: both stages, the refresh of the banks between them, result row and log.
"""

from pathlib import Path
from typing import Any

import pytest

from core.errors import STOPPED_STATUS
from models import checkpoint
from tests import faults
from tests.faults import TINY, Fault
from tests.test_kill import assert_same_run
from tests.test_lost_ranks import start_ranks
from training import resume

SECONDS = 100  # in which a run of 12 steps must have ended
RECIPES = {
    "replicated": ["ctc.bank_refresh", "true"],
    "sharded": ["ctc.bank_refresh", "true", "ctc.bank_sharding", "sharded"],
    "fp16": ["loop.amp", "fp16", "ctc.bank_dtype", "fp16"],  # has a scaler whose state counts
}
CUTS = {  # stage 1 is 2 epochs of 3 steps, so is stage 2; a state is written after every step
    "mid-epoch": Fault("after a step", 5),
    "end of an epoch": Fault("after a state", 3),
    "between the stages": Fault("after a state", 6),
    "during the refresh": Fault("in the refresh", 2),
    "in stage 2": Fault("before a step", 9),
}


def go(folder: Path, recipe: list[str], ranks: int, fault: Fault | None = None) -> list[int]:
    """Start the run, or go on with it; return the exit statuses. A fault befalls the last rank."""
    more = ["--resume"] if (folder / resume.FILE).exists() else recipe
    words = ["ctc", "--output", str(folder), *more]
    said = folder.with_suffix(".txt")
    if ranks == 1:
        return [faults.run(words, said, fault, SECONDS)]
    processes = start_ranks(words, said, fault or Fault(), ranks - 1)
    try:
        for process in processes:
            process.join(SECONDS)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def whole(tiny_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the run that nothing befell and its words, by recipe and number of ranks."""
    folder, done = tmp_path_factory.mktemp("whole"), dict[tuple[str, int], Path]()

    def run(name: str, ranks: int) -> tuple[Path, list[str]]:
        words = [*TINY, "data.root", str(tiny_npz), "loop.timeout", "30", *RECIPES[name]]
        if (name, ranks) not in done:
            done[name, ranks] = folder / f"{name}{ranks}"
            assert go(done[name, ranks], words, ranks) == [0] * ranks
        return done[name, ranks], words

    return run


QUICK = [
    *[("replicated", 2, cut) for cut in CUTS],
    ("replicated", 1, "during the refresh"),
    ("sharded", 2, "during the refresh"),
]
SLOW = [
    pytest.param(name, ranks, cut, marks=pytest.mark.slow)
    for name, ranks in (("replicated", 1), ("sharded", 2))
    for cut in CUTS
    if cut != "during the refresh"
]


@pytest.mark.parametrize(("name", "ranks", "cut"), [*QUICK, *SLOW])
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, whole: Any, name: str, ranks: int, cut: str
) -> None:
    expected, words = whole(name, ranks)
    statuses = go(tmp_path / "run", words, ranks, CUTS[cut])
    assert statuses == [1] * (ranks - 1) + [-9], statuses  # the others end with a sentence
    stands = checkpoint.load_plain(tmp_path / "run" / resume.FILE)["position"]
    assert stands["stage"] == (1 if cut == "in stage 2" else 0)
    assert go(tmp_path / "run", words, ranks) == [0] * ranks
    assert_same_run(expected, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "ranks", "where", "count", "signal_name"),
    [
        ("replicated", 1, "before a step", 4, "SIGUSR1"),
        ("replicated", 2, "in the refresh", 2, "SIGTERM"),
        ("fp16", 1, "before a step", 8, "SIGTERM"),
    ],
)
def test_a_signal_saves_at_the_end_of_the_step_with_its_status_and_resumes(
    tmp_path: Path, whole: Any, name: str, ranks: int, where: str, count: int, signal_name: str
) -> None:
    expected, words = whole(name, ranks)
    fault = Fault(where, count, signal=signal_name)
    assert go(tmp_path / "run", words, ranks, fault) == [STOPPED_STATUS] * ranks
    stands = checkpoint.load_plain(tmp_path / "run" / resume.FILE)["position"]
    assert stands["iteration"] >= (7 if where == "in the refresh" else count)
    assert go(tmp_path / "run", words, ranks) == [0] * ranks
    assert_same_run(expected, tmp_path / "run")
