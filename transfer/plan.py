"""What a transfer will take: images, steps, time, disk.

The time is that of an earlier one beside it: the same config, another initialisation or seed.
"""

import dataclasses
from pathlib import Path

import yaml

from core import dist
from core.config import load_config, to_dict
from core.disk import Disk, Files, free_bytes
from core.errors import InputError
from core.identity import announcement, recipe_hash
from core.progress import format_seconds
from core.results import ROWS_FILE, read_rows
from transfer import run
from transfer.backbone import Backbone
from transfer.config import TransferConfig, recipe_of, stored_dtype
from transfer.protocols import Transfer

OF_FEATURES = ("linear", "knn", "few_shot")  # methods that read features, computed once and cached
FEATURE_BYTES = {"float32": 4, "float16": 2}


def plan(config: TransferConfig, backbone: Backbone, output: Path, resume: bool = False) -> str:
    """Return what ``run.run`` would do, after all checks that need no features.

    Raises:
        InputError: as ``run.run``.
    """
    task = run.opened(config, backbone, output, resume)
    train, test = task.splits.train, task.splits.test
    lines = [
        f"{', '.join(task.methods)} of {backbone.init} ({backbone.model.arch}) on {train.name}: "
        f"{len(train) + len(task.splits.val or ())} training images, {len(test)} of "
        f"{test.split}, {task.splits.classes} classes, seed {task.seed}",
        f"into {output}",
    ]
    if "finetune" in task.methods:
        grid = len(config.finetune.lr) * len(config.finetune.weight_decay)
        trainings = grid + 1 if grid > 1 else 1
        each = f"{config.finetune.epochs} epochs" if config.finetune.epochs else (
            f"{config.finetune.steps} steps"
        )  # fmt: skip
        lines.append(f"trainings: {trainings} of {each} of {config.loop.batch_size} images")
    lines += [f"time: {expected_time(config, backbone.model.arch, output)}", f"disk: {disk(task)}"]
    recipes = [recipe_hash(recipe_of(config, method)) for method in task.methods]
    lines.append(announcement(recipes, task.data, config.version))
    resolved = yaml.safe_dump(to_dict(config), sort_keys=False)
    return resolved + "\n".join(f"# {line}" for line in lines)


def expected_time(config: TransferConfig, arch: str, output: Path) -> str:
    """Return how long an earlier transfer of this config and network took, if there is one."""
    alike = {"world_size": dist.world_size(), "arch": arch}
    for file in sorted(output.absolute().parent.glob(f"*/{ROWS_FILE}")):
        try:
            rows = [r for r in read_rows(file) if alike.items() <= r.details.items()]
            before = load_config(TransferConfig, file.parent / "config.yaml")
            seconds = {r.details["method"]: r.details["seconds"] for r in rows}  # each one's newest
        except (InputError, OSError, ValueError, KeyError):  # another version, or damaged
            continue
        if rows and dataclasses.replace(before, seed=config.seed) == config:
            took = format_seconds(sum(seconds.values()))
            return f"{took}, as {file.parent} took (features may be cached)"
    return "not known; the progress will show it"


def disk(task: Transfer) -> Disk:
    """Return what cached features, and the fine-tuned network with its states, need."""
    config, model = task.config, task.backbone.model
    files = []
    if set(task.methods) & set(OF_FEATURES) and config.features.cache != "none":
        images = sum(map(len, (task.splits.train, task.splits.val or (), task.splits.test)))
        dtype = stored_dtype(config.features, len(task.splits.train))
        each = images * model.head_hidden_size * FEATURE_BYTES[dtype]
        files.append(Files(1, "feature file", each))
    if "finetune" in task.methods:
        weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        files.append(Files(1, "checkpoint", weights))
        files.append(Files(3, "resume state", 2 * weights))  # the newest in the making
    return Disk(tuple(files), free_bytes(task.output))
