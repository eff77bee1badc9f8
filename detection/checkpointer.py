"""Checkpoints of a detection run: atomic, checksummed; the newest whole one is found by itself.

The files are detectron2's (``model_0004999.pth`` after 5,000 iterations, ``model_final.pth``,
``last_checkpoint``) and load there. fvcore writes straight to the final name and trusts
``last_checkpoint``; here a file is renamed into place when it is complete, and a resume reads the
newest one that is whole, whatever ``last_checkpoint`` says.
"""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from core import dist
from core.errors import InputError, Stopped
from detection.logs import say
from models.checkpoint import atomic_file, load_plain, newest_valid, save_atomically
from training import resume

NUMBERED = re.compile(r"model_(\d{7})\.pth")
FINAL = "model_final.pth"


@dataclasses.dataclass(frozen=True)
class Checkpointer:
    """Saves and finds the checkpoints of one run folder.

    Args:
        folder: OUTPUT_DIR.
        keep_last: numbered checkpoints that stay, besides the milestones; 0 keeps all.
        milestone_period: iterations between checkpoints that always stay; 0: none.
        facts: what the files say of themselves (input convention, classes, config hash …).
    """

    folder: Path
    keep_last: int = 0
    milestone_period: int = 0
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, trainer: Any, final: bool = False) -> Path:
        """Write the state after the trainer's current iteration (rank 0 only)."""
        done = trainer.iter + 1
        path = self.folder / (FINAL if final else f"model_{trainer.iter:07d}.pth")
        content = {
            "model": bare(trainer.model).state_dict(),
            "trainer": trainer.state_dict(),
            "iteration": trainer.iter,
            "world_size": comm.get_world_size(),
            "facts": self.facts,
            "__author__": "transfer-suite",
            "matching_heuristics": False,
        }
        save_atomically(content, path)
        with atomic_file(self.folder / "last_checkpoint") as file:
            file.write(path.name.encode())
        self._prune(done)
        return path

    def files(self) -> list[Path]:
        """Return the checkpoints of the folder, the newest first."""
        numbered = {path: NUMBERED.fullmatch(path.name) for path in self.folder.glob("model_*.pth")}
        found = sorted((int(m[1]), path) for path, m in numbered.items() if m)
        final = [self.folder / FINAL] if (self.folder / FINAL).is_file() else []
        return final + [path for _, path in reversed(found)]

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint that is whole; damaged ones are named and passed over."""
        return newest_valid(self.files(), _read_or_say)

    def newest_on_all(self) -> tuple[Path, dict[str, Any]] | None:
        """Return on every rank the newest whole checkpoint that the first one finds.

        Raises:
            InputError: on every rank; a rank reads another one.
        """
        return resume.read_on_all(
            self.newest,
            lambda path: _read(self.folder / path.name),
            lambda content: content["iteration"],
        )

    def _prune(self, done: int) -> None:
        """Remove all but the last and the milestones.

        Files of later iterations than ``done`` are damaged ones that a resume has passed over: they
        stay until they are overwritten, and are not counted, or they would displace whole ones.
        """
        if self.keep_last <= 0:
            return
        numbered = [(_iterations(path), path) for path in self.files() if path.name != FINAL]
        for iterations, path in [pair for pair in numbered if pair[0] <= done][self.keep_last :]:
            if not self.milestone_period or iterations % self.milestone_period:
                path.unlink(missing_ok=True)


class SaveHook(HookBase):
    """Saves every ``period`` iterations and, as ``model_final.pth``, after the last one."""

    def __init__(self, checkpointer: Checkpointer, period: int) -> None:
        self.checkpointer, self.period = checkpointer, period

    def after_step(self) -> None:
        if not comm.is_main_process():
            return
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter:
            self.checkpointer.save(self.trainer, final=True)
        elif self.period > 0 and done % self.period == 0:
            self.checkpointer.save(self.trainer)


class StopOnSignal(HookBase):
    """Saves after the iteration in which a stop signal has reached any rank, and ends the run.

    After the last iteration nothing is left to save, and the signal acts at once.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer

    def before_train(self) -> None:
        self.trainer.stop.__enter__()

    def after_step(self) -> None:
        """Save on the first rank, then raise ``Stopped`` on all."""
        if not self.trainer.must_stop or self.trainer.iter + 1 >= self.trainer.max_iter:
            return
        name = dist.from_main(lambda: self.checkpointer.save(self.trainer).name)
        raise Stopped(
            f"stopped by a signal after {self.trainer.iter + 1} iterations; {name} is saved: go on "
            "with --resume"
        )

    def after_train(self) -> None:
        self.trainer.stop.__exit__(*sys.exc_info())


def restore(trainer: Any, content: dict[str, Any]) -> int:
    """Put a trainer where a checkpoint stands: model, optimiser, schedule, data.

    Its hooks must have been registered: the schedule is one of them.

    Returns:
        The iteration to go on with.

    Raises:
        InputError: the checkpoint lacks something, or is of another network.
    """
    try:
        bare(trainer.model).load_state_dict(content["model"])
        trainer.load_state_dict(content["trainer"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"the checkpoint to resume from does not fit the run: {said}") from None
    start = int(content["iteration"]) + 1
    batches = trainer.data_loader.again(start)
    trainer.reset_data_loader(lambda: batches)
    return start


def bare(model: nn.Module) -> nn.Module:
    """Return the model without its DistributedDataParallel wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _iterations(path: Path) -> int:
    return int(path.stem.removeprefix("model_")) + 1


def _read_or_say(path: Path) -> dict[str, Any]:
    try:
        return _read(path)
    except InputError as error:
        say(f"warning: {error}; going back to the one before")
        raise


def _read(path: Path) -> dict[str, Any]:
    content = load_plain(path, map_location=torch.device("cpu"))
    content = content if isinstance(content, dict) else {}
    kinds = {"model": dict, "trainer": dict, "iteration": int, "world_size": int}
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise InputError(f"{path} is not a checkpoint of a detection run: no {key!r}")
    for key in ("hooks", "optimizer"):  # detectron2 goes on without them, from a new schedule
        if key not in content["trainer"]:
            raise InputError(f"{path} is not a checkpoint of a detection run: no state of {key!r}")
    return content
