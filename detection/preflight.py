"""What to check before days of GPU time: ten checks in minutes, on the run's own config and data.

Each check reports one line of facts. One that cannot run is said so and never counts as passed.
All files go to a temporary folder; the run folder is not made.
"""

import dataclasses
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from detectron2.config import CfgNode

from core.errors import InputError
from detection.bench import Bench, Failed, Limits, NothingToCheck, NotRun
from detection.cfg import norm_for, set_norms
from detection.checks import CHECKS
from detection.data import register
from detection.job import Job, Request, prepare
from detection.logs import logging_to
from detection.trainer import NotFiniteError

PASSED, FAILED, NOT_RUN = "✓", "✗", "–"


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    name: str
    mark: str  # PASSED, FAILED or NOT_RUN
    fact: str
    due: bool = True  # False: the run has nothing that the check could look at

    @property
    def stands_in_the_way(self) -> bool:
        """Whether it keeps the preflight from being passed."""
        return self.due and self.mark != PASSED

    def line(self) -> str:
        """Return the finding as a row of the table."""
        return f"{self.mark}  {self.name:<10}  {self.fact}"


def preflight(
    request: Request, limits: Limits | None = None, only: Collection[str] = ()
) -> Iterator[Finding]:
    """Yield the finding of each check as soon as it is there.

    Args:
        request: the planned run; ``num_gpus`` 8 may be asked for where there is one, and the checks
            use one process.
        limits: how long the checks are.
        only: names of ``CHECKS``, which run with what they need; empty: all.

    Raises:
        InputError: no such check, or an input without which none can run.
    """
    limits = limits or Limits()
    limits.check()
    if request.resume or request.eval_only:
        raise InputError("preflight is for a run that starts: without --resume and --eval-only")
    unknown = [name for name in only if name not in CHECKS]
    if unknown:
        raise InputError(f"no check {unknown[0]!r}; known are {', '.join(CHECKS)}")
    with tempfile.TemporaryDirectory(prefix="preflight-") as scratch:
        folder = Path(scratch)
        request = dataclasses.replace(request, dry_run=True)
        job = prepare(request, folder, checks=False)
        if job.details["device"] == "cuda" and not torch.cuda.is_available():
            raise InputError("preflight measures on a GPU of the run, and here is none")
        register((*job.train, job.val))
        bench = Bench(job, request, limits, folder, _of_one_process(job))
        with logging_to(folder, spoken=False):
            yield from _findings(bench, _with_needs(only))


def _findings(bench: Bench, names: Collection[str]) -> Iterator[Finding]:
    usable = {"keys"} if bench.weights is None else set()
    for name, check in CHECKS.items():
        if name not in names:
            continue
        lacking = [needed for needed in check.needs if needed not in usable]
        if lacking:
            yield Finding(name, NOT_RUN, f"not run: {lacking[0]} has not passed")
            continue
        try:
            finding = Finding(name, PASSED, check.run(bench))
            usable.add(name)
        except NotRun as reason:
            due = not isinstance(reason, NothingToCheck)
            finding = Finding(name, NOT_RUN, f"not run: {reason}", due)
        except (Failed, InputError, NotFiniteError, RuntimeError, OSError) as error:
            finding = Finding(name, FAILED, " ".join(str(error).split()))
        except Exception as error:  # what would have ended the run ends one check
            fact = " ".join(f"{type(error).__name__}: {error}".split())
            finding = Finding(name, FAILED, fact)
        yield finding


def _with_needs(only: Collection[str]) -> set[str]:
    names = set(only) or set(CHECKS)
    while more := {needed for name in names for needed in CHECKS[name].needs} - names:
        names |= more
    return names


def _of_one_process(job: Job) -> CfgNode:
    """Return the config of one process alone, with the images that it has beside the others."""
    cfg = job.cfg.clone()
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH = cfg.SOLVER.IMS_PER_BATCH // job.world_size
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    set_norms(cfg, norm_for(job.details["device"], 1))
    cfg.freeze()
    return cfg
