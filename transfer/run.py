"""One transfer: a backbone, a data set, its protocols; result rows come out."""

import time
from pathlib import Path
from typing import Any

from core import dist
from core.config import save_config
from core.errors import InputError
from core.files import check_not_locked
from core.identity import protocol_name, recipe_hash
from core.results import ROWS_FILE, Measured, ResultRow, append_rows
from data.catalogue import look_up
from data.datasets import places_of
from models.factory import check_image_size
from transfer.backbone import Backbone
from transfer.config import TransferConfig, changed_keys, check, recipe_of
from transfer.data import Splits, open_splits
from transfer.protocols import METHODS, NEEDS, ONE_LABEL, Transfer


def run(
    config: TransferConfig,
    backbone: Backbone,
    output: Path,
    resume: bool = False,
    recipe: TransferConfig | None = None,
) -> list[ResultRow]:
    """Evaluate a backbone and append its rows to ``output/results.jsonl``; returns them.

    Every rank of a group calls it; the first one writes.

    Args:
        recipe: what ``config`` was before single keys were changed; see ``changed_keys``.

    Raises:
        InputError: a config, data set or checkpoint that cannot be used; nothing is written.
    """
    task = opened(config, backbone, output, resume)
    rows: list[ResultRow] = []
    with dist.locked(output):
        for method in task.methods:
            started = time.monotonic()
            measured = METHODS[method](task)
            seconds = round(time.monotonic() - started, 2)
            changed = changed_keys(config, recipe or config, method)
            details = {"method": method, "seconds": seconds, "overrides": changed}
            new = [_row(task, found, details) for found in measured]
            if dist.is_main():  # kept method by method: a signal may end the next one
                save_config(config, output / "config.yaml")
                append_rows(output / ROWS_FILE, new)
            rows += new
    return rows


def opened(config: TransferConfig, backbone: Backbone, output: Path, resume: bool) -> Transfer:
    """Check everything and open the data; nothing is written."""
    unknown = [method for method in config.methods if method not in METHODS]
    if unknown or not config.methods:
        wrong = repr(unknown[0]) if unknown else "nothing"
        raise InputError(f"methods names {wrong}; known are {', '.join(METHODS)}")
    check(config)
    check_not_locked(output)
    seed = backbone.seed if config.seed < 0 else config.seed
    splits = open_splits(config.data, seed)
    methods = _fitting(config.methods, splits)
    check_image_size(backbone.model.arch, splits.test.image_size)
    task = Transfer(config, methods, backbone, splits, seed, output, resume)
    for method in methods:
        NEEDS.get(method, lambda task: None)(task)
    begun = (output / "finetune").exists()
    dist.barrier()  # before any rank makes that folder
    if "finetune" in methods and begun and not resume:
        raise InputError(
            f"{output / 'finetune'} holds a training already: give --resume to go on with it, or "
            "another --output"
        )
    return task


def _fitting(methods: list[str], splits: Splits) -> list[str]:
    """Return the methods without those that need one label an image, where it has several."""
    if splits.train.labels.ndim == 1:
        return methods
    kept = [method for method in methods if method not in ONE_LABEL]
    left_out = ", ".join(method for method in methods if method in ONE_LABEL)
    if not kept:
        raise InputError(f"{left_out} needs one label an image, {splits.train.name} has several")
    if left_out and dist.is_main():
        print(f"{splits.train.name} has several labels an image: without {left_out}", flush=True)
    return kept


def _row(task: Transfer, found: Measured, details: dict[str, Any]) -> ResultRow:
    """Return a result row.

    Another resolution, a limit and changed keys stand in the protocol's name.
    """
    config, test, backbone = task.config, task.splits.test, task.backbone
    name = found.protocol
    if test.image_size != look_up(config.data.name).image_size:
        name += f"_{test.image_size}px"
    if config.data.limit:
        name += f"_limit{config.data.limit}"
    details = details | {
        "image_size": test.image_size,
        "train_images": len(task.splits.train) + len(task.splits.val or ()),
        "test_images": len(test),
        "read_from": places_of([task.splits.train, test]),
        "arch": backbone.model.arch,
        "pretrained_on": backbone.dataset,
        "pretrain_seed": backbone.seed,
        "world_size": dist.world_size(),
    }
    return ResultRow(
        step="transfer",
        protocol=protocol_name(name, details["overrides"]),
        dataset=test.name,
        split=found.split,
        metric=found.metric,
        value=found.value,
        unit=found.unit,
        init=backbone.init,
        seed=task.seed,
        epoch=backbone.epoch,
        selection=found.selection,
        weights=backbone.sha256,
        weights_path=backbone.path,
        config=recipe_hash(recipe_of(config, details["method"])),
        data=task.data,
        version=config.version,
        run=str(task.output),
        details=details | found.details,
    )
