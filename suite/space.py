"""How much will it write? Expected bytes of jobs: as their like has written, or as declared."""

import os
from collections.abc import Sequence
from pathlib import Path

from core.disk import GB, free_bytes, size
from suite.plan import Job, Plan, kind_of
from suite.records import Records


def expected_disk(plan: Plan, jobs: Sequence[Job], records: Records) -> str:
    """Return the gigabytes that jobs will write beside what is free; "≥" where some are unknown."""
    measured: dict[str, list[int]] = {}
    for job in plan.jobs:
        record = records.read(job)
        if record is not None and record.state == "done":
            measured.setdefault(kind_of(job), []).append(written(job.output))
    total, unknown = 0.0, 0
    for job in jobs:
        alike = measured.get(kind_of(job))
        total += sum(alike) / len(alike) if alike else GB * job.gigabytes
        unknown += not alike and not job.gigabytes
    free = f"{size(free_bytes(plan.root))} free"
    if jobs and unknown == len(jobs):
        return f"not known, {free}"
    return f"{'≥ ' if unknown else ''}{size(total)}, {free}"


def written(output: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    if output.is_file():
        return output.stat().st_size
    files = (Path(folder) / name for folder, _, names in os.walk(output) for name in names)
    return sum(file.lstat().st_size for file in files)
