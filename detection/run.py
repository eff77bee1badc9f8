"""One detection run: prepared, trained (or resumed), saved, evaluated, recorded as result rows."""

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import resource
import shlex
import shutil
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import default_writers
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.events import TensorboardXWriter

from core import dist, launch
from core.config import ROOT
from core.errors import InputError
from core.files import check_not_locked, locked
from core.identity import done
from core.results import ROWS_FILE, append_rows, read_rows
from detection.checkpointer import Checkpointer, SaveHook, StopOnSignal, bare, restore
from detection.data import register
from detection.evaluation import evaluate_model
from detection.identity import RUN_FILE
from detection.job import Job, Request, check_empty, prepare
from detection.loader import training_records
from detection.logs import WandbWriter, is_terminal, logging_to, say, trim_metrics
from detection.plan import plan
from detection.saved import DATASET_FILE, Evaluation, as_metrics, result_rows, table
from detection.trainer import Trainer, add_hooks, build, build_detector, seed_torch
from detection.weights import load_into, read_weights
from models.checkpoint import atomic_file

GROUP_SECONDS = 1800  # that a rank waits for another, as in detectron2: one rank evaluates alone


def run(request: Request) -> int:
    """Check everything, then train and evaluate, or only evaluate; return the exit status.

    Several processes are started here, or else are ranks already (torchrun, srun); then the first
    one checks. A dry run ends after the checks and prints what would be done.

    Raises:
        InputError: bad input, before anything is written.
        NotFiniteError, Stopped, LostRank: as they say.
    """
    try:
        if request.job:
            return _run_rank(pickle.loads(Path(request.job).read_bytes()))
        return _run_as_rank(_as_started(request)) if dist.is_rank() else _run_here(request)
    finally:
        dist.shutdown()


def _run_here(request: Request) -> int:
    """Do a request in this process, or in ranks that it starts."""
    with tempfile.TemporaryDirectory(prefix="convert-") as scratch, contextlib.ExitStack() as stack:
        job, lock = begin(request, Path(scratch), stack)
        if request.dry_run:
            return 0
        if job.world_size == 1:
            work(job)
            return 0
        handed = Path(scratch) / "job.pickle"
        handed.write_bytes(pickle.dumps(job))
        command = [sys.executable, str(ROOT / "tools/train_net.py"), "--job", str(handed)]
        return launch.launch(command, job.processes, _place(request), lock)


def begin(request: Request, scratch: Path, stack: contextlib.ExitStack) -> tuple[Job, list[int]]:
    """Check everything; then hold and make the run folder, or print the plan of a dry run.

    Returns:
        The job, and the lock's descriptor on the first machine.
    """
    if request.output and not request.dry_run:
        check_not_locked(Path(request.output))
    job = prepare(request, scratch)
    if request.dry_run:
        print("\n".join(plan(job)))
    if request.dry_run or request.machine_rank:
        return job, []
    lock = stack.enter_context(locked(job.folder))
    if job.mode == "train":
        check_empty(job.folder)  # again: another run may have begun meanwhile
    start_folder(job, scratch)
    return job, [lock]


def _run_rank(job: Job) -> int:
    """Do a checked job on this rank."""
    dist.init(job.details["device"], GROUP_SECONDS)
    comm.create_local_process_group(job.processes)
    work(job)
    return 0


def _run_as_rank(request: Request) -> int:
    """Do a request as one of several ranks; the first one checks it."""
    dist.init("cuda" if request.num_gpus else "cpu", GROUP_SECONDS)
    with tempfile.TemporaryDirectory(prefix="convert-") as scratch, contextlib.ExitStack() as stack:
        job = dist.from_main(lambda: begin(request, Path(scratch), stack)[0])
        return 0 if request.dry_run else _run_rank(job)


def _as_started(request: Request) -> Request:
    """Return a request with the processes that the environment says, on GPUs if there are any."""
    ranks = int(os.environ["WORLD_SIZE"])
    on_cpu = request.num_processes or request.num_gpus == 0 or not torch.cuda.is_available()
    most = ranks if on_cpu else min(ranks, torch.cuda.device_count())
    here = int(os.environ.get("LOCAL_WORLD_SIZE", most))  # srun by hand does not set it
    return dataclasses.replace(
        request,
        num_gpus=0 if on_cpu else here,
        num_processes=here if on_cpu else 0,
        num_machines=ranks // here,
        machine_rank=0,
        dist_url="env://",
    )


def _place(request: Request) -> launch.Place:
    """Return this machine's place among ``--num-machines``."""
    if request.num_machines == 1:
        return launch.ALONE
    url = urllib.parse.urlsplit(request.dist_url)
    if url.scheme != "tcp" or not url.hostname or not url.port:
        raise InputError(f"--dist-url {request.dist_url} must be tcp://HOST:PORT")
    return launch.Place(request.num_machines, request.machine_rank, url.hostname, url.port)


def start_folder(job: Job, scratch: Path) -> None:
    """Make the run folder and write what is known before the first iteration."""
    job.folder.mkdir(parents=True, exist_ok=True)
    if job.weights_file and Path(job.weights_file).parent == scratch:
        kept = job.folder / Path(job.weights_file).name
        shutil.move(job.weights_file, kept)
        job.weights_file = str(kept)
    if job.mode == "evaluate" and (job.folder / RUN_FILE).is_file():
        return  # the folder of the training run: its own record stays
    val = job.val
    known = {"classes": list(val.classes), "name": val.name, "split": val.split, "kind": val.kind}
    places = {"json": str(val.json), "images": str(val.images)}
    _write_json(job.folder / DATASET_FILE, places | known)
    if job.mode == "resume":
        return
    with atomic_file(job.folder / "config.yaml") as file:
        file.write(job.declared.encode())
    content = {
        "command": shlex.join(sys.argv),
        "mode": job.mode,
        "weights_file": job.weights_file,
        "identity": job.identity,
        "facts": job.facts,
        "details": job.details,
    }
    _write_json(job.folder / RUN_FILE, content)


@dist.naming_lost_ranks()
def work(job: Job) -> None:
    """Do the job on this rank."""
    if job.details["device"] == "cpu" and job.world_size > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.processes))
    if job.mode != "evaluate":  # as detectron2: images of many sizes, each seen once or twice
        torch.backends.cudnn.benchmark = job.cfg.CUDNN_BENCHMARK
    register((*job.train, job.val))
    with logging_to(job.folder):
        _log_setting(job)
        if job.mode == "evaluate":
            _evaluate_only(job)
        else:
            _train(job)


def _train(job: Job) -> None:
    cfg = job.cfg
    checkpointer = Checkpointer(
        job.folder, cfg.SUITE.KEEP_LAST, cfg.SUITE.MILESTONE_PERIOD, job.facts
    )
    newest = checkpointer.newest_on_all() if job.mode == "resume" else None
    if newest and newest[1]["iteration"] + 1 >= cfg.SOLVER.MAX_ITER and _has_rows(job):
        say(f"{job.folder} is finished ({cfg.SOLVER.MAX_ITER} iterations): nothing to do")
        return
    trainer = build(cfg, training_records(cfg))
    start = newest[1]["iteration"] + 1 if newest else 0
    evaluations: list[Evaluation] = []

    def evaluate() -> dict[str, Any]:
        evaluations[:] = evaluate_model(
            cfg, trainer.model, job.val, job.folder / "inference", is_terminal()
        )
        return as_metrics(evaluations)

    if comm.is_main_process():
        trim_metrics(job.folder / "metrics.json", start)
    save_hooks = [
        SaveHook(checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD),
        StopOnSignal(checkpointer),
    ]
    add_hooks(trainer, cfg, save_hooks, evaluate, _writers(job, start), is_terminal())
    if newest:
        say(f"resuming after iteration {start} from {newest[0].name}")
        restore(trainer, newest[1])
        _mind_world(job, newest[1]["world_size"])
    elif job.weights_file:
        load_into(bare(trainer.model), read_weights(job.weights_file, job.folder / "unused.pth"))
    began = time.perf_counter()
    trainer.train(start, cfg.SOLVER.MAX_ITER)
    if comm.is_main_process():
        _record(job, evaluations, _speed(trainer, began))


def _evaluate_only(job: Job) -> None:
    seed_torch(job.cfg.SEED)
    model = build_detector(job.cfg)
    load_into(model, read_weights(job.weights_file, job.folder / "unused.pth"))
    began = time.perf_counter()
    evaluations = evaluate_model(job.cfg, model, job.val, job.folder / "inference", is_terminal())
    if comm.is_main_process():
        seconds = time.perf_counter() - began
        _record(job, evaluations, {"seconds_per_image": seconds / job.val.num_images})


def _record(job: Job, evaluations: list[Evaluation], figures: dict[str, Any]) -> None:
    rows = result_rows(
        evaluations, **job.identity, run=str(job.folder), details=job.details | figures
    )
    append_rows(job.folder / ROWS_FILE, rows)
    say(table(evaluations))
    say(f"{len(rows)} result rows in {job.folder / ROWS_FILE}")


def _has_rows(job: Job) -> bool:
    """Whether the run's folder holds rows of what the job measures."""
    path = job.folder / ROWS_FILE
    rows = read_rows(path) if path.is_file() else []
    return any(done([row], [dataclasses.replace(row, **job.identity)]) for row in rows)


def _log_setting(job: Job) -> None:
    quiet = logging.getLogger("detectron2.setting")  # to the file only
    quiet.info("environment:\n" + collect_env_info())
    quiet.info("resolved config:\n" + job.cfg.dump())
    if comm.is_main_process():
        for note in job.notes:
            say(note)


def _mind_world(job: Job, world_size: int) -> None:
    if world_size != job.world_size:
        say(
            f"warning: begun on {world_size} process(es), resumed on {job.world_size}: from here "
            "on the order of images is another one"
        )


def _writers(job: Job, start: int) -> list[Any]:
    if not comm.is_main_process():
        return []
    *others, _ = default_writers(str(job.folder), job.cfg.SOLVER.MAX_ITER)
    writers = [*others, TensorboardXWriter(str(job.folder), purge_step=start)]
    if job.cfg.SUITE.WANDB:
        settings = {"identity": job.identity, "details": job.details}
        writers.append(WandbWriter(job.cfg.SUITE.WANDB, job.folder, settings))
    return writers


def _speed(trainer: Trainer, began: float) -> dict[str, Any]:
    done = trainer.max_iter - trainer.start_iter
    history = trainer.storage.histories()
    step = history["time"].global_avg() if "time" in history else None
    figures = {"seconds_per_iteration": step, "seconds": time.perf_counter() - began}
    figures["iterations_in_this_process"] = done
    if trainer.device_type == "cuda":
        figures["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    else:
        figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return figures


def _write_json(path: Path, content: Any) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=1).encode())
