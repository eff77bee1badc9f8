"""What has been done already: one record per job, and the judgement whether it still counts.

A job is done when its record says so with today's recipe and input, and its product is there and
unchanged: the checkpoint with its sha256, or result rows with the recorded config and weights
hashes. A changed recipe or input is named, never passed over.
"""

import contextlib
import dataclasses
import enum
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from core.config import InputError
from core.results import ROWS_FILE, ResultRow, read_rows, sha256_of
from suite.plan import Job, Plan

RESUME_FILES = (
    "resume*.pth",
    "last_checkpoint",
    "checkpoints/resume*.pth",
    "model_*.pth",
    "finetune",
)


class State(enum.Enum):
    """What is to be done about a job."""

    DONE = "done"  # nothing
    RESUME = "resume"  # go on where it was interrupted
    RUN = "run"  # from the beginning
    RERUN = "rerun"  # from the beginning, for what is there was made from something else


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A state, and the reason in words."""

    state: State
    reason: str = ""


@dataclasses.dataclass
class Record:
    """What the runner knows of a job's last run."""

    job: str
    state: str  # "started", "done", "failed"
    recipe: dict[str, Any]
    source: str  # sha256 of the input file, "" for none
    command: list[str]
    product: str = ""  # the checkpoint it made, seen from its output; "" for none or rows
    product_hash: str = ""
    rows: list[list[str]] = dataclasses.field(default_factory=list)  # distinct [config, weights]
    seconds: float = 0.0  # all attempts together
    status: int | None = None  # exit status
    ticket: str = ""  # the SLURM job that runs or has run it


class Records:
    """The records of a suite's jobs, one JSON file each under ``<root>/jobs``."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "jobs"

    def read(self, job: Job) -> Record | None:
        """Return the job's record, None where there is none or it is damaged."""
        try:
            content = json.loads(self._path(job.name).read_text(encoding="utf-8"))
            return Record(**content)
        except (OSError, ValueError, TypeError):
            return None

    def write(self, job: Job, record: Record) -> None:
        """Write the job's record, atomically."""
        path = self._path(job.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        text = json.dumps(dataclasses.asdict(record), indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)

    def _path(self, name: str) -> Path:
        return self.folder / (name.replace("/", "--") + ".json")


def judge(job: Job, record: Record | None, source: Path | None) -> Verdict:
    """Say what is to be done about a job.

    Args:
        source: its input file; None where it needs none, or where that is still to be made.
    """
    if record is None:
        if _occupied(job.output):
            return Verdict(State.RERUN, "what is there was not made by this suite")
        return Verdict(State.RUN)
    if job.needs and source is None:
        return Verdict(State.RERUN, f"{job.needs} is to be made first")
    changes = changed_recipe(record.recipe, job.recipe)
    if changes:
        return Verdict(State.RERUN, "the recipe has changed: " + "; ".join(changes))
    if source is not None and sha256_of(source) != record.source:
        return Verdict(State.RERUN, "its input weights have changed")
    if record.state == "done":
        missing = _missing_product(job, record)
        return Verdict(State.RUN if missing else State.DONE, missing)
    if job.kind != "convert" and resumable(job.output):
        return Verdict(
            State.RESUME, "it was interrupted" if record.state == "started" else "it failed"
        )
    return Verdict(State.RUN, "" if record.state == "started" else "it failed")


def verdicts(plan: Plan) -> Iterator[tuple[Job, Verdict, Path | None]]:
    """Yield every job with what is to be done about it and its input, without running anything."""
    records = Records(plan.root)
    done: set[str] = set()
    for job in plan.jobs:
        source = source_of(plan, job, records) if not job.needs or job.needs in done else None
        verdict = judge(job, records.read(job), source)
        if job.needs and job.needs not in done and verdict.state is not State.RERUN:
            verdict = Verdict(State.RUN)
        if verdict.state is State.DONE:
            done.add(job.name)
        yield job, verdict, source


def source_of(plan: Plan, job: Job, records: Records) -> Path | None:
    """Return a job's input file: the given weights, or the product of what it needs.

    None where it is not there (yet), or is known by a library's name alone.
    """
    if job.weights is not None:
        return job.weights if isinstance(job.weights, Path) and job.weights.is_file() else None
    if not job.needs:
        return None
    needed = plan.job(job.needs)
    return product_of(needed, records.read(needed))


def changed_recipe(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the keys whose values differ, as ``key: old → new``, at most four of them."""
    plain_new = json.loads(json.dumps(new, default=str))
    keys = [k for k in {**old, **plain_new} if old.get(k) != plain_new.get(k)]
    said = [f"{k}: {old.get(k, '(unset)')} → {plain_new.get(k, '(unset)')}" for k in keys[:4]]
    return said + ([f"and {len(keys) - 4} more"] if len(keys) > 4 else [])


def resumable(folder: Path) -> bool:
    """Whether a run folder holds a file to resume from."""
    return folder.is_dir() and any(any(folder.glob(pattern)) for pattern in RESUME_FILES)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the last epoch in a pretraining run."""
    found = []
    for path in (folder / "checkpoints").glob("epoch_*.pth"):
        match = re.fullmatch(r"epoch_(\d+)\.pth", path.name)
        if match:
            found.append((int(match[1]), path))
    return max(found)[1] if found else None


def make_room(output: Path, ours: bool) -> Path | None:
    """Clear a job's output for a run from the beginning; return where its old content is kept.

    Content with rows or checkpoints is kept beside as ``<name>.old1``, ``.old2``…; only the crumbs
    of a run that had not come to its first checkpoint are deleted, and those only where ``ours``.
    """
    if not _occupied(output):
        return None
    if ours and output.is_dir() and not _worth_keeping(output):
        shutil.rmtree(output)
        return None
    number = 1
    while (kept := output.with_name(f"{output.name}.old{number}")).exists():
        number += 1
    output.rename(kept)
    return kept


def finished(job: Job, record: Record) -> str:
    """Fill the product of a job that has ended well into its record; return what is missing, or "".

    The runner trusts a tool's exit status only together with the product that it promises.
    """
    if job.protocol:
        rows = _rows(job)
        record.rows = [list(pair) for pair in sorted({(row.config, row.weights) for row in rows})]
        return "" if rows else f"it left no result rows in {job.output / ROWS_FILE}"
    product = newest_checkpoint(job.output) if job.kind == "pretrain" else job.output
    if product is None or not product.is_file():
        return f"it left no checkpoint in {job.output}"
    record.product = str(product.relative_to(job.output))
    record.product_hash = sha256_of(product)
    return ""


def product_of(job: Job, record: Record | None) -> Path | None:
    """Return the file that a job has made, None where it has made none or it is gone."""
    if record is None or not record.product:
        return None
    product = job.output / record.product
    return product if product.is_file() else None


def _missing_product(job: Job, record: Record) -> str:
    """Return what is missing of a job that its record calls done, or ""."""
    if job.protocol:
        there = {(row.config, row.weights) for row in _rows(job)}
        complete = bool(there) and {tuple(pair) for pair in record.rows} <= there
        return "" if complete else "its result rows are gone"
    product = product_of(job, record)
    if product is None:
        return f"{record.product} is gone" if record.product != "." else "its file is gone"
    return "" if sha256_of(product) == record.product_hash else f"{product.name} has changed"


def _rows(job: Job) -> Sequence[ResultRow]:
    with contextlib.suppress(InputError):
        return [row for row in read_rows(job.output / ROWS_FILE) if row.step == job.kind]
    return []


def _occupied(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _worth_keeping(folder: Path) -> bool:
    return (folder / ROWS_FILE).is_file() or any(folder.rglob("*.pth"))
