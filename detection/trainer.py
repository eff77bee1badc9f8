"""Training: detectron2's loop and hooks, with draws that a resume repeats exactly.

Every random number of iteration i (region sampling, augmentation, order) derives from the seed, the
rank and i, so that nothing but weights, optimiser and schedule has to be saved, and a resumed run
on CPU ends with the same bits as an uninterrupted one.
"""

import time
from collections.abc import Callable
from typing import Any

import detectron2.utils.comm as comm
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import build_augmentation
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from core import dist
from core.errors import InputError, NonFiniteLoss
from core.progress import Progress
from core.signals import StopRequests
from detection.backbones import solver_rules
from detection.loader import EndlessBatches, Record, Records
from detection.weights import meta_model

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class NotFiniteError(NonFiniteLoss):
    """A loss became NaN or infinite; the message names iteration and losses."""


class Trainer(SimpleTrainer):
    """detectron2's ``SimpleTrainer`` with one path for full and mixed precision.

    Args:
        model: returns a dict of losses in training mode.
        loader: endless batches, entered at the iteration at which training starts.
        optimizer: steps once per iteration.
        scheduler: detectron2's ``LRScheduler`` hook steps it.
        dtype: of autocast; None trains in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: EndlessBatches,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, loader, optimizer)
        self.scheduler = scheduler
        self.dtype = dtype
        self.stop, self.must_stop = StopRequests(), False
        self.device_type = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(
            self.device_type, enabled=dtype is torch.float16 and self.device_type == "cuda"
        )

    def run_step(self) -> None:
        """One iteration: losses, gradients, step; a loss that is not finite stops the run.

        Raises:
            NotFiniteError: on every rank, before the weights change.
        """
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None):
            losses = self._losses(data)
        total = torch.stack(list(losses.values())).sum()
        failed, self.must_stop = dist.any_rank(
            ~torch.isfinite(total), self.stop.requested is not None, device=total.device
        )
        if failed:
            raise self._stopped({k: v.item() for k, v in losses.items()})
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _losses(self, data: list[Record]) -> dict[str, torch.Tensor]:
        try:
            losses: dict[str, torch.Tensor] = self.model(data)
        except FloatingPointError:  # region proposals are checked before there are losses
            names = [name for name in self.storage.histories() if "loss" in name]
            last = {name: self.storage.history(name).latest() for name in names}
            raise self._stopped({f"{k} before": v for k, v in last.items()}) from None
        return losses

    def _stopped(self, losses: dict[str, float]) -> NotFiniteError:
        values = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        return NotFiniteError(
            f"training is not finite at iteration {self.iter} ({values}); lower SOLVER.BASE_LR or "
            "lengthen SOLVER.WARMUP_ITERS, then start anew"
        )

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = super().state_dict()
        state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.scaler.load_state_dict(state_dict["scaler"])


class SeedHook(HookBase):
    """Seeds torch before each iteration from (seed, rank, iteration)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_step(self) -> None:
        seed_torch(self.seed, comm.get_rank(), self.trainer.iter)


class PreciseBN(hooks.PreciseBN):
    """detectron2's PreciseBN; always the same first batches, so that a resume repeats them."""

    def __init__(
        self, period: int, model: nn.Module, loader: EndlessBatches, iterations: int, seed: int
    ) -> None:
        super().__init__(period, model, loader, iterations)
        self.seed = seed

    def update_stats(self) -> None:
        """Replace running averages by true averages over ``iterations`` batches."""
        if self._disabled:
            return
        self._logger.info(f"Running precise-BN for {self._num_iter} iterations")
        seed_torch(self.seed, comm.get_rank(), 0)
        with EventStorage():  # what the forward passes report is no training metric
            update_bn_stats(self._model, iter(self._data_loader), self._num_iter)


class EvaluateHook(hooks.EvalHook):
    """detectron2's EvalHook; after training only if training ended well."""

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._do_eval()
        del self._func


class ProgressHook(HookBase):
    """A bar with ETA and loss on a terminal (a log has detectron2's own lines instead)."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.bar: Progress | None = None

    def before_train(self) -> None:
        start, total = self.trainer.start_iter, self.trainer.max_iter
        self.bar = Progress(total, self.description, done=start)

    def after_step(self) -> None:
        if self.bar is not None:
            history = self.trainer.storage.histories()
            loss = history["total_loss"].latest() if "total_loss" in history else float("nan")
            self.bar.update(1, loss=float(loss))

    def after_train(self) -> None:
        if self.bar is not None:
            self.bar.close()


def build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW at SOLVER.BASE_LR, with detectron2's rules for the decay of norms and biases."""
    parameters = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        **solver_rules(cfg, model),
    )
    adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return adamw(parameters, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)


OPTIMIZERS = {"SGD": build_optimizer, "AdamW": build_adamw}


def build_detector(cfg: CfgNode) -> nn.Module:
    """Build the config's model, in the memory format and compiled as ``SUITE`` says.

    Names of tensors stay what they are, so that checkpoints fit with and without either.
    """
    model: Any = build_model(cfg)
    if cfg.SUITE.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)  # convolutions follow their weights' format
    if cfg.SUITE.COMPILE:
        # images differ in size from batch to batch
        model.backbone.compile(backend=cfg.SUITE.COMPILE, dynamic=True)
    return model


def agree_on_finite(head: nn.Module, inputs: Any, outputs: tuple[list[torch.Tensor], ...]) -> None:
    """As a forward hook of the region proposals' head: raise on all ranks where detectron2 would.

    It raises where the outputs are not finite, so on one rank, and the others would wait for it.

    Raises:
        FloatingPointError: an output of any rank is not finite.
    """
    if head.training:
        parts = [part for output in outputs for part in output]
        finite = torch.stack([torch.isfinite(part).all() for part in parts]).all()
        if dist.any_rank(~finite, device=finite.device)[0]:
            raise FloatingPointError("region proposals are not finite")


def build(cfg: CfgNode, records: Records) -> Trainer:
    """Build model, optimiser and schedule on this rank; hooks are added by ``add_hooks``."""
    seed_torch(cfg.SEED)  # the same initial weights on all ranks
    model = build_detector(cfg)
    optimizer = OPTIMIZERS[cfg.SOLVER.OPTIMIZER](cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    if comm.get_world_size() > 1:
        proposals: Any = getattr(model, "proposal_generator", None)
        if proposals is not None:
            proposals.rpn_head.register_forward_hook(agree_on_finite)
        cuda = cfg.MODEL.DEVICE.startswith("cuda")
        model = DistributedDataParallel(
            model,
            device_ids=[comm.get_local_rank()] if cuda else None,  # CPU modules take none
            broadcast_buffers=False,
        )
    dtype = DTYPES[cfg.SOLVER.AMP.DTYPE] if cfg.SOLVER.AMP.ENABLED else None
    return Trainer(model, EndlessBatches(cfg, records), optimizer, scheduler, dtype)


def first_hooks(cfg: CfgNode) -> list[HookBase]:
    """Return the hooks without which an iteration is not what it is: draws, times, schedule."""
    return [SeedHook(cfg.SEED), hooks.IterationTimer(), hooks.LRScheduler()]


def add_hooks(
    trainer: Trainer,
    cfg: CfgNode,
    save_hooks: list[HookBase],
    evaluate: Callable[[], dict[str, Any]],
    writers: list[Any],
    bar: bool,
) -> None:
    """Register hooks in the order that matters: schedule, PreciseBN, save, evaluate, write."""
    precise = cfg.TEST.PRECISE_BN
    all_hooks = first_hooks(cfg)
    if precise.ENABLED and get_bn_modules(trainer.model):
        batches = trainer.data_loader.again(workers=0)  # an endless loader is left half-way
        all_hooks.append(
            PreciseBN(cfg.TEST.EVAL_PERIOD, trainer.model, batches, precise.NUM_ITER, cfg.SEED)
        )
    all_hooks += [*save_hooks, EvaluateHook(cfg.TEST.EVAL_PERIOD, evaluate)]
    if comm.is_main_process():
        if bar:
            all_hooks.append(ProgressHook(cfg.SUITE.PROTOCOL))
        all_hooks.append(hooks.PeriodicWriter(writers, period=20))
    trainer.register_hooks(all_hooks)


def check_builds(cfg: CfgNode) -> None:
    """Raise InputError unless detectron2 builds the config's detector, schedule and transforms.

    Nothing is computed: the detector has shapes alone.
    """
    try:
        model = meta_model(cfg)
        build_lr_scheduler(cfg, OPTIMIZERS[cfg.SOLVER.OPTIMIZER](cfg, model))
        for train in (True, False):
            build_augmentation(cfg, train)
    except InputError:
        raise
    except Exception as error:  # detectron2 checks with assertions and look-ups of any kind
        said = " ".join(str(error).split()) or "no reason given"
        raise InputError(
            f"detectron2 cannot build what the config says: {type(error).__name__}: {said}"
        ) from None


def check_numbers(cfg: CfgNode) -> None:
    """Raise InputError unless AMP's dtype, the compiler's backend and the schedule make sense."""
    if cfg.SOLVER.AMP.DTYPE not in DTYPES:
        raise InputError(f"SOLVER.AMP.DTYPE can be {' or '.join(DTYPES)}")
    backend = cfg.SUITE.COMPILE
    if backend and backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise InputError(f"SUITE.COMPILE {backend!r} is not one of {', '.join(known)}")
    if cfg.SOLVER.MAX_ITER in cfg.SOLVER.STEPS:  # later steps are passed over by detectron2
        raise InputError(
            f"SOLVER.STEPS names {cfg.SOLVER.MAX_ITER}, where SOLVER.MAX_ITER ends the training: "
            "a step of the lr comes before or not at all"
        )


def check_batch(cfg: CfgNode, world_size: int) -> None:
    """Raise InputError unless the optimiser is known and the batch divides over the processes."""
    if cfg.SOLVER.OPTIMIZER not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise InputError(f"SOLVER.OPTIMIZER {cfg.SOLVER.OPTIMIZER!r} is not one of {known}")
    if cfg.SOLVER.IMS_PER_BATCH % world_size or world_size > cfg.SOLVER.IMS_PER_BATCH:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} cannot be split evenly over "
            f"{world_size} processes"
        )


def seed_torch(*numbers: int) -> None:
    """Seed torch's generators, CPU and GPU, from ``numbers``."""
    words = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))
