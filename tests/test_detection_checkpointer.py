"""Which checkpoints of a detection run stay, and which one a resume starts from."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detection.checkpointer import Checkpointer


def _trainer(done: int) -> Any:
    """Return what stands for a trainer that has just done ``done`` iterations."""
    state = {"hooks": {}, "optimizer": {}}
    return SimpleNamespace(iter=done - 1, model=torch.nn.Linear(1, 1), state_dict=lambda: state)


def _names(folder: Path) -> list[int]:
    """Return the iterations after which the folder's numbered checkpoints were saved."""
    return sorted(int(p.stem.removeprefix("model_")) + 1 for p in folder.glob("model_0*.pth"))


@pytest.mark.parametrize(
    ("keep", "period", "stay"),
    [
        (0, 0, [2, 4, 6, 8, 10, 12]),
        (2, 0, [10, 12]),
        (1, 6, [6, 12]),
        (2, 4, [4, 8, 10, 12]),
    ],
)
def test_the_last_and_the_milestones_stay(
    tmp_path: Path, keep: int, period: int, stay: list[int]
) -> None:
    for done in range(2, 13, 2):
        Checkpointer(tmp_path, keep, period).save(_trainer(done))  # anew, as after a resume
    Checkpointer(tmp_path, keep, period).save(_trainer(14), final=True)
    assert _names(tmp_path) == stay
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    found = Checkpointer(tmp_path).newest()
    assert found is not None
    assert found[1]["iteration"] == 13


def test_a_damaged_newer_file_does_not_displace_whole_ones(tmp_path: Path) -> None:
    """With one checkpoint kept, counting the damaged one would leave nothing to resume from."""
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    checkpointer.save(_trainer(4))
    (tmp_path / "model_0000009.pth").write_bytes(b"PK cut short")
    checkpointer.save(_trainer(6))  # the run has gone on from 4
    assert _names(tmp_path) == [6, 10]
    found = checkpointer.newest()
    assert found is not None
    assert found[1]["iteration"] == 5
    checkpointer.save(_trainer(10))  # the run has got there: the damaged file is replaced
    assert _names(tmp_path) == [10]


def test_a_truncated_final_checkpoint_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("detection"), "propagate", True)
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    checkpointer.save(_trainer(4))
    path = checkpointer.save(_trainer(6), final=True)
    path.write_bytes(path.read_bytes()[:-100])
    with caplog.at_level(logging.INFO, "detection"):
        found = checkpointer.newest()
    assert found is not None
    assert found[0].name == "model_0000003.pth"
    assert "model_final.pth is truncated" in caplog.text


def test_a_folder_without_a_whole_checkpoint_has_none(tmp_path: Path) -> None:
    (tmp_path / "model_0000001.pth").write_bytes(b"")
    torch.save({"model": {}}, tmp_path / "model_0000003.pth")  # another tool's
    assert Checkpointer(tmp_path).newest() is None
