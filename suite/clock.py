"""When will it be done? Expected times of jobs, and of a plan that runs several at once."""

import heapq
from collections.abc import Mapping, Sequence

from suite.plan import Job, Plan, kind_of
from suite.records import Records


class Clock:
    """Expects the seconds of jobs: as they took before, as others of their kind, or as declared."""

    def __init__(self, plan: Plan, records: Records) -> None:
        self.seconds: dict[str, float] = {}
        self.alike: dict[str, list[float]] = {}
        for job in plan.jobs:
            record = records.read(job)
            if record is not None and record.state == "done":
                self.note(job, record.seconds)

    def note(self, job: Job, seconds: float) -> None:
        """Learn how long a job has taken."""
        self.seconds[job.name] = seconds
        self.alike.setdefault(kind_of(job), []).append(seconds)

    def expect(self, job: Job) -> float | None:
        """Return the expected seconds of a job, None where nothing is known of its like."""
        if job.name in self.seconds:
            return self.seconds[job.name]
        alike = self.alike.get(kind_of(job))
        if alike:
            return sum(alike) / len(alike)
        return 60 * job.minutes if job.minutes else None

    def eta(
        self, jobs: Sequence[Job], slots: int = 1, passed: Mapping[str, float] | None = None
    ) -> str:
        """Return the expected time until jobs are done; "≥" where some of them are unknown.

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
            unsettled = {job.name for job in waiting} | {name for _, name in under_way}
            ready = [job for job in waiting if job.needs not in unsettled]
            for job in ready[: slots - len(under_way)]:
                rest = (self.expect(job) or 0.0) - (passed or {}).get(job.name, 0.0)
                heapq.heappush(under_way, (now + max(rest, 0.0), job.name))
                waiting.remove(job)
            now, _ = heapq.heappop(under_way)
        return ("≥ " if len(known) < len(jobs) else "") + clock_time(now)


def clock_time(seconds: float) -> str:
    """Return seconds as ``2:03`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
