"""What a run will take, computed before it starts: processes, iterations, hours, disk.

Everything follows from the config but the hours, which are measured: by an earlier run of the same
protocol on as many processes, or by whoever published the protocol (``SUITE.EXPECTED_HOURS``).
"""

import math
from pathlib import Path

from detectron2.config import CfgNode

from core.disk import Disk, Files, free_bytes
from core.identity import announcement
from core.progress import format_seconds
from core.results import ROWS_FILE, ResultRow, read_rows
from detection import cfg as configs
from detection.checkpointer import Checkpointer
from detection.job import Job
from detection.weights import meta_model

EXPECTED_ON = 8  # GPUs that SUITE.EXPECTED_HOURS is for


def plan(job: Job) -> list[str]:
    """Return the resolved config and, after it, what the job is going to do, line by line."""
    cfg, solver = job.cfg, job.cfg.SOLVER
    images = job.details["images"]
    lines = [configs.as_yaml(cfg).rstrip(), "", *job.notes]
    lines += [f"mode      {job.mode}, nothing started or written", f"folder    {job.folder}"]
    if job.mode == "evaluate":
        return [*lines, f"images    {images['val']} to detect objects in"]
    done = _done(job)
    epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / max(1, images["train"])
    going_on = f", {done} of them done" if done else ""
    own = job.identity
    return [
        *lines,
        announcement([own["config"]], own["data"], own["version"]),
        f"world     {world(job)}, lr {solver.BASE_LR:g}",
        f"schedule  {solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images{going_on}: "
        f"{epochs:.3g} epochs of {images['train']} images; then {images['val']} images evaluated",
        f"time      {expected_time(job, solver.MAX_ITER - done)}",
        f"disk      {disk(cfg, checkpoint_bytes(cfg))}",
    ]


def world(job: Job) -> str:
    """Return the processes of the run and what each gets, in words."""
    each = job.cfg.SOLVER.IMS_PER_BATCH // job.world_size
    scaled = job.cfg.SOLVER.REFERENCE_WORLD_SIZE
    by = " (batch, lr and schedule scaled by SOLVER.REFERENCE_WORLD_SIZE)" if scaled else ""
    return f"{job.world_size} × {job.details['device']} with {each} images each{by}"


def expected_time(job: Job, iterations: int) -> str:
    """Return the expected hours with where they are known from, or that they are unknown."""
    row = _earlier(job)
    if row is not None:
        each = row.details["seconds_per_iteration"]
        return (
            f"{format_seconds(each * iterations)} at {each:.3g} s an iteration, as measured by "
            f"{row.run}"
        )
    hours = job.cfg.SUITE.EXPECTED_HOURS
    if hours and job.details["device"] == "cuda" and not job.details["overrides"]:
        here = hours * EXPECTED_ON / job.world_size
        scaled = f"; {here:.3g} h on {job.world_size} if it is inverse to their number"
        return (
            f"about {hours:g} h on {EXPECTED_ON} GPUs (SUITE.EXPECTED_HOURS)"
            f"{scaled if job.world_size != EXPECTED_ON else ''}"
        )
    return "unknown: tools/preflight.py measures it"


def kept_checkpoints(cfg: CfgNode) -> int:
    """Return how many checkpoints of a run lie on disk at one time, at most."""
    period, last = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER - 1
    numbered = last // period if period > 0 else 0
    if cfg.SUITE.KEEP_LAST <= 0 or not numbered:
        return numbered + 1
    milestone = cfg.SUITE.MILESTONE_PERIOD
    milestones = last // math.lcm(period, milestone) if milestone > 0 else 0
    # a new one, numbered or final, is complete before an old one goes
    return min(numbered, cfg.SUITE.KEEP_LAST + milestones) + 1


def checkpoint_bytes(cfg: CfgNode) -> int:
    """Return the size of a checkpoint: weights, and what the optimiser keeps for each of them."""
    model = meta_model(cfg)
    held = 2 if cfg.SOLVER.OPTIMIZER == "AdamW" else int(cfg.SOLVER.MOMENTUM > 0)
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return weights + held * trained


def disk(cfg: CfgNode, each: int) -> Disk:
    """Return what checkpoints of ``each`` bytes need, and what is free in the output folder."""
    files = Files(kept_checkpoints(cfg), "checkpoint", each)
    return Disk((files,), free_bytes(Path(cfg.OUTPUT_DIR)))


def _done(job: Job) -> int:
    newest = Checkpointer(job.folder).newest() if job.mode == "resume" else None
    return int(newest[1]["iteration"]) + 1 if newest else 0


def _earlier(job: Job) -> ResultRow | None:
    """Return a row of a run beside this one: the same config, device and number of processes."""
    hardware = {key: job.details[key] for key in ("world_size", "device")}
    for file in sorted(job.folder.absolute().parent.glob(f"*/{ROWS_FILE}")):
        for row in reversed(read_rows(file)):
            measured = row.details.get("seconds_per_iteration")
            same = row.config == job.identity["config"] and hardware.items() <= row.details.items()
            if row.step == "detection" and same and measured:
                return row
    return None
