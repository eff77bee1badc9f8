"""kill -9 and full disks: whatever the moment, ``--resume`` ends at the uninterrupted run."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from core.files import ENDING
from core.results import read_rows
from models import checkpoint
from tests import faults
from tests.faults import TINY, Fault
from training import resume

STEPS = 12  # of the tiny run: 4 epochs of 3


@pytest.fixture(scope="module")
def words(tiny_npz: Path) -> list[str]:
    return [*TINY, "data.root", str(tiny_npz)]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing befell."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    said = folder.parent / "said.txt"
    assert faults.run(["ctc", "--output", str(folder), *words], said) == 0, said.read_text()
    return folder


class Cut:
    """A run that is started, killed, and resumed."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.folder, self.words, self.said = folder, words, folder.with_suffix(".txt")

    def go_on(self, fault: Fault | None = None) -> int:
        begun = self.folder.exists() and (self.folder / "config.yaml").exists()
        more = ["--resume"] if begun else self.words
        return faults.run(["ctc", "--output", str(self.folder), *more], self.said, fault)

    def finish(self) -> None:
        assert self.go_on() == 0, self.said.read_text()


def assert_equal(one: Any, two: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        for left, right in zip(one, two, strict=True):
            assert_equal(left, right)
    else:
        assert one == two


def assert_same_run(whole: Path, cut: Path) -> None:
    """Weights of every epoch, resume state, log and row are equal, and nothing else is left."""
    files = [
        sorted(p.relative_to(run) for p in run.rglob("*") if p.is_file()) for run in (whole, cut)
    ]
    assert files[0] == files[1]
    for name in files[0]:
        if name.match("epoch_*.pth"):
            one, two = (checkpoint.load_checkpoint(run / name).model for run in (whole, cut))
            assert_equal(one, two)
    one, two = (checkpoint.load_plain(run / resume.FILE) for run in (whole, cut))
    assert_equal(one, two)
    logs = [[json.loads(line) for line in (run / "log.jsonl").open()] for run in (whole, cut)]
    for log in logs:
        assert [line["iteration"] for line in log] == [*range(1, STEPS + 1), STEPS]
        for line in log:
            line.pop("images_per_second", None)
    assert logs[0] == logs[1]
    (row,), (other,) = (read_rows(run / "results.jsonl") for run in (whole, cut))
    assert row.value == other.value


def killed_at(moments: list[Fault], whole: Path, words: list[str], folder: Path) -> None:
    """Kill one run after the other at each moment in turn, resume, and compare at the end."""
    number, done = 0, 0
    cut = Cut(folder / "cut0", words)
    while done < len(moments):
        status = cut.go_on(moments[done])
        if status == 0:  # it was done before the moment came: the next run will meet it
            assert_same_run(whole, cut.folder)
            number += 1
            cut = Cut(folder / f"cut{number}", words)
            continue
        assert status == -9, f"{moments[done]}: {status}\n{cut.said.read_text()}"
        done += 1
    cut.finish()
    assert_same_run(whole, cut.folder)


@pytest.mark.parametrize(
    "moments",
    [
        [("before a rename", 1), ("half a save", 1), ("before a rename", 3)],
        [("before a checkpoint", 1), ("after a rename", 3), ("half a log line", 2)],
        [("before the row", 1)],
    ],
    ids=["a save cut in two", "between files", "before the row"],
)
def test_killed_while_it_saves_and_resumed_equals_uninterrupted(
    tmp_path: Path, whole: Path, words: list[str], moments: list[tuple[str, int]]
) -> None:
    killed_at([Fault(*moment) for moment in moments], whole, words, tmp_path)


def test_killed_at_twenty_random_moments_equals_uninterrupted(
    tmp_path: Path, whole: Path, words: list[str]
) -> None:
    dice = random.Random(20)
    often = [place for place in faults.PLACES if "row" not in place]
    places = [*often, "half a save", "half a log line"]
    moments = [Fault(dice.choice(places), dice.randint(1, 6)) for _ in range(12)]
    moments += [Fault("clock", dice.randint(1, 800)) for _ in range(6)]
    moments += [Fault("before the row"), Fault("after the row")]
    dice.shuffle(moments)
    killed_at(moments, whole, words, tmp_path)


def test_a_flipped_bit_in_the_newest_state_is_noticed_and_the_one_before_it_goes_on(
    tmp_path: Path, whole: Path, words: list[str]
) -> None:
    cut = Cut(tmp_path / "cut", words)
    assert cut.go_on(Fault("after a state", 5)) == -9
    newest = cut.folder / resume.FILE
    content = bytearray(newest.read_bytes())
    content[len(content) // 3] ^= 16
    newest.write_bytes(content)
    cut.finish()
    assert f"{newest} is damaged: going on from {resume.PREVIOUS}" in cut.said.read_text()
    newest_after = checkpoint.load_plain(newest)
    assert newest_after["position"]["iteration"] == STEPS
    assert_equal(checkpoint.load_plain(whole / resume.FILE)["objective"], newest_after["objective"])


def test_whatever_bit_is_flipped_a_state_reads_as_it_was_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "state.pth"
    original = {"w": torch.arange(64.0), "step": 3, "nested": [{"b": torch.ones(3, 3)}]}
    checkpoint.save_atomically(original, path)
    content = path.read_bytes()
    refused = 0
    directory = content.index(b"PK\x01\x02")
    for position in [*range(0, directory, 9), *range(directory, len(content), 2)]:
        for bit in {position % 8, 4}:  # 4 is what marks an entry of a zip file as a folder
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            found = checkpoint.newest_valid([path], checkpoint.load_plain)
            refused += found is None
            if found is not None:
                assert_equal(found[1], original)
    assert refused > 200


def test_a_full_disk_ends_it_with_one_sentence_and_the_old_state_whole(
    tmp_path: Path, whole: Path, words: list[str]
) -> None:
    """A limit on the size of files stands for the disk: the kernel cuts the write short."""
    cut = Cut(tmp_path / "cut", words)
    assert cut.go_on(Fault("after a state", 5)) == -9
    before = (cut.folder / resume.FILE).read_bytes()
    cut.said.write_text("")
    assert cut.go_on(Fault(file_limit=len(before) // 2)) == 2
    (sentence,) = [line for line in cut.said.read_text().splitlines() if "error" in line.lower()]
    assert sentence.startswith("error: no space left to write")
    assert sentence.endswith("the older file is intact")
    assert (cut.folder / resume.FILE).read_bytes() == before
    assert not list(cut.folder.rglob(f"*{ENDING}"))
    cut.finish()
    assert_same_run(whole, cut.folder)
