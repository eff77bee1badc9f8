"""The ten checks of a preflight: each claims one thing of the planned run, and says one fact.

A check returns its fact, or raises ``Failed`` or ``NotRun``. ``CHECKS`` names them in their order.
"""

import dataclasses
import math
import os
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from convert.names import to_torchvision
from core.disk import GB
from core.progress import format_seconds
from detection import parity
from detection import weights as weight_files
from detection.backbones import uses_network
from detection.bench import Bench, Failed, NothingToCheck, NotRun
from detection.checkpointer import FINAL, Checkpointer, SaveHook, bare, restore
from detection.data import open_few
from detection.evaluation import check_split, evaluate_model
from detection.loader import Records
from detection.plan import disk, world
from detection.saved import result_rows
from detection.trainer import Trainer, seed_torch

INIT_BAND = 0.1  # a stem whose spread is within this of the random one may be random
GPU_TOLERANCE = 0.1  # of what the iterations after the save have changed; a GPU adds in any order
TIMED = 10  # last iterations whose loading is timed: the first ones start processes


def check_keys(bench: Bench) -> str:
    """Every tensor of the config's backbone is in the file, and none is left over."""
    return f"{weight_files.covered(bench.given(), bench.cfg)} matched"


def check_parity(bench: Bench) -> str:
    """The detector as configured computes the source network's features at res2 … res5."""
    weights = bench.given()
    absent = [key for key in parity.FACTS if key not in weights.facts]
    if absent:
        raise NotRun(f"{weights.path.name} does not say its {', '.join(absent)}")
    if uses_network(bench.cfg):
        own = weight_files.network_names(weights)
        state = {name: weights.tensors[source] for name, source in own.items()}
    else:
        named = {weight_files.backbone_name(k): v for k, v in weights.tensors.items()}
        state = {to_torchvision(name): value for name, value in named.items() if name}
    convention = parity.convention_of(weights.facts)
    reference = parity.source_features(state, weights.facts["arch"], convention)
    maps = parity.detector_features(*bench.detector())
    found = parity.within_tolerance(parity.Parity(parity.compare(reference, maps), 0, 0))
    return found.lines()[1].removeprefix("features").strip()


def check_stem(bench: Bench) -> str:
    """The stem is not what random initialisation makes: weights have really been learned."""
    weights = bench.given()
    if uses_network(bench.cfg):
        raise NotRun("known for ResNets alone")
    stem = {weight_files.backbone_name(k): v.float() for k, v in weights.tensors.items()}
    spread = float(stem["stem.conv1.weight"].std())
    seed_torch(bench.cfg.SEED)
    fresh = nn.init.kaiming_normal_(  # detectron2's and torchvision's initialisation of the stem
        torch.empty_like(stem["stem.conv1.weight"]), mode="fan_out", nonlinearity="relu"
    )
    ratio = spread / float(fresh.std())
    norm = {k.rsplit(".", 1)[1]: v for k, v in stem.items() if k.startswith("stem.conv1.norm.")}
    moved = float((norm["running_mean"]).abs().max())
    untouched = moved == 0 and bool((norm["running_var"] == 1).all())
    fact = (
        f"spread {spread:.4f}, {ratio:.2f} of random initialisation's; running means up to "
        f"{moved:.2g}"
    )
    if untouched and abs(ratio - 1) <= INIT_BAND:
        raise Failed(f"the stem is at initialisation scale and its statistics are unused: {fact}")
    return fact


def check_input(bench: Bench) -> str:
    """Mean, std, channel order and stride of the config are those the weights were trained with."""
    weights = bench.given()
    weight_files.check_convention(weights, bench.cfg, bench.request.assume_convention)
    absent = [key for key in weight_files.CONVENTION if key not in weights.facts]
    if absent:
        raise NotRun(f"{', '.join(absent)}: vouched for by --assume-convention, not by the file")
    return weight_files.describe(weight_files.config_convention(bench.cfg))


def check_truth(bench: Bench) -> str:
    """The validation data's own objects, taken as detections, have an AP of 100."""
    job = bench.job
    if job.val.kind == "cityscapes":
        raise NothingToCheck("Cityscapes' script takes hours over as many masks")
    return "; ".join(check_split(bench.cfg, job.val)).replace(f"{job.val.json}: ", "")


def check_iterations(bench: Bench) -> str:
    """Some iterations of the run are finite; how long they take, and then the whole schedule."""
    solver = bench.cfg.SOLVER
    number = min(bench.limits.iterations, solver.MAX_ITER)
    trainer = bench.trainer(bench.cfg, bench.records)
    on_gpu = trainer.device_type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    _train(trainer, 0, number)
    each = (time.perf_counter() - started) / number
    bench.trained = trainer
    bench.peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    seconds = statistics.median(_history(trainer, "time") or [each])
    loading = statistics.median(_history(trainer, "data_time")[-TIMED:])
    losses = _history(trainer, "total_loss")
    share = ", exchange" if bench.job.world_size > 1 else ""
    return (
        f"{number} finite, total loss {losses[0]:.3g} to {losses[-1]:.3g}; "
        f"{seconds:.3g} s/iteration ({loading:.2g} s loading); all {solver.MAX_ITER} take "
        f"{format_seconds(seconds * solver.MAX_ITER)} on {world(bench.job)}, "
        f"evaluation{share} not counted"
    )


def check_memory(bench: Bench) -> str:
    """Memory and disk hold what the run will need."""
    cfg, processes = bench.cfg, bench.job.processes
    if bench.trained is None:
        raise NotRun("no iterations were run")
    if bench.trained.device_type == "cuda":
        each, total = bench.peak, torch.cuda.get_device_properties(0).total_memory
        fact = f"peak {each / GB:.2f} of {total / GB:.1f} GB on the GPU"
    else:
        each = bench.peak * processes
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        of = f" for {processes} processes" if processes > 1 else ""
        fact = f"peak {each / GB:.2f} of {total / GB:.1f} GB{of}"
    saved = Checkpointer(bench.folder / "memory", facts=bench.job.facts).save(bench.trained)
    space = disk(cfg, saved.stat().st_size)
    saved.unlink()
    fact = f"{fact}; {space} in {cfg.OUTPUT_DIR}"
    if each >= total or not space.enough:
        raise Failed(f"not enough {'memory' if each >= total else 'disk'}: {fact}")
    return fact


def check_overfit(bench: Bench) -> str:
    """The loss falls on one image that is seen again and again: gradients reach what they must."""
    steps, factor = bench.limits.overfit_steps, bench.limits.overfit_factor
    full = next(
        (r for r in bench.records if any(not a.get("iscrowd") for a in r["annotations"])), None
    )
    if full is None:
        raise NotRun("no training image has an object")
    cfg = bench.cfg.clone()
    cfg.defrost()
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "SGD":  # the linear rule, to a batch of one image
        solver.BASE_LR = solver.BASE_LR / (solver.IMS_PER_BATCH * bench.job.world_size)
    solver.IMS_PER_BATCH, solver.MAX_ITER, solver.STEPS = 1, 10 * steps, ()
    solver.WARMUP_ITERS = steps // 6
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.CROP.ENABLED = False
    cfg.INPUT.MIN_SIZE_TRAIN = tuple(cfg.INPUT.MIN_SIZE_TRAIN)[:1]
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    trainer = bench.trainer(cfg, Records.of([full]))
    _train(trainer, 0, steps)
    bench.trained = trainer
    losses = _history(trainer, "total_loss")
    first, last = (statistics.mean(part) for part in (losses[:3], losses[-3:]))
    fact = (
        f"total loss {first:.3g} to {last:.3g}, by a factor of {first / last:.2f} in {steps} steps "
        f"({factor:g} wanted)"
    )
    if not first / last >= factor:
        raise Failed(fact)
    return fact


def check_evaluate(bench: Bench) -> str:
    """An evaluation of a few images ends with result rows."""
    val = bench.job.val
    few = open_few(val, bench.limits.images, bench.folder)
    started = time.perf_counter()
    trainer = bench.trained or bench.trainer(bench.cfg, bench.records)
    found = evaluate_model(bench.cfg, bare(trainer.model), few, bench.folder / "inference")
    rows = result_rows(found, **bench.job.identity | {"run": ""})
    valued = [row for row in rows if row.value is not None]
    fact = f"{len(rows)} rows from {few.num_images} images in {time.perf_counter() - started:.1f} s"
    if not valued:
        raise Failed(f"no row has a value: {fact}")
    return f"{fact}, such as {valued[0].metric} {valued[0].value:.2f}"


def check_resume(bench: Bench) -> str:
    """Iterations with a save and a resume between them end where uninterrupted ones end."""
    number = min(bench.limits.resume_iterations, bench.cfg.SOLVER.MAX_ITER)
    if number < 2:
        raise NothingToCheck("a run of one iteration is never resumed")
    half = number // 2
    checkpointer = Checkpointer(bench.folder / "resume", facts=bench.job.facts)
    whole = bench.trainer(bench.cfg, bench.records)
    whole.register_hooks([SaveHook(checkpointer, half)])
    _train(whole, 0, number)
    (checkpointer.folder / FINAL).unlink(missing_ok=True)
    saved = [p for p in checkpointer.files() if p.name == f"model_{half - 1:07d}.pth"]
    content = torch.load(saved[0], map_location="cpu", weights_only=True)
    resumed = bench.trainer(bench.cfg, bench.records)
    start = restore(resumed, content)
    _train(resumed, start, number)
    ends = [bare(trainer.model).state_dict() for trainer in (whole, resumed)]
    if whole.device_type == "cpu":
        unequal = [name for name, value in ends[0].items() if not value.equal(ends[1][name])]
        if unequal:
            raise Failed(f"{len(unequal)} of {len(ends[0])} tensors differ, such as {unequal[0]}")
        return f"{half} + {number - half} iterations end with the bits of {number}"
    off, moved = (_distance(ends[0], other) for other in (ends[1], content["model"]))
    fact = (
        f"{half} + {number - half} iterations end within {off / moved:.1e} of what the last "
        f"{number - half} changed ({GPU_TOLERANCE:g} allowed on a GPU)"
    )
    if not off <= GPU_TOLERANCE * moved:
        raise Failed(fact)
    return fact


@dataclasses.dataclass(frozen=True)
class Check:
    """One check: its claim stands in the function's docstring."""

    run: Callable[[Bench], str]
    needs: tuple[str, ...] = ()  # checks that must have passed, or had no weights to look at


CHECKS = {
    "keys": Check(check_keys),
    "parity": Check(check_parity, ("keys",)),
    "stem": Check(check_stem, ("keys",)),
    "input": Check(check_input),
    "truth": Check(check_truth),
    "iterations": Check(check_iterations, ("keys",)),
    "memory": Check(check_memory, ("iterations",)),
    "overfit": Check(check_overfit, ("keys",)),
    "evaluate": Check(check_evaluate, ("keys",)),
    "resume": Check(check_resume, ("keys",)),
}


def _train(trainer: Trainer, start: int, stop: int) -> None:
    trainer.train(start, stop)
    loader = trainer.data_loader
    trainer.reset_data_loader(lambda: loader)  # ends its processes


def _history(trainer: Trainer, name: str) -> list[float]:
    """Return the values of the last training, one an iteration; none where nothing was stored."""
    history = trainer.storage.histories()
    return [float(value) for value, _ in history[name].values()] if name in history else []


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the Euclidean distance of two states, counters left out."""
    squares = (
        float((value.double().cpu() - other[name].double().cpu()).square().sum())
        for name, value in one.items()
        if value.is_floating_point()
    )
    return math.sqrt(sum(squares))
