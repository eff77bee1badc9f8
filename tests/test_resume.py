"""A pretraining resumes its own recipe and data, from one whole state, also to more epochs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.config import load_config
from core.errors import InputError
from core.results import read_rows
from models.checkpoint import load_checkpoint, load_plain
from pretrain.recipe import PretrainConfig
from pretrain.run import pretrain
from tests.faults import COMMON, STAGES
from training import resume
from training.resume import Position
from training.schedule import Stage, changed_past


def config(data: Path, method: str = "ce", *overrides: str) -> PretrainConfig:
    words = ["method", method, *COMMON, *STAGES[method], "data.root", str(data), *overrides]
    return load_config(PretrainConfig, None, words)


@pytest.fixture(scope="module")
def done(tiny_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("done") / "run"
    pretrain(config(tiny_npz), folder)
    return folder


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    """A copy that was cut before its row was written."""
    shutil.copytree(done, tmp_path / "run")
    (tmp_path / "run" / "results.jsonl").unlink()
    return tmp_path / "run"


def change_state(folder: Path, **changes: Any) -> None:
    """Change parts of the state; a part that is None is removed."""
    content = load_plain(folder / resume.FILE) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    torch.save(kept, folder / resume.FILE)


@pytest.mark.parametrize("change", ["labels", "images", "number", "classes"])
def test_other_data_are_refused_before_a_step(
    tmp_path: Path, tiny_npz: Path, run: Path, change: str
) -> None:
    content = dict(np.load(tiny_npz))
    if change == "labels":
        content["y_train"] = content["y_train"][::-1].copy()
    elif change == "images":
        content["x_train"] = content["x_train"][:, ::-1].copy()
    elif change == "number":
        content |= {name: content[name][:-3] for name in ("x_train", "y_train")}
    else:
        content["classes"] = np.array(["red", "green", "blue", "grey"])
    np.savez(tmp_path / "other.npz", **content)
    files = (run / resume.FILE, run / "config.yaml")
    before = [file.read_bytes() for file in files]
    for overrides in ((), ("ce.stage.epochs", "3", "ce.stage.schedule", "constant")):
        with pytest.raises(InputError, match=r"begun with (data|ce.stage.schedule) = "):
            pretrain(config(tmp_path / "other.npz", "ce", *overrides), run, resume_run=True)
    assert [file.read_bytes() for file in files] == before


def test_the_same_data_elsewhere_are_the_same(tmp_path: Path, tiny_npz: Path, run: Path) -> None:
    copy = tmp_path / tiny_npz.name
    copy.write_bytes(tiny_npz.read_bytes())
    pretrain(config(copy, "ce", "data.workers", "1"), run, resume_run=True)
    assert load_config(PretrainConfig, run / "config.yaml").data.root == str(copy)


def test_more_epochs_end_at_the_weights_of_a_run_that_had_them_from_the_beginning(
    tmp_path: Path, tiny_npz: Path
) -> None:
    constant = ("ce.stage.schedule", "constant")
    longer = config(tiny_npz, "ce", *constant, "ce.stage.epochs", "3")
    whole = pretrain(longer, tmp_path / "whole")
    pretrain(config(tiny_npz, "ce", *constant), tmp_path / "run")
    last = pretrain(longer, tmp_path / "run", resume_run=True)
    assert last.name == whole.name == "epoch_0003.pth"
    one, two = load_checkpoint(whole).model, load_checkpoint(last).model
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    rows = [{row.epoch: row for row in read_rows(f.parent.parent / "results.jsonl")}
            for f in (whole, last)]  # fmt: skip
    assert list(rows[1]) == [2, 3]
    assert rows[1][3].config == rows[0][3].config
    assert rows[1][3].value == rows[0][3].value
    again = load_config(PretrainConfig, tmp_path / "run" / "config.yaml")
    assert again == longer
    with pytest.raises(InputError, match="3 epochs of stage ce have begun, more than 2"):
        pretrain(config(tiny_npz, "ce", *constant), tmp_path / "run", resume_run=True)


@pytest.mark.parametrize(
    ("old", "new", "position", "reason"),
    [
        (("cosine_epoch", 4), ("cosine_epoch", 6), (0, 0, 0), ""),  # nothing has begun
        (("cosine_epoch", 4), ("cosine_epoch", 6), (0, 0, 1), "under cosine_epoch the rates"),
        (("cosine_step", 4), ("cosine_step", 6), (0, 2, 0), "under cosine_step the rates"),
        (("multistep", 4), ("multistep", 6), (0, 4, 0), ""),
        (("constant", 4), ("constant", 3), (0, 3, 0), ""),
        (("constant", 4), ("constant", 3), (0, 3, 1), "4 epochs of stage one have begun"),
        (("constant", 4), ("constant", 6), (1, 4, 0), "stage one is over"),
    ],
)
def test_stages_may_change_where_the_rates_of_what_has_begun_stay(
    old: tuple[str, int], new: tuple[str, int], position: tuple[int, int, int], reason: str
) -> None:
    before, after = (
        [Stage("one", epochs, 0.1, 0.0, schedule, milestones=(2,)), Stage("two", 2, 0.1, 0.0)]
        for schedule, epochs in (old, new)
    )
    assert changed_past(before, after, *position).startswith(reason)
    assert bool(changed_past(before, after, *position)) == bool(reason)


def test_a_stage_that_is_to_come_may_be_longer_whatever_its_schedule() -> None:
    one = Stage("one", 4, 0.1, 0.0)
    before, after = ([one, Stage("two", epochs, 0.1, 0.0)] for epochs in (2, 3))
    assert changed_past(before, after, 0, 4, 0) == ""
    assert changed_past(before, after, 1, 4, 1) != ""


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 1}, "has version 1, but this checkout resumes version 2"),
        ({"optimizer": None}, "is incomplete: no valid 'optimizer' in it"),
        ({"position": {"epoch": 1}}, "is incomplete: no valid 'position' in it"),
        ({"objective": {}}, "does not fit this checkout: .*Missing key"),
        ({"format": "x"}, "is not a resume state of this suite"),
    ],
)
def test_a_state_that_cannot_be_used_is_one_sentence(
    tiny_npz: Path, run: Path, changes: dict[str, Any], sentence: str
) -> None:
    change_state(run, **changes)
    with pytest.raises(InputError, match=sentence):
        pretrain(config(tiny_npz), run, resume_run=True)


def test_a_removed_last_checkpoint_is_written_again(tiny_npz: Path, run: Path, done: Path) -> None:
    last = run / "checkpoints" / "epoch_0002.pth"
    last.unlink()
    assert pretrain(config(tiny_npz), run, resume_run=True) == last
    one, two = (load_checkpoint(p / "checkpoints" / last.name).model for p in (done, run))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_another_number_of_processes_is_said_and_stands_in_the_row(
    tiny_npz: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"iteration": 0, "processes": 2, "device": "cuda", "amp": "bf16"}
    change_state(run, legs=[first])
    pretrain(config(tiny_npz), run, resume_run=True)
    assert (
        "warning: 2 × cuda (amp bf16) before step 6, 1 × cpu (amp none) from there"
        in capsys.readouterr().err
    )
    (row,) = read_rows(run / "results.jsonl")
    second = {"iteration": 6, "processes": 1, "device": "cpu", "amp": "none"}
    assert row.details["legs"] == [first, second]


RANKS = """
from pathlib import Path
import torch
from core import dist
from core.errors import InputError
from training import resume
dist.init("cpu", 60)
shared, stale, empty = map(Path, sys.argv[1:4])

def load(other, check=lambda recipe, position: None):
    try:
        return resume.load_on_all(other if dist.rank() else shared, check)["position"]
    except InputError as error:
        return str(error)

def refuse(recipe, position):
    raise InputError("another recipe")

assert load(shared)["iteration"] == 6
assert "rank 1 reads another " in load(stale), load(stale)
assert "rank 1: " in load(empty) and "does not exist" in load(empty), load(empty)
assert load(shared, refuse) == "another recipe"
dist.shutdown()
"""


def test_all_ranks_resume_the_first_ones_state_or_none_does(
    tmp_path: Path, run: Path, run_ranks: Callable[..., None]
) -> None:
    stale, empty = tmp_path / "stale", tmp_path / "empty"
    stale.mkdir()
    empty.mkdir()
    (stale / resume.FILE).write_bytes((run / resume.PREVIOUS).read_bytes())
    change_state(stale, position=Position(0, True, 1, 2, 5).__dict__)
    run_ranks(RANKS, 2, run, stale, empty)


@pytest.mark.parametrize(
    ("method", "words", "sentence"),
    [
        ("ctc", "ce.label_smoothing 0.1", "ce.label_smoothing is set, but method ctc does not"),
        ("ce", "ctc.stage2.epochs 7", "ctc.stage2.epochs is set, but method ce does not read it"),
        (
            "ce",
            "ce.stage.warmup_epochs 3",
            "ce.stage.warmup_epochs 3 exceeds ce.stage.epochs 2",
        ),
        ("ctc", "ctc.stage1.milestones [1]", "milestones are set, but cosine_epoch does not read"),
    ],
)
def test_a_key_without_effect_is_refused(
    tmp_path: Path, tiny_npz: Path, method: str, words: str, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        pretrain(config(tiny_npz, method, *words.split()), tmp_path / "run")
    assert not (tmp_path / "run").exists()
