"""A run's log, and metrics that also go to Weights & Biases, if its package is there."""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from detectron2.utils.events import EventStorage

from core.errors import InputError
from detection.logs import WandbWriter, check_wandb, logging_to
from detection.run import run
from tests.detection_tiny import request, write_pair


class _Wandb(SimpleNamespace):
    """Stands for the package: remembers what it is told."""

    Error = RuntimeError

    def __init__(self) -> None:
        super().__init__(opened=[], logged=[], finished=0)

    def init(self, **settings: Any) -> "_Wandb":
        self.opened.append(settings)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> _Wandb:
    stand_in = _Wandb()
    stand_in.__spec__ = SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", stand_in)  # type: ignore[arg-type]
    return stand_in


def test_the_log_makes_its_folder_where_no_other_machine_has(tmp_path: Path) -> None:
    with logging_to(tmp_path / "runs" / "new", spoken=False):
        logging.getLogger("detection").info("begun")
    assert "begun" in (tmp_path / "runs/new/log.txt").read_text()


def test_each_number_is_sent_once_at_its_iteration(wandb: _Wandb, tmp_path: Path) -> None:
    writer = WandbWriter("p", tmp_path, {"seed": 1})
    with EventStorage(3) as storage:
        storage.put_scalar("loss", 2.0, smoothing_hint=False)
        writer.write()
        writer.write()
        storage.step()
        storage.put_scalar("loss", 1.0, smoothing_hint=False)
        storage.put_scalar("lr", 0.1, smoothing_hint=False)
        writer.write()
    writer.close()
    assert wandb.logged == [(3, {"loss": 2.0}), (4, {"loss": 1.0, "lr": 0.1})]
    assert wandb.finished == 1
    WandbWriter("p", tmp_path, {})
    assert wandb.opened[0]["id"] == wandb.opened[1]["id"]  # a resume goes on with the same curve
    WandbWriter("p", tmp_path / "other", {})
    assert wandb.opened[2]["id"] != wandb.opened[0]["id"]


def test_a_run_sends_its_losses_and_ap(wandb: _Wandb, tmp_path: Path) -> None:
    write_pair(tmp_path / "tiny")
    project = ["SUITE.WANDB", "transfer", "SOLVER.MAX_ITER", "1"]
    assert run(request(tmp_path / "tiny", tmp_path / "run", overrides=project)) == 0
    assert wandb.opened[0]["project"] == "transfer"
    assert wandb.opened[0]["config"]["identity"]["init"] == "random"
    sent = {name for _, values in wandb.logged for name in values}
    assert {"total_loss", "lr", "bbox/AP", "segm/AP"} <= sent
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))  # beside TensorBoard


def test_a_refusal_of_the_service_is_one_sentence(
    wandb: _Wandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**settings: Any) -> None:
        raise RuntimeError("api_key not configured\n(no tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(InputError, match=r"api_key not configured \(no tty\); `wandb login`"):
        WandbWriter("p", tmp_path, {})


def test_an_absent_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_wandb("")
    with pytest.raises(InputError, match="pip install wandb"):
        check_wandb("transfer")
