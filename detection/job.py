"""A detection run before it runs: config, hardware, data and weights are checked, nothing written.

``prepare`` turns what a command line asks for into a ``Job`` that is sent to every process. All
that can be known beforehand is known then: a run that starts has its data, its weights and its
name.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from core.config import ROOT, shipped_config
from core.errors import InputError
from core.files import check_folder, is_empty
from detection import cfg as configs
from detection import weights as weight_files
from detection.backbones import note, set_arch, unused_parameters, uses_network
from detection.checkpointer import Checkpointer
from detection.compat import versions
from detection.data import Split, check_same_classes, fit_to_data, open_named, open_pair
from detection.evaluation import check_split
from detection.identity import check_same_weights, data_of, facts_of, identity_of, read_run
from detection.logs import check_wandb
from detection.saved import choose
from detection.trainer import check_batch, check_builds, check_numbers
from detection.weights import Weights


@dataclasses.dataclass(frozen=True)
class Request:
    """What a command line asks for; ``tools/train_net.py --help`` explains each field."""

    config: str = ""
    weights: str = ""
    output: str | Path | None = None
    arch: str = ""
    init: str = ""
    seed: int | None = None
    num_gpus: int | None = None
    num_processes: int = 0
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"
    resume: bool = False
    eval_only: bool = False
    train_json: str = ""
    train_images: str = ""
    val_json: str = ""
    val_images: str = ""
    dataset: str = ""
    coco_backend: str = ""
    assume_convention: bool = False
    convention_from_weights: bool = False
    job: str = ""  # a rank's: the file of the job that has been checked
    check_images: bool = False  # decode every image first
    dry_run: bool = False  # only say what would be done: write nothing, on any hardware
    overrides: Sequence[str] = ()


@dataclasses.dataclass
class Job:
    """A request that has passed every check."""

    cfg: CfgNode  # resolved for this hardware
    declared: str  # the config as YAML, without device, norms and loading processes of this machine
    mode: str  # "train", "resume" or "evaluate"
    train: tuple[Split, ...]
    val: Split
    weights_file: str  # under detectron2's names; "" is random initialisation
    identity: dict[str, Any]  # fields of the result rows
    facts: dict[str, Any]  # what checkpoints of this run say of themselves
    details: dict[str, Any]
    notes: list[str]  # sentences that the run opens with
    processes: int  # on this machine
    world_size: int

    @property
    def folder(self) -> Path:
        """OUTPUT_DIR."""
        return Path(self.cfg.OUTPUT_DIR)


def prepare(request: Request, scratch: Path, checks: bool = True) -> Job:
    """Check all that can be known before the first iteration.

    Args:
        request: what the command line asks for.
        scratch: gets the conversion of a raw checkpoint and, in a dry run, drawn data.
        checks: False leaves out what a preflight checks and reports itself: whether the weights fit
            the config, and the evaluation of the validation data against themselves.

    Raises:
        InputError: one sentence on what is wrong and what would be right.
    """
    cfg, protocol = _resolve(request)
    notes: list[str] = []
    device, processes = _hardware(request, cfg, notes)
    world_size = processes * request.num_machines
    cfg = _scaled(cfg, world_size, notes)
    check_batch(cfg, world_size)
    changed = configs.changed_keys(cfg, protocol)
    cfg.SUITE.PROTOCOL = configs.protocol_name(cfg, changed)
    train, val = _open_data(cfg, request, scratch)
    fit_to_data(cfg, train, val, notes)
    if not uses_network(cfg) or cfg.MODEL.NETWORK.ARCH:
        check_builds(cfg)
    resumed = request.resume and not request.eval_only
    data = data_of(train, val)
    earlier = read_run(cfg, data) if resumed else None
    weights = _read_weights(request, cfg, val, scratch, earlier, notes)
    if uses_network(cfg):
        check_builds(cfg)
        notes += _of_network(cfg, weights)
    if weights and checks:
        notes.append(_check_weights(weights, cfg, request.assume_convention))
    if checks and earlier is None:  # a resumed run has the same data
        notes += check_split(cfg, val)
    identity = identity_of(request.init, cfg, weights, val, data, earlier)
    if not cfg.OUTPUT_DIR:
        stem = f"{identity['protocol']}-{identity['init']}-seed{identity['seed']}"
        tail = "-eval" if request.eval_only else ""
        cfg.OUTPUT_DIR = str(ROOT / "runs" / "detection" / (stem + tail))
    mode = _mode(request, Path(cfg.OUTPUT_DIR), earlier)
    declared = configs.as_yaml(cfg)
    facts = facts_of(cfg, identity, val)
    cfg.MODEL.DEVICE = device
    cfg.DATALOADER.NUM_WORKERS = _loading_processes(cfg.DATALOADER.NUM_WORKERS, device, processes)
    if world_size == 1 and not request.eval_only and configs.shares_statistics(cfg):
        notes += _alone(device, cfg.SOLVER.IMS_PER_BATCH, protocol["SOLVER.IMS_PER_BATCH"])
    norm = configs.norm_for(device, world_size)
    norms = configs.set_norms(cfg, norm)
    if norms and norm != configs.SYNC_NORM:
        notes.append(f"BatchNorm: {configs.SYNC_NORM} runs as {norm} on {world_size} × {device}")
    details = {
        "overrides": changed,
        "world_size": world_size,
        "device": device,
        "ims_per_batch": cfg.SOLVER.IMS_PER_BATCH,
        "base_lr": cfg.SOLVER.BASE_LR,
        "max_iter": cfg.SOLVER.MAX_ITER,
        "amp": cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else "none",
        "channels_last": cfg.SUITE.CHANNELS_LAST,
        "compile": cfg.SUITE.COMPILE,
        "bn": norm if norms else cfg.MODEL.RESNETS.NORM,
        "images": {"train": sum(p.num_images for p in train), "val": val.num_images},
        "read_from": sorted({str(part.json) for part in (*train, val)}),
        "coco_backend": cfg.SUITE.COCO_BACKEND,
        "versions": versions(),
    }
    if uses_network(cfg):
        details |= network_details(cfg, weights)
    cfg.freeze()
    return Job(
        cfg=cfg, declared=declared, mode=mode, train=train, val=val,
        weights_file=str(weights.loadable) if weights else "",
        identity=identity, facts=facts, details=details, notes=notes,
        processes=processes, world_size=world_size,
    )  # fmt: skip


def _resolve(request: Request) -> tuple[CfgNode, dict[str, Any]]:
    """Return the config with the command line's say, and the keys of its protocol without that."""
    name = request.config
    saved = Path(request.output or ".") / "config.yaml"
    if not name and (request.resume or request.eval_only) and request.output and saved.is_file():
        name = str(saved)
    if not name:
        raise InputError(
            "no config: name one, such as --config detection/mask_rcnn_R50_FPN_1x.yaml"
        )
    cfg = configs.load_cfg(name, request.overrides)
    cfg.OUTPUT_DIR = str(request.output or cfg.OUTPUT_DIR)
    cfg.MODEL.WEIGHTS = request.weights or cfg.MODEL.WEIGHTS
    cfg.SUITE.COCO_BACKEND = choose(request.coco_backend or cfg.SUITE.COCO_BACKEND)
    if request.seed is not None:
        cfg.SEED = request.seed
    if request.arch:
        set_arch(cfg, request.arch)
    configs.check_values(cfg)
    check_numbers(cfg)
    check_wandb(cfg.SUITE.WANDB)
    named = shipped_config(cfg.SUITE.PROTOCOL, "detection") or name
    return cfg, configs.protocol_keys(configs.load_cfg(named))


def _scaled(cfg: CfgNode, world_size: int, notes: list[str]) -> CfgNode:
    """Apply the linear rule of ``SOLVER.REFERENCE_WORLD_SIZE``, and say what it has come to.

    The batch per process stays; lr falls and iterations grow with the number of processes. What is
    resolved is named and hashed with the scaled values: another batch is another protocol.
    """
    reference, old = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER
    if reference in (0, world_size):
        return cfg
    if reference < 0 or old.IMS_PER_BATCH % reference:
        raise InputError(
            f"SOLVER.REFERENCE_WORLD_SIZE {reference} does not divide SOLVER.IMS_PER_BATCH "
            f"{old.IMS_PER_BATCH}: name the processes that the batch was meant for, such as 8"
        )
    cfg = DefaultTrainer.auto_scale_workers(cfg, world_size)
    new = cfg.SOLVER
    notes.append(
        f"scaled from {reference} to {world_size} processes (SOLVER.REFERENCE_WORLD_SIZE): "
        f"{old.IMS_PER_BATCH} → {new.IMS_PER_BATCH} images a batch, lr {old.BASE_LR:g} → "
        f"{new.BASE_LR:g}, {old.MAX_ITER} → {new.MAX_ITER} iterations; the rows say so"
    )
    return cfg


def _alone(device: str, batch: int, wanted: int) -> list[str]:
    """Return what is to be said of shared BatchNorm statistics on a single process."""
    if batch < wanted:
        return [
            f"warning: BatchNorm statistics of {batch} images on one process, where the protocol "
            f"has {wanted} over all: this is another protocol, and its rows are named so"
        ]
    said = f"BatchNorm: one GPU sees all {batch} images, as several with SyncBN would between them"
    return [said] if device == "cuda" else []


def _hardware(request: Request, cfg: CfgNode, notes: list[str]) -> tuple[str, int]:
    """Return the device and the number of processes on this machine."""
    present = torch.cuda.device_count()
    gpus, processes = request.num_gpus, request.num_processes
    if gpus is None:
        gpus = 1 if present and not processes and cfg.MODEL.DEVICE != "cpu" else 0
        if not present:
            notes.append(f"no GPU here: running on CPU with {max(1, processes)} process(es)")
    if gpus and cfg.MODEL.DEVICE == "cpu":
        raise InputError(f"--num-gpus {gpus}, but MODEL.DEVICE is cpu: leave one of them out")
    if gpus > present and request.dry_run:
        notes.append(f"this machine has {present} GPUs: planned for one with {gpus}")
    elif gpus < 0 or gpus > present:
        raise InputError(f"--num-gpus {gpus}, but this machine has {present}; 0 runs on CPU")
    if gpus and processes:
        raise InputError("--num-processes is for CPU runs; with --num-gpus each GPU has a process")
    if request.num_machines > 1 and request.dist_url == "auto":
        raise InputError(
            "several machines need --dist-url, such as tcp://FIRST_MACHINE:29500, the same on all"
        )
    if not 0 <= request.machine_rank < request.num_machines:
        raise InputError(
            f"--machine-rank {request.machine_rank} is not one of 0..{request.num_machines - 1}"
        )
    if not gpus and cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16":
        raise InputError("float16 training needs a GPU; on CPU set SOLVER.AMP.DTYPE bfloat16")
    return ("cuda", gpus) if gpus else ("cpu", max(1, processes))


def _loading_processes(wanted: int, device: str, processes: int) -> int:
    """Return loading processes per rank: no more than cores, of which CPU ranks take one each."""
    cores = (os.cpu_count() or 1) // processes
    return min(wanted, max(0, cores - 1) if device == "cpu" else max(1, cores))


def _open_data(cfg: CfgNode, request: Request, scratch: Path) -> tuple[tuple[Split, ...], Split]:
    """Open the splits that the command line or else the config names."""
    given = {
        "train": (request.train_json, request.train_images),
        "val": (request.val_json, request.val_images),
    }
    for split, (json_path, images) in given.items():
        if bool(json_path) != bool(images):
            raise InputError(f"--{split}-json and --{split}-images go together")
    shapes = dict(cfg.SUITE.SHAPES)
    pairs: dict[str, list[Split]] = {}
    for split, names in (("val", cfg.DATASETS.TEST), ("train", cfg.DATASETS.TRAIN)):
        if split == "train" and request.eval_only:
            continue
        if given[split][0]:
            pairs[split] = [
                open_pair(*given[split], split, request.dataset, decode=request.check_images)
            ]
        else:
            drawn = scratch if request.dry_run else None
            pairs[split] = [open_named(name, shapes, drawn, request.check_images) for name in names]
        if not pairs[split]:
            raise InputError(f"no data: DATASETS.{'TEST' if split == 'val' else 'TRAIN'} is empty")
    if len(pairs["val"]) > 1:
        raise InputError("DATASETS.TEST names several data sets; a run is evaluated on one")
    train, val = tuple(pairs.get("train", ())), pairs["val"][0]
    for pair in train:
        check_same_classes(pair, val)
    return train, val


def _read_weights(
    request: Request,
    cfg: CfgNode,
    val: Split,
    scratch: Path,
    earlier: dict[str, Any] | None,
    notes: list[str],
) -> Weights | None:
    """Read the weights; None is random initialisation, or a resume that needs none."""
    path = cfg.MODEL.WEIGHTS
    if request.eval_only and not path:
        newest = Checkpointer(Path(cfg.OUTPUT_DIR)).newest() if cfg.OUTPUT_DIR else None
        if newest is None:
            raise InputError("--eval-only needs the detector: --weights, or the --output of a run")
        path = str(newest[0])
    if earlier is not None:
        path = path or earlier["weights_file"]
    if not path:
        if earlier is None:
            notes.append("no --weights: training from random initialisation")
        return None
    arch = cfg.MODEL.NETWORK.ARCH if uses_network(cfg) else ""
    found = weight_files.read_weights(path, scratch / f"{Path(path).stem}_d2.pth", arch)
    weight_files.adopt_network(cfg, found)
    if found.whole != request.eval_only:
        raise InputError(
            f"{path} is a whole detector; training starts from a backbone (or: --eval-only)"
            if found.whole
            else f"{path} is a backbone without heads; --eval-only needs a trained detector"
        )
    if earlier is not None and cfg.MODEL.WEIGHTS:
        check_same_weights(earlier, found)
    classes = found.facts.get("classes")
    if classes is not None and list(classes) != list(val.classes):
        raise InputError(f"{path} detects other classes than {val.json} has")
    if request.convention_from_weights:
        weight_files.take_convention(cfg, found)
    return found


def _of_network(cfg: CfgNode, weights: Weights | None) -> list[str]:
    """Return what is to be said of a network and of the weights that it starts from."""
    facts = weights.facts if weights else {}
    said = [facts.get("input_from"), facts.get("positions"), note(cfg.MODEL.NETWORK.ARCH)]
    if unused := sorted(unused_parameters(cfg.MODEL.NETWORK.ARCH)):
        said.append(f"not trained, for it lies behind the maps: {', '.join(unused)}")
    return [f"network: {cfg.MODEL.NETWORK.ARCH}", *(f"network: {line}" for line in said if line)]


def network_details(cfg: CfgNode, weights: Weights | None) -> dict[str, Any]:
    """Return what rows say of a network: its name, input, and how it was fitted in."""
    facts = weights.facts if weights else {}
    arch = cfg.MODEL.NETWORK.ARCH
    return {
        "arch": arch,
        "mean": list(cfg.MODEL.PIXEL_MEAN),
        "std": list(cfg.MODEL.PIXEL_STD),
        "positions": facts.get("positions", ""),
        "maps": note(arch),
        "frozen_unused": sorted(unused_parameters(arch)),
    }


def _check_weights(weights: Weights, cfg: CfgNode, assume_convention: bool) -> str:
    """Raise InputError unless the weights fit the config's network and input; say how they do."""
    weight_files.check_convention(weights, cfg, assume_convention)
    return f"weights: {weights.path.name}: {weight_files.covered(weights, cfg)} matched"


def _mode(request: Request, folder: Path, earlier: dict[str, Any] | None) -> str:
    if request.eval_only:
        return "evaluate"
    if earlier is not None:
        return "resume"
    if request.machine_rank == 0:  # the others may find what it has begun to write
        check_empty(folder)
    return "train"


def check_empty(folder: Path) -> None:
    """Raise InputError unless a new run can start in a folder."""
    check_folder(folder)
    if not is_empty(folder):
        raise InputError(
            f"{folder} is not empty: --resume goes on with the run in it, another --output starts "
            "a new one"
        )
