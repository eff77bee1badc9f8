"""Expected steps, time and disk space of a pretraining.

The time is taken from an earlier run beside this one, of the same recipe on as many processes.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from core import dist
from core.config import load_config, to_dict
from core.disk import Disk, Files, free_bytes
from core.errors import InputError
from core.identity import announcement, data_digest, recipe_hash
from core.progress import format_seconds
from core.results import ROWS_FILE, read_rows
from pretrain import run
from pretrain.folder import CONFIG, prepare_folder
from pretrain.memory import DTYPES
from pretrain.recipe import CTCConfig, PretrainConfig, identifying, recipe_of
from training import resume
from training.loop import Objective
from training.schedule import saved_epochs


def plan(config: PretrainConfig, folder: Path, resume_run: bool) -> str:
    """Return what ``run.pretrain`` would do, after all checks that need no training.

    Raises:
        InputError: as ``run.pretrain``.
    """
    prepare_folder(folder, config, resume_run)
    dataset, held_out, objective = run.make_ready(config)
    data = data_digest([dataset.digest], [held_out.digest])
    epochs = sum(stage.epochs for stage in objective.stages())
    device = dist.pick_device(config.loop.device)
    return "\n".join(
        [
            yaml.safe_dump(to_dict(config), sort_keys=False).rstrip(),
            f"# {run.describe(config, dataset, epochs, device)}",
            f"# into {folder}",
            f"# time: {expected_time(config, folder)}",
            f"# disk: {disk(config, folder, objective, len(dataset))}",
            f"# {announcement([recipe_hash(recipe_of(config))], data, config.version)}",
        ]
    )


def expected_time(config: PretrainConfig, folder: Path) -> str:
    """Return the training time of an earlier run of the same recipe, or that it is not known."""
    here = {"world_size": dist.world_size(), "device": dist.pick_device(config.loop.device).type}
    for file in sorted(folder.absolute().parent.glob(f"*/{ROWS_FILE}")):
        try:
            if not any(r.step == "pretrain" and here.items() <= r.details.items()
                       for r in read_rows(file)):  # fmt: skip
                continue
            before = load_config(PretrainConfig, file.parent / CONFIG)
            alike = dataclasses.replace(before, seed=config.seed)
            if identifying(alike) != identifying(config):
                continue
            seconds = trained_seconds(file.parent / resume.LOG, config.loop.batch_size)
        except (InputError, OSError, ValueError, KeyError):  # another version, or damaged
            continue
        return f"{format_seconds(seconds)}, as {file.parent} took, evaluation not counted"
    return "not known; the first steps will show it"


def trained_seconds(log: Path, batch: int) -> float:
    """Return the seconds that the steps in a run's log took, from their images per second."""
    seconds, before = 0.0, 0
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry.get("images_per_second"):
            seconds += (entry["iteration"] - before) * batch / entry["images_per_second"]
            before = entry["iteration"]
    return seconds


def disk(config: PretrainConfig, folder: Path, objective: Objective, images: int) -> Disk:
    """Return the disk space of a run's checkpoints and states; three states exist at a time.

    Args:
        images: N of the training set, the rows of CTC's banks.
    """
    model: Any = objective.model
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    momentum = sum(p.numel() * p.element_size() for p in model.parameters())
    state = weights + (momentum if config.loop.momentum else 0)
    if config.method == "ctc":
        state += max(_stage_bytes(config.ctc, images, weights))
    kept = saved_epochs([stage.epochs for stage in objective.stages()], config.loop.save_every)
    files = [Files(len(kept), "checkpoint", weights)]
    if kept[-1]:
        files.append(Files(3, "resume state", state))
    return Disk(tuple(files), free_bytes(folder))


def _stage_bytes(ctc: CTCConfig, images: int, weights: int) -> tuple[int, int]:
    """Return the banks of stage 1, and those of stage 2 with the frozen network."""
    number = DTYPES[ctc.bank_dtype].itemsize
    first = images * ctc.dim1 * number if ctc.alpha else 0
    second = 2 * images * ctc.dim2 * number + weights if ctc.beta else 0
    return first, second
