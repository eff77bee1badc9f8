"""Expected time and disk of a suite: as its jobs have taken before, or as the suite declares."""

import heapq
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from core.disk import GB, free_bytes, size
from core.progress import format_seconds
from suite.plan import Job, Plan
from suite.records import Records


class Clock:
    """Expected seconds of jobs: as they took before, as others of their kind, or as declared."""

    def __init__(self, plan: Plan, records: Records) -> None:
        self.seconds: dict[str, float] = {}
        self.alike: dict[str, list[float]] = {}
        for job in plan.jobs:
            record = records.read(job)
            if record is not None and record.state == "done" and record.seconds:
                self.note(job, record.seconds)

    def note(self, job: Job, seconds: float) -> None:
        """Record how long a job took."""
        self.seconds[job.name] = seconds
        self.alike.setdefault(job.alike, []).append(seconds)

    def expect(self, job: Job) -> float | None:
        """Return the expected seconds of a job, None if unknown."""
        if job.name in self.seconds:
            return self.seconds[job.name]
        alike = self.alike.get(job.alike)
        if alike:
            return sum(alike) / len(alike)
        return 60 * job.minutes if job.minutes else None

    def eta(
        self, jobs: Sequence[Job], slots: int = 1, passed: Mapping[str, float] | None = None
    ) -> str:
        """Return the expected time until jobs are done; "≥" if some of them are unknown.

        Args:
            jobs: in the order in which they start, each after what it needs.
            slots: how many run at once.
            passed: by name, the seconds that those under way have run for.
        """
        known = [job for job in jobs if self.expect(job) is not None]
        if jobs and not known:
            return "--:--"
        waiting, under_way, now = list(jobs), list[tuple[float, str]](), 0.0
        while waiting or under_way:
            open_jobs = {job.name for job in waiting} | {name for _, name in under_way}
            ready = [job for job in waiting if job.needs not in open_jobs]
            for job in ready[: slots - len(under_way)]:
                rest = (self.expect(job) or 0.0) - (passed or {}).get(job.name, 0.0)
                heapq.heappush(under_way, (now + max(rest, 0.0), job.name))
                waiting.remove(job)
            now, _ = heapq.heappop(under_way)
        return ("≥ " if len(known) < len(jobs) else "") + format_seconds(now)


def expected_disk(plan: Plan, jobs: Sequence[Job], records: Records) -> str:
    """Return the gigabytes that jobs will write, and what is free; "≥" if some are unknown."""
    measured: dict[str, list[int]] = {}
    for job in plan.jobs:
        record = records.read(job)
        if record is not None and record.state == "done":
            measured.setdefault(job.alike, []).append(written(job.output))
    total, unknown = 0.0, 0
    for job in jobs:
        alike = measured.get(job.alike)
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
