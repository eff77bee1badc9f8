"""Result rows: one measured number each, with all that is needed to trust and repeat it.

Rows live in JSON-lines files (``results.jsonl``), appended and never rewritten. This module
imports no torch, so that a laptop can rebuild every table from the rows.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.config import ROOT, InputError

SCHEMA_VERSION = 1
ROWS_FILE = "results.jsonl"  # in every run folder
STEPS = ("pretrain", "detection", "transfer", "analysis")


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """One number. Rows that differ in protocol, dataset, split, data or selection share no mean."""

    step: str  # one of STEPS
    protocol: str  # the named recipe that was evaluated, e.g. "mask_rcnn_R50_FPN_1x"
    dataset: str  # what it was evaluated on, e.g. "coco_2017", "shapes"
    split: str  # "val", "test", "train"
    metric: str  # "bbox/AP", "segm/AP50", "top1", "recall@1", "nmi", "mi_xt", …
    value: float | None  # None: not defined here (e.g. AP of an area range without objects)
    unit: str  # "%" (0..100), "nat", "s", "1"
    init: str  # the initialisation that was judged, e.g. "ctc", "ce", "random", "moco_v2"
    seed: int
    epoch: int | None = None  # pretraining epoch of the weights, where known
    selection: str = "last"  # which model was judged: "last", or "best on held-out train"; not test
    weights: str = ""  # sha256 of the weights file that was read
    weights_path: str = ""
    config: str = ""  # sha256 of the resolved config
    data: str = ""  # detection: sha256 of what it learned from / was judged on, 12 digits each
    code: str = ""  # git commit, "+dirty" when the work tree differed from it
    run: str = ""  # run folder
    time: str = ""  # UTC, ISO 8601
    details: dict[str, Any] = dataclasses.field(default_factory=dict)  # world size, batch, versions
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise ValueError(f"step {self.step!r} is not one of {', '.join(STEPS)}")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.metric} is {self.value}: a row holds a finite value or None")


def stamp(row: ResultRow) -> ResultRow:
    """Return the row with ``time`` and ``code`` filled in where they are empty."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return dataclasses.replace(row, time=row.time or now, code=row.code or code_version())


def append_rows(path: str | Path, rows: Iterable[ResultRow]) -> None:
    """Append rows in one write; a crash leaves at most one unfinished line, which readers skip."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(dataclasses.asdict(stamp(row)), sort_keys=False, allow_nan=False) for row in rows
    ]
    if not lines:
        return
    text = "\n".join(lines) + "\n"
    with path.open("a+b") as file:
        if file.tell() > 0:  # close an unfinished line that a crash has left
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: str | Path) -> list[ResultRow]:
    """Read the rows of one file; an unfinished last line is skipped, any other damage is an error.

    Raises:
        InputError: missing file, a line that is not a row, or rows of a newer schema.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    lines = text.split("\n")
    rows = []
    names = {field.name for field in dataclasses.fields(ResultRow)}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            if content.get("schema", 0) > SCHEMA_VERSION:
                raise InputError(
                    f"{path}:{number} has row schema {content['schema']}, newer than "
                    f"{SCHEMA_VERSION}: update this checkout"
                )
            rows.append(ResultRow(**{k: v for k, v in content.items() if k in names}))
        except InputError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines) or _unfinished(line):
                continue
            raise InputError(f"{path}:{number} is not a result row: {error}") from None
    return rows


def _unfinished(line: str) -> bool:
    """Whether a line is the beginning of a row that a crash cut short."""
    return line.startswith('{"step": ') and not line.rstrip().endswith("}")


def is_set_aside(run: Path, below: Path) -> bool:
    """Whether a run in or below a folder was set aside by a later one, as ``<name>.old1``."""
    return any(re.search(r"\.old\d+$", part) for part in run.relative_to(below).parts)


def latest(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Keep the newest row of each measurement (same identity: everything but value and time)."""
    newest: dict[tuple[Any, ...], ResultRow] = {}
    for row in rows:
        key = (
            row.step, row.protocol, row.dataset, row.split, row.metric,
            row.init, row.seed, row.epoch, row.selection, row.weights, row.data,
        )  # fmt: skip
        newest.pop(key, None)
        newest[key] = row
    return list(newest.values())


def sha256_of(path: str | Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config_hash(config: dict[str, Any]) -> str:
    """Return a sha256 of a resolved config that does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def code_version() -> str:
    """Return the git commit, with "+dirty" where tracked files differ from it; "" without git."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
        if head.returncode:
            return ""
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        dirty = subprocess.run(status, capture_output=True, text=True, timeout=30).stdout.strip()
        return head.stdout.strip() + ("+dirty" if dirty else "")
    except (OSError, subprocess.TimeoutExpired):
        return ""
