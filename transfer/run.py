"""One transfer: a backbone, a data set, its protocols; result rows come out."""

import time
from pathlib import Path
from typing import Any

from core import dist
from core.config import save_config
from core.errors import InputError
from core.files import check_not_locked
from core.identity import recipe_hash
from core.results import ROWS_FILE, ResultRow, append_rows
from data.catalogue import look_up
from data.datasets import places_of
from transfer.backbone import Backbone
from transfer.config import TransferConfig, changed_keys, check, methods_of, recipe_of
from transfer.data import open_splits
from transfer.protocols import METHODS, NEEDS, Outcome, Transfer


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
        recipe: what ``config`` was before single keys were changed; the rows of a method that
            reads one of these have a protocol's name of their own.

    Raises:
        InputError: a config, data set or checkpoint that cannot be used; nothing is written.
    """
    unit = opened(config, backbone, output, resume)
    rows: list[ResultRow] = []
    with dist.locked(output):
        for method in unit.methods:
            started = time.monotonic()
            outcomes = METHODS[method](unit)
            seconds = round(time.monotonic() - started, 2)
            changed = changed_keys(config, recipe or config, method)
            details = {"method": method, "seconds": seconds, "overrides": changed}
            new = [_row(unit, outcome, details) for outcome in outcomes]
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
    methods = methods_of(config)
    seed = backbone.seed if config.seed < 0 else config.seed
    splits = open_splits(config.data, seed)
    unit = Transfer(config, methods, backbone, splits, seed, output, resume)
    for method in methods:
        NEEDS.get(method, lambda unit: None)(unit)
    begun = (output / "finetune").exists()
    dist.barrier()  # before any rank makes that folder
    if "finetune" in methods and begun and not resume:
        raise InputError(
            f"{output / 'finetune'} holds a training already: say --resume to go on with it, or "
            "give another --output"
        )
    return unit


def _row(unit: Transfer, outcome: Outcome, details: dict[str, Any]) -> ResultRow:
    """Return the result row of an outcome.

    What makes numbers incomparable, another resolution, a limit or changed keys, is said in the
    protocol's name: equal changes share a name.
    """
    config, test, backbone = unit.config, unit.splits.test, unit.backbone
    changed = (
        "" if test.image_size == look_up(config.data.name).image_size else f"_{test.image_size}px"
    )
    if config.data.limit:
        changed += f"_limit{config.data.limit}"
    if details["overrides"]:
        changed += f"+{recipe_hash(details['overrides'])[:6]}"
    details = details | {
        "image_size": test.image_size,
        "train_images": len(unit.splits.train) + len(unit.splits.val or ()),
        "test_images": len(test),
        "read_from": places_of([unit.splits.train, test]),
        "arch": backbone.model.arch,
        "pretrained_on": backbone.dataset,
        "pretrain_seed": backbone.seed,
        "world_size": dist.world_size(),
    }
    return ResultRow(
        step="transfer",
        protocol=outcome.protocol + changed,
        dataset=test.name,
        split=test.split,
        metric=test.metric,
        value=outcome.value,
        unit="%",
        init=backbone.init,
        seed=unit.seed,
        epoch=backbone.epoch,
        selection=outcome.selection,
        weights=backbone.sha256,
        weights_path=backbone.path,
        config=recipe_hash(recipe_of(config, details["method"])),
        data=unit.data,
        version=config.version,
        run=str(unit.output),
        details=details | outcome.details,
    )
