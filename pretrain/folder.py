"""The folder of a pretraining: what may begin or resume in it, and where its files are."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.config import load_config, save_config
from core.errors import InputError
from core.files import check_folder, check_not_locked, is_empty, sweep
from core.results import ROWS_FILE, read_rows
from pretrain.recipe import PretrainConfig, identifying
from training import resume
from training.resume import Position
from training.schedule import changed_past

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
STAGE_KEYS = {"ce": "ce.stage", "ctc1": "ctc.stage1", "ctc2": "ctc.stage2"}  # by stage


def prepare_folder(folder: Path, config: PretrainConfig, resume_run: bool) -> bool:
    """Check that a fresh run starts in an empty folder and a resumed one in its own.

    Returns whether there is a state to go on from. A run that was killed before its first one has
    only a config, and perhaps its initialisation: resumed, it starts at the beginning.

    Raises:
        InputError: the folder is in use, not empty, or of another recipe.
    """
    check_folder(folder)
    check_not_locked(folder)  # now, not after the data are listed
    if resume_run and (folder / CONFIG).exists() and not resume.is_there(folder):
        begun = load_config(PretrainConfig, folder / CONFIG)
        resume.check_recipe(folder, identifying(begun), identifying(config))
        return False
    if resume_run:
        state = resume.load(folder)[1]
        position = Position(**state["position"])
        check_resumable(folder, config, state["recipe"], position)
    else:
        check_empty(folder)
    return resume_run


def check_empty(folder: Path) -> None:
    """Raise InputError unless a fresh run can start in a folder."""
    if not is_empty(folder):
        raise InputError(f"{folder} is not empty: go on with --resume, or choose another --output")


def begin(folder: Path, config: PretrainConfig, resume_run: bool, has_state: bool) -> None:
    """Remove half-written files from a locked folder; save the config of a run without state."""
    if not resume_run:
        check_empty(folder)  # again: another run may have begun while the data were listed
    for place in (folder, folder / CHECKPOINTS):
        sweep(place)
    if not has_state:
        save_config(config, folder / CONFIG)


def is_recorded(folder: Path, epoch: int) -> bool:
    """Whether the run's result row is written: a kill may come between the last state and it."""
    rows = folder / ROWS_FILE
    return rows.exists() and any(
        (row.step, row.epoch) == ("pretrain", epoch) for row in read_rows(rows)
    )


def check_resumable(
    folder: Path,
    config: PretrainConfig,
    begun: Mapping[str, Any],
    position: Position,
    data: str = "",
) -> None:
    """Raise InputError unless a run can go on under a config: the same one, or with other epochs.

    Args:
        begun: the recipe of the run's state, by key.
        data: digest of the training images and labels; "": not known yet.
    """
    now = identifying(config) | {"data": data or begun["data"]}
    epochs = {stage: f"{key}.epochs" for stage, key in STAGE_KEYS.items()}
    kept = {key: begun[key] for key in epochs.values() if key in begun}
    resume.check_recipe(folder, begun, now | kept)
    stages = config.ctc.stages() if config.method == "ctc" else config.ce.stages()
    before = [dataclasses.replace(s, epochs=kept.get(epochs[s.name], s.epochs)) for s in stages]
    reason = changed_past(before, stages, position.stage, position.epoch, position.step)
    if reason:
        raise InputError(f"{folder} cannot go on with other epochs: {reason}")


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """Return where the weights of an epoch lie."""
    return folder / CHECKPOINTS / f"epoch_{epoch:04d}.pth"
