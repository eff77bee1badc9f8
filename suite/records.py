"""Which jobs are done: a record for each job, and the rule that decides what it needs.

A job is done when its product is complete: result rows measured on today's input weights, or the
checkpoint that they say was trained to its end. It counts while its recipe, input weights and data
are those of its record. Where only keys differ that no number depends on, where data files have
another time, or where the record is damaged, the tool gives today's identity (``suite.runner``).
"""

import contextlib
import dataclasses
import enum
import functools
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from core.config import InputError
from core.files import atomic_file, is_empty
from core.identity import is_neutral
from core.results import ROWS_FILE, ResultRow, read_rows, sha256_of
from suite.plan import Job, Plan

RESUME_FILES = (
    "resume*.pth", "last_checkpoint", "checkpoints/resume*.pth", "model_*.pth", "finetune",
)  # fmt: skip
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp", ".tif", ".tiff")


class State(enum.Enum):
    """What a job needs."""

    DONE = "done"  # nothing
    CHECK = "check"  # nothing, if the tool would still give its rows their identity
    RESUME = "resume"  # to be resumed
    RUN = "run"  # a run from the beginning
    RERUN = "rerun"  # a run from the beginning: its output was made from something else


@dataclasses.dataclass(frozen=True)
class Assessment:
    """A state and the reason for it."""

    state: State
    reason: str = ""


@dataclasses.dataclass
class Record:
    """A job's last run."""

    state: str  # "started", "done", "failed"
    recipe: dict[str, Any]
    source: str  # sha256 of the input file, "" for none
    made: dict[str, str] = dataclasses.field(default_factory=dict)  # see ``made_by``
    data: dict[str, str] = dataclasses.field(default_factory=dict)  # path → ``stat_digest``
    seconds: float = 0.0  # all attempts together
    ticket: str = ""  # by which the executor finds the attempt again
    began: float = 0.0  # UNIX time at which its first attempt began


class Records:
    """The records of a suite's jobs, one JSON file each under ``<root>/jobs``."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "jobs"
        self._digests: dict[str, tuple[str, float]] = {}  # a folder of many files is walked once

    def read(self, job: Job) -> Record | None:
        """Return the job's record, None if it does not exist or is damaged."""
        known = {field.name for field in dataclasses.fields(Record)}
        try:
            content = json.loads(self.path(job).read_text(encoding="utf-8"))
            return Record(**{key: value for key, value in content.items() if key in known})
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def is_damaged(self, job: Job) -> bool:
        """Whether the job has a record that cannot be read, such as an empty file."""
        return self.path(job).exists() and self.read(job) is None

    def write(self, job: Job, record: Record) -> None:
        """Write the job's record, atomically."""
        with atomic_file(self.path(job)) as file:
            file.write(json.dumps(dataclasses.asdict(record), indent=1).encode() + b"\n")

    def data_has_changed(self, record: Record) -> bool:
        """Whether files of the data differ in name, size or time from those that were read."""
        return any(self._digest(place)[0] != digest for place, digest in record.data.items())

    def note_data(self, job: Job, record: Record, began: float) -> None:
        """Record the files that the job's rows say they were read from.

        Args:
            began: UNIX time. What is newer is not known to be what was read: no digest.
        """
        self._digests.clear()
        places = {place for row in rows_of(job) for place in row.details.get("read_from", ())}
        found = {place: self._digest(place) for place in sorted(places)}
        record.data = {k: digest if newest < began else "" for k, (digest, newest) in found.items()}

    def _digest(self, place: str) -> tuple[str, float]:
        if place not in self._digests:
            self._digests[place] = stat_digest(place)
        return self._digests[place]

    def path(self, job: Job) -> Path:
        """Return the file of a job's record."""
        return self.folder / f"{file_name(job)}.json"


def file_name(job: Job) -> str:
    """Return a job's name as that of a file."""
    return job.name.replace("/", "--")


def assessments(plan: Plan) -> Iterator[tuple[Job, Assessment, Path | None]]:
    """Yield every job with what it needs and its input; nothing is run."""
    records = Records(plan.root)
    done: set[str] = set()
    for job in plan.jobs:
        waits = bool(job.needs) and job.needs not in done
        source = None if waits else source_of(plan, job, records)
        assessment = assess(job, records, source)
        if waits and assessment.state is not State.RERUN:
            assessment = Assessment(State.RUN)
        if assessment.state in (State.DONE, State.CHECK):
            done.add(job.name)
        yield job, assessment, source


def assess(job: Job, records: Records, source: Path | None) -> Assessment:
    """Return what a job needs.

    Args:
        source: its input file; None if it needs none, or if that is still to be made.
    """
    record = records.read(job)
    if record is None and not records.is_damaged(job):
        if is_occupied(job.output):
            return Assessment(State.RERUN, "its output was not made by this suite")
        return Assessment(State.RUN)
    if job.needs and source is None:
        return Assessment(State.RERUN, f"{job.needs} is to be made first")
    weights = sha256_of_file(source) if source else ""
    made = made_by(job, weights, record)
    if record is None:
        reason = "its record is damaged"
        if made and job.kind != "convert":
            return Assessment(State.CHECK, reason)
        resumes = job.kind != "convert" and resumable(job.output)
        return Assessment(State.RESUME if resumes else State.RUN, reason)
    changes = differences(record.recipe, job.recipe)
    decisive = [key for key in changes if not is_neutral(key)]
    if decisive:
        return Assessment(State.RERUN, f"the recipe has changed: {_first(decisive, changes)}")
    if weights != record.source:
        return Assessment(State.RERUN, "its input weights have changed")
    lost = [key for key, value in record.made.items() if made.get(key) != value]
    if lost:
        what = "its result rows are" if job.protocol else f"{lost[0]} is"
        return Assessment(State.RUN, f"{what} gone or changed")
    if made and changes:
        return Assessment(State.CHECK, _first(list(changes), changes))
    if made and records.data_has_changed(record):
        return Assessment(State.CHECK, "files of its data have changed or moved")
    if made:
        return Assessment(State.DONE)
    how = "it was interrupted" if record.state == "started" else "it failed"
    if job.kind != "convert" and resumable(job.output):
        return Assessment(State.RESUME, how)
    return Assessment(State.RUN, "" if record.state == "started" else how)


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Return the keys whose values differ, each with the sentence ``key: old → new``."""
    plain = json.loads(json.dumps(new, default=str))
    unset = "(unset)"
    return {
        key: f"{key}: {old.get(key, unset)} → {plain.get(key, unset)}"
        for key in {**old, **plain}
        if old.get(key, unset) != plain.get(key, unset)
    }


def _first(keys: list[str], changes: dict[str, str]) -> str:
    """Return the sentences of the first four keys, and how many more there are."""
    more = [f"and {len(keys) - 4} more"] if len(keys) > 4 else []
    return "; ".join([*(changes[key] for key in keys[:4]), *more])


def made_by(job: Job, weights: str, record: Record | None = None) -> dict[str, str]:
    """Return a job's complete product, {} if there is none: what it made, and the hashes of it.

    Args:
        weights: sha256 of the input file; "" if the job has none.
        record: if it says done, the tool has ended well and what it made is complete.
    """
    if job.protocol:
        return {
            f"{row.protocol} {row.dataset}/{row.split} {row.metric} {row.selection}":
            f"{row.config} {row.data} {row.version} {row.weights}"
            for row in rows_of(job, weights)
        }  # fmt: skip
    product = product_of(job, record)
    if product is None:
        return {}
    digest = sha256_of_file(product)
    trains = job.kind == "pretrain" and job.recipe.get("method") != "random"
    ended_well = not trains or (record is not None and record.state == "done")
    if not ended_well and all(row.weights != digest for row in rows_of(job)):
        return {}  # a run writes its row after its last epoch
    return {os.path.relpath(product, job.output.parent): digest}


def product_of(job: Job, record: Record | None) -> Path | None:
    """Return the file that a job has made: as recorded, else the newest checkpoint or the output.

    None if the job makes rows, or if the file does not exist.
    """
    if job.protocol:
        return None
    recorded = [job.output.parent / name for name in record.made] if record else []
    newest = newest_checkpoint(job.output) if job.kind == "pretrain" else job.output
    product = recorded[0] if recorded else newest
    return product if product is not None and product.is_file() else None


def source_of(plan: Plan, job: Job, records: Records) -> Path | None:
    """Return a job's input file: the given weights, or the product of the job that it needs.

    None if it does not exist (yet), or is known by a library's name alone.
    """
    if job.weights is not None:
        return job.weights if isinstance(job.weights, Path) and job.weights.is_file() else None
    if not job.needs:
        return None
    needed = plan.job(job.needs)
    return product_of(needed, records.read(needed))


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the last epoch in a pretraining run."""
    found = []
    for path in (folder / "checkpoints").glob("epoch_*.pth"):
        match = re.fullmatch(r"epoch_(\d+)\.pth", path.name)
        if match:
            found.append((int(match[1]), path))
    return max(found)[1] if found else None


def rows_of(job: Job, weights: str = "") -> Sequence[ResultRow]:
    """Return the result rows that a job has written (on weights of a sha256)."""
    with contextlib.suppress(InputError):
        rows = read_rows(job.output / ROWS_FILE)
        own = [r for r in rows if (r.step, r.init, r.seed) == (job.kind, job.init, job.seed)]
        return [row for row in own if weights in ("", row.weights)]
    return []


def stat_digest(place: str) -> tuple[str, float]:
    """Return a hash of the names, sizes and times below a file or folder, and the newest time.

    Of images the name alone counts, for which the time of their folder stands. ("", 0.0): nothing
    is there.
    """
    paths = {Path(place)}
    for folder, _, names in os.walk(place):
        paths |= {Path(folder), *(Path(folder, n) for n in names if not n.lower().endswith(IMAGES))}
    lines, newest = [], 0.0
    for path in sorted(paths):
        with contextlib.suppress(OSError):
            facts = path.stat()
            size = 0 if stat.S_ISDIR(facts.st_mode) else facts.st_size
            lines.append(f"{path.relative_to(place)} {size} {facts.st_mtime_ns}")
            newest = max(newest, facts.st_mtime)
    return (hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""), newest


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of a file, which is read once for each of its states."""
    facts = path.stat()
    return _sha256_of_state(path, facts.st_size, facts.st_mtime_ns)


@functools.cache
def _sha256_of_state(path: Path, size: int, time: int) -> str:
    return sha256_of(path)


def resumable(folder: Path) -> bool:
    """Whether a run folder holds a file to resume from."""
    return folder.is_dir() and any(any(folder.glob(pattern)) for pattern in RESUME_FILES)


def make_room(output: Path, ours: bool) -> Path | None:
    """Clear a job's output for a run from the beginning; return where its old content is kept.

    Content with rows or checkpoints is kept beside as ``<name>.old1``, ``.old2``…; a run that had
    not come to its first checkpoint is deleted, if it is ``ours``.
    """
    if not is_occupied(output):
        return None
    if ours and output.is_dir() and not _is_worth_keeping(output):
        shutil.rmtree(output)
        return None
    number = 1
    while (kept := output.with_name(f"{output.name}.old{number}")).exists():
        number += 1
    output.rename(kept)
    return kept


def is_occupied(path: Path) -> bool:
    """Whether a file or a folder with content is there."""
    return path.is_file() or not is_empty(path)


def _is_worth_keeping(folder: Path) -> bool:
    return (folder / ROWS_FILE).is_file() or any(folder.rglob("*.pth"))
