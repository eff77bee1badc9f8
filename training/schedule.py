"""Learning rate over a stage of training: a pure function of how far the stage has come."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

SCHEDULES = ("cosine_epoch", "cosine_step", "multistep", "constant")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of training with its own schedule and weight decay."""

    name: str
    epochs: int
    lr: float  # base learning rate at the stage's own batch size (no scaling is applied here)
    weight_decay: float
    schedule: str = "cosine_epoch"  # one of SCHEDULES
    warmup_epochs: float = 0.0  # linear from 0; the value follows the schedule's own unit
    end_factor: float = 0.0  # cosine ends at lr × end_factor
    milestones: tuple[int, ...] = ()  # multistep: epochs after which lr is multiplied by gamma
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}")


def learning_rate(stage: Stage, epoch: int, fraction: float = 0.0) -> float:
    """Return the learning rate in ``epoch`` (0-based within the stage) at ``fraction`` of it.

    ``cosine_epoch`` is the schedule of the released CTC code: constant within epoch e = 1..E,
    end + (lr − end)·½(1 + cos(πe/(E+1))); its warm-up gives lr·e/W in epochs e ≤ W and then
    joins the cosine where it stands. ``cosine_step`` goes from lr to end continuously, after the
    warm-up. ``fraction`` in [0, 1).
    """
    end = stage.lr * stage.end_factor
    if stage.schedule == "cosine_epoch":
        number = epoch + 1
        if number <= stage.warmup_epochs:
            return stage.lr * number / stage.warmup_epochs
        return _cosine(stage.lr, end, number / (stage.epochs + 1))
    progress = epoch + fraction
    if progress < stage.warmup_epochs:
        return stage.lr * progress / stage.warmup_epochs
    if stage.schedule == "cosine_step":
        rest = max(stage.epochs - stage.warmup_epochs, 1e-12)
        return _cosine(stage.lr, end, min((progress - stage.warmup_epochs) / rest, 1.0))
    if stage.schedule == "multistep":
        return stage.lr * stage.gamma ** sum(epoch >= milestone for milestone in stage.milestones)
    return stage.lr


def saved_epochs(stages: Sequence[int], every: int) -> list[int]:
    """Return the epochs whose weights are saved, ascending: 0, each stage's end, every so many.

    Args:
        stages: epochs of each stage.
        every: a checkpoint's period in epochs.
    """
    ends = list(itertools.accumulate(stages))
    return sorted({*range(0, ends[-1] + 1, every), *ends})


def changed_past(
    old: Sequence[Stage], new: Sequence[Stage], stage: int, epoch: int, step: int
) -> str:
    """Return why a run cannot go on under new stages, "" if it can.

    It can if they give the same rates to all epochs that have begun.

    Args:
        stage: number of the stage that the run is in.
        epoch: finished epochs over all stages.
        step: finished steps of the epoch after these.
    """
    first = 0
    for number, (was, now) in enumerate(zip(old, new, strict=True)):
        begun = min(max(epoch + (step > 0) - first, 0), was.epochs)
        first += was.epochs
        if was == now:
            continue
        if number < stage:
            return f"stage {was.name} is over"
        if now.epochs < begun:
            return f"{begun} epochs of stage {was.name} have begun, more than {now.epochs}"
        for past in range(begun):
            if any(learning_rate(was, past, x) != learning_rate(now, past, x) for x in (0, 0.5)):
                return (
                    f"under {was.schedule} the rates of the epochs already trained depend on their "
                    "number"
                )
    return ""


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
