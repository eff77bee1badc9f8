"""The saved epochs of a run folder: those that can be read, and the names of those that cannot.

The schedule is read from the config in the checkpoints (or ``config.yaml``), so that an epoch
that is missing is distinguished from one that a training has not written yet.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.config import read_yaml
from core.errors import InputError
from core.results import sha256_of
from models.checkpoint import Facts, load_checkpoint
from training.schedule import saved_epochs


@dataclasses.dataclass(frozen=True)
class Epoch:
    number: int
    path: Path
    sha256: str


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The epochs of a pretraining config; empty where they are unknown."""

    saved: tuple[int, ...] = ()  # epochs that get a checkpoint, ascending
    boundary: int | None = None  # last epoch of stage 1, where there is a stage 2

    @property
    def total(self) -> int | None:
        """Return the last epoch, where it is known."""
        return self.saved[-1] if self.saved else None


@dataclasses.dataclass(frozen=True)
class Survey:
    """A run's epochs."""

    epochs: list[Epoch]  # readable, ascending
    missing: list[int]  # should lie among them
    unreadable: list[tuple[Path, str]]  # and why
    unwritten: list[int]  # later than any that is there: the training has not got so far
    facts: Facts  # of the last readable epoch
    schedule: Schedule

    def sentences(self) -> list[str]:
        """Return a sentence for each kind of epoch that is not readable, with number and names."""
        said = []
        if self.missing:
            said.append(f"{_epochs(self.missing)} missing: {_listed(self.missing)}")
        if self.unreadable:
            named = "; ".join(f"{path.name} ({reason})" for path, reason in self.unreadable)
            said.append(f"{_epochs(self.unreadable)} unreadable: {named}")
        if self.unwritten:
            said.append(f"{_epochs(self.unwritten)} not written yet: {_listed(self.unwritten)}")
        return said


def survey(run: Path, every: int = 1) -> Survey:
    """Read the run's checkpoints, all of each: a damaged one is found now, not after hours.

    Args:
        every: of the epochs, keep those that it divides, the first, the boundary and the last.

    Raises:
        InputError: no run, or not one readable epoch.
    """
    folder = run / "checkpoints"
    paths = {}
    for path in sorted(folder.glob("epoch_*.pth")) if folder.is_dir() else ():
        number = epoch_of(path)
        if number is not None:
            paths[number] = path
    if not paths:
        raise InputError(
            f"{folder} holds no epoch_XXXX.pth; --run names a folder of run_pretrain.py"
        )
    schedule = _schedule_beside(run)
    readable: list[Epoch] = []
    unreadable, facts = [], None
    for number, path in sorted(paths.items()):
        if not _wanted(number, every, schedule, max(paths)):
            continue
        try:
            found = load_checkpoint(path).facts
            if found.epoch != number:
                raise InputError(f"{path} holds epoch {found.epoch}")
        except InputError as error:
            unreadable.append((path, str(error).removeprefix(f"{path} ")))
            continue
        facts, schedule = found, schedule if schedule.saved else schedule_of(found.config)
        readable.append(Epoch(number, path, sha256_of(path)))
    if facts is None:
        raise InputError(
            f"none of {len(paths)} checkpoints in {folder} can be read: {unreadable[0][1]}"
        )
    absent = [
        n for n in schedule.saved if n not in paths and _wanted(n, every, schedule, max(paths))
    ]
    missing = [n for n in absent if n < max(paths)]
    unwritten = [n for n in absent if n > max(paths)]
    return Survey(readable, missing, unreadable, unwritten, facts, schedule)


def schedule_of(config: dict[str, Any]) -> Schedule:
    """Return the schedule in a resolved pretraining config; an empty one where it has none."""
    try:
        if config["method"] == "ctc":
            stages = [int(config["ctc"][stage]["epochs"]) for stage in ("stage1", "stage2")]
        else:
            stages = [0 if config["method"] == "random" else int(config["ce"]["stage"]["epochs"])]
        step = int(config["loop"]["save_every"])
    except (KeyError, TypeError, ValueError):
        return Schedule()
    saved = saved_epochs(stages, max(1, step))
    return Schedule(tuple(saved), stages[0] if len(stages) > 1 and stages[1] else None)


def epoch_of(path: Path) -> int | None:
    """Return the epoch in a checkpoint's file name, None if there is none."""
    digits = path.stem.removeprefix("epoch_")
    return int(digits) if path.stem.startswith("epoch_") and digits.isdigit() else None


def _schedule_beside(run: Path) -> Schedule:
    try:
        return schedule_of(read_yaml(run / "config.yaml"))
    except InputError:
        return Schedule()  # it may still be in the checkpoints


def _wanted(number: int, every: int, schedule: Schedule, last: int) -> bool:
    kept = {0, schedule.boundary, schedule.total if schedule.saved else last}
    return number % max(1, every) == 0 or number in kept


def _epochs(some: Sequence[object]) -> str:
    return f"{len(some)} epoch{'s' * (len(some) != 1)}"


def _listed(numbers: list[int]) -> str:
    if len(numbers) <= 12:
        return ", ".join(map(str, numbers))
    return f"{', '.join(map(str, numbers[:6]))}, … {numbers[-1]}"
