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
from core.identity import measurement

SCHEMA_VERSION = 2  # 1: config hashed seed and folders, data was of detection only, no version
ROWS_FILE = "results.jsonl"  # in every run folder
STEPS = ("pretrain", "detection", "transfer", "analysis")


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """One number. Only rows of equal ``core.identity.identity`` share a mean."""

    step: str  # one of STEPS
    protocol: str  # the name of the recipe, e.g. "mask_rcnn_R50_FPN_1x"
    dataset: str  # what it was evaluated on, e.g. "coco_2017", "shapes"
    split: str  # "val", "test", "train"
    metric: str  # "bbox/AP", "segm/AP50", "top1", "recall@1", "nmi", "mi_xt", …
    value: float | None  # None: not defined here (e.g. AP of an area range without objects)
    unit: str  # "%" (0..100), "nat", "s", "1"
    init: str  # the initialisation that was evaluated, e.g. "ctc", "ce", "random", "moco_v2"
    seed: int
    epoch: int | None = None  # pretraining epoch of the weights, where known
    selection: str = "last"  # which model was taken: "last", or "best on held-out train"; not test
    weights: str = ""  # sha256 of the weights file that was read
    weights_path: str = ""
    config: str = ""  # core.identity.recipe_hash of the resolved recipe
    data: str = ""  # core.identity.data_digest: the content of what was learned from / evaluated on
    version: int = 1  # of the protocol: raised when what it computes changes
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


@dataclasses.dataclass(frozen=True)
class Measured:
    """A number before it is a row: what its method knows of it; "" where that is for all alike."""

    value: float
    metric: str = ""
    unit: str = "%"
    protocol: str = ""
    split: str = ""
    selection: str = "last"
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


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
    """Keep the newest row of each ``core.identity.measurement``."""
    newest: dict[tuple[Any, ...], ResultRow] = {}
    for row in rows:
        key = measurement(row)
        newest.pop(key, None)
        newest[key] = row
    return list(newest.values())


def sha256_of(path: str | Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
