"""The training loop: 1..N processes, AMP, stages, exact resume, stop on a non-finite loss.

Shapes: B images a step over all ranks, W ranks, S side in pixels.
"""

import dataclasses
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core import dist
from core.errors import InputError, NonFiniteLoss, Stopped
from core.progress import Progress
from core.signals import StopRequests
from data.datasets import EpochSampler, IndexedDataset, normalise, to_device, training_loader
from models import amp
from models.base import sync_batch_norm
from training import resume
from training.resume import Position
from training.schedule import Stage, learning_rate, saved_epochs
from training.watch import LossWatch

__all__ = ["LoopConfig", "NonFiniteLoss", "Objective", "Stage", "Stopped", "train"]

OPTIMIZERS = ("sgd", "adamw")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How to train, whatever the objective."""

    batch_size: int = 64  # images a step over all ranks; must divide by their number
    optimizer: str = "sgd"  # sgd, or adamw (arXiv 1711.05101), which transformers need
    momentum: float = 0.9  # sgd
    nesterov: bool = False  # sgd
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.999])  # adamw
    decay_norm_and_bias: bool = True  # weight decay on 1-d parameters too, as the released code;
    # false also spares what the network's own no_weight_decay() names (position embeddings, …)
    clip_grad_norm: float = 0.0  # 0: no clipping
    amp: str = "none"  # none, bf16, fp16 autocast, or auto (models.amp); losses stay in float32
    channels_last: bool = True  # memory format of images and weights; faster convolutions
    sync_bn: bool = False  # BatchNorm statistics over all ranks (GPUs only)
    save_every: int = 10  # epochs between checkpoints; see schedule.saved_epochs
    resume_every: int = 0  # steps between resume states inside an epoch; 0: at each epoch's end
    eval_every: int = 0  # epochs between evaluations; 0: only at the end
    log_every: int = 20  # steps between lines of log.jsonl
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    timeout: int = dist.TIMEOUT  # seconds that a rank waits for another before the job ends


class Objective(nn.Module):
    """A network with its losses, banks and all else that a resume needs in ``state_dict()``.

    The loop gives each of its ``requires_grad`` parameters to the optimiser.
    """

    model: nn.Module

    def stages(self) -> list[Stage]:
        """Return the stages in order."""
        raise NotImplementedError

    def forward(self, images: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Return named, weighted scalar losses, which the loop adds up.

        Args:
            images: (B/W)×3×S×S, normalised. labels, index: B/W, int64.
        """
        raise NotImplementedError

    def enter_stage(self, number: int) -> None:
        """Build the modules that stage ``number`` needs, from a seed; also called on resume."""

    def start_stage(self, number: int, batches: Callable[[], Iterator[Any]]) -> None:
        """Do the first-time work of a stage; ``batches()`` yields this rank's share of the images.

        They come un-augmented, as (normalised images, labels, index) on the objective's device.
        """

    def set_step(self, iteration: int) -> None:
        """Set the global step, before each forward pass: random draws derive from it."""

    def after_step(self) -> None:
        """Run after each optimiser step on every rank (bank updates); not after a skipped one."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return optimiser groups; each may scale the rate by ``lr_factor``. One by default."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Calls between the steps of a training."""

    save_weights: Callable[[int], None] = lambda epoch: None  # first rank; finished epochs
    evaluate: Callable[[int], dict[str, float]] = lambda epoch: {}  # every rank; figures to log
    batches: Callable[[], Iterator[Any]] = lambda: iter(())  # for Objective.start_stage


def train(
    objective: Objective,
    dataset: IndexedDataset,
    config: LoopConfig,
    run_dir: Path,
    hooks: Hooks,
    *,
    seed: int,
    device: torch.device,
    workers: int = 0,
    resume_run: bool = False,
    recipe: Mapping[str, Any] | None = None,
    check_state: resume.Check | None = None,
) -> list[dict[str, Any]]:
    """Train through all stages, or go on from ``resume.pth``.

    Args:
        recipe: all that the weights depend on, as plain values by key.
        check_state: raises InputError if a state of that recipe and position cannot be resumed; by
            default every key must be the same.

    Returns:
        The legs of the run: the iteration from which on it had so many processes, which device
        and which precision; more than one where a resume has changed them.

    Raises:
        InputError: an invalid config, or no valid state to resume.
        NonFiniteLoss: on every rank, naming step and losses; nothing of that step is saved.
        Stopped: after a stop signal (``core.signals``), once ``resume.pth`` is written.
    """
    check(config, len(dataset))
    trainer = Trainer(objective, config, run_dir, seed, device, recipe)
    position = trainer.restore(check_state) if resume_run else trainer.begin(hooks)
    epochs_of = [stage.epochs for stage in trainer.stages]
    total_epochs, saved = sum(epochs_of), saved_epochs(epochs_of, config.save_every)
    ranks = (dist.rank(), dist.world_size())
    sampler = EpochSampler(len(dataset), config.batch_size, seed, *ranks, dataset.blocks)
    loader = training_loader(dataset, sampler, workers=workers)
    steps = sampler.steps_per_epoch
    log = resume.RunLog(run_dir / resume.LOG, position.iteration)
    with (
        StopRequests() as stop,
        Progress(steps * total_epochs, "train", position.iteration, not dist.is_main()) as bar,
    ):
        watch = LossWatch(stop, device)
        while position.epoch < total_epochs:
            stage, epoch = trainer.enter(position, hooks)
            sampler.set_epoch(position.epoch, position.step)
            for images, labels, index in loader:
                lr = learning_rate(stage, epoch, position.step / steps)
                images, labels, index = to_device(device, images, labels, index)
                inputs = normalise(images, dataset.mean, dataset.std)
                losses = trainer.step(inputs, labels, index, lr, position)
                watch.push(position.iteration, losses)
                bar.update(1, epoch=f"{position.epoch + 1}/{total_epochs}", loss=watch.total)
                if position.iteration % config.log_every == 0 or position.step == steps:
                    figures = watch.means()
                    figures["images_per_second"] = bar.lap_rate() * config.batch_size
                    progress = position.epoch + position.step / steps
                    log.write(
                        position.iteration, epoch=progress, stage=stage.name, lr=lr, **figures
                    )
                due = config.resume_every and position.iteration % config.resume_every == 0
                if watch.must_stop or (due and position.step < steps):
                    watch.flush()
                    trainer.save(position)
                if watch.must_stop:
                    raise Stopped(
                        f"stopped by a signal at step {position.iteration}; {run_dir} is saved: "
                        "go on with --resume"
                    )
            watch.flush()
            trainer.finish_epoch(position)
            finished, is_end = position.epoch, position.epoch == total_epochs
            if finished in saved:
                trainer.on_main(hooks.save_weights, finished)
            if is_end or (config.eval_every and finished % config.eval_every == 0):
                evaluated = hooks.evaluate(finished)
                log.write(position.iteration, epoch=float(finished), **evaluated)
                said = "  ".join(f"{name} {value:.2f}" for name, value in evaluated.items())
                bar.say(f"epoch {finished}: {said}")
            trainer.save(position)
            bar.start_lap()
    return trainer.legs


class Trainer:
    """The mechanics of a step and of a stage: optimiser, DDP, autocast, scaler, saved state."""

    def __init__(
        self,
        objective: Objective,
        config: LoopConfig,
        run_dir: Path,
        seed: int,
        device: torch.device,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self.objective, self.config, self.run_dir = objective, config, run_dir
        self.device, self.recipe = device, recipe or {}
        self.legs = [resume.leg(0, device, config.amp)]
        self.stages = objective.stages()
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.optimizer: torch.optim.Optimizer | None = None
        self.forward: nn.Module = objective
        torch.manual_seed(seed + dist.rank())
        random.seed(seed + dist.rank())

    def begin(self, hooks: Hooks) -> Position:
        """Build the first stage and save the initialisation as epoch 0."""
        self._build_stage(0)
        self.on_main(hooks.save_weights, 0)
        return Position()

    def restore(self, check: resume.Check | None) -> Position:
        """Build the stage of ``resume.pth`` and load all state into it."""
        check = check or (lambda begun, _: resume.check_recipe(self.run_dir, begun, self.recipe))
        content = resume.load_on_all(self.run_dir, check)
        position = Position(**content["position"])
        self._build_stage(position.stage)
        assert self.optimizer is not None
        try:
            self.objective.load_state_dict(content["objective"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            resume.restore_random_states(content["random"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise InputError(
                f"the state in {self.run_dir} does not fit this checkout: {said[:300]}"
            ) from None
        now = resume.leg(position.iteration, self.device, self.config.amp)
        self.legs = resume.joined_legs(content["legs"], now)
        return position

    def enter(self, position: Position, hooks: Hooks) -> tuple[Stage, int]:
        """Return the stage that an epoch belongs to and its epoch within; begin it if it is new."""
        number, first = 0, 0
        while position.epoch >= first + self.stages[number].epochs:
            first += self.stages[number].epochs
            number += 1
        if number != position.stage:
            self._build_stage(number)
            position.stage, position.started = number, False
        if not position.started:
            self._broadcast_buffers()
            self.objective.start_stage(number, hooks.batches)
            position.started = True
        return self.stages[number], position.epoch - first

    def step(
        self, images: Tensor, labels: Tensor, index: Tensor, lr: float, position: Position
    ) -> dict[str, Tensor]:
        """Do one optimiser step and return the detached losses; advances ``position``."""
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        self.objective.set_step(position.iteration)
        with amp.autocast(self.config.amp, self.device):
            losses = self.forward(images, labels, index)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(sum(losses.values(), torch.zeros((), device=self.device))).backward()
        if self.config.clip_grad_norm > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.clip_grad_norm)
        self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # lower: a gradient overflowed, the step was skipped
            self.objective.after_step()
        position.step += 1
        position.iteration += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def finish_epoch(self, position: Position) -> None:
        """Count the epoch as done; every rank gets the first one's BatchNorm statistics."""
        position.epoch += 1
        position.step = 0
        self._broadcast_buffers()

    def save(self, position: Position) -> None:
        """Write ``resume.pth``."""
        assert self.optimizer is not None
        resume.save(
            self.run_dir, position, self.objective, self.optimizer, self.scaler,
            self.recipe, self.legs,
        )  # fmt: skip

    def on_main(self, function: Callable[[int], None], epoch: int) -> None:
        """Call ``function`` on the first rank while the others wait."""
        dist.from_main(lambda: function(epoch))

    def _build_stage(self, number: int) -> None:
        stage, previous = self.stages[number], self.optimizer
        self.objective.enter_stage(number)
        memory = torch.channels_last if self.config.channels_last else torch.contiguous_format
        self.objective.to(self.device, memory_format=memory)  # type: ignore[call-overload]
        if self.config.sync_bn and dist.world_size() > 1:
            self.objective.model = sync_batch_norm(self.objective.model)
        self.optimizer = make_optimizer(self.config, self._groups(stage.weight_decay), stage.lr)
        if previous is not None:
            resume.carry_momentum(previous, self.optimizer)
        if dist.world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            with warnings.catch_warnings():  # the newer name for it still sends all buffers once
                warnings.filterwarnings("ignore", message=".*broadcast_buffers")
                self.forward = DistributedDataParallel(
                    self.objective, device_ids=ids, broadcast_buffers=False
                )
        self.objective.train()

    def _groups(self, weight_decay: float) -> list[dict[str, Any]]:
        groups = []
        spared = {id(p) for p in self.objective.parameters() if p.ndim <= 1}
        network: Any = self.objective.model  # timm's networks name what else weight decay spares
        names = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
        spared |= {id(p) for n, p in self.objective.model.named_parameters() if n in names}
        if self.config.decay_norm_and_bias:
            spared = set()
        for group in self.objective.parameter_groups():
            factor = group.get("lr_factor", 1.0)
            decayed = [p for p in group["params"] if id(p) not in spared]
            bare = [p for p in group["params"] if id(p) in spared]
            groups.append({"params": decayed, "lr_factor": factor, "weight_decay": weight_decay})
            if bare:
                groups.append({"params": bare, "lr_factor": factor, "weight_decay": 0.0})
        return groups

    def _broadcast_buffers(self) -> None:
        if dist.world_size() > 1:
            for module in self.objective.model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    for buffer in module.buffers():
                        torch.distributed.broadcast(buffer, 0)


def make_optimizer(
    config: LoopConfig, groups: list[dict[str, Any]], lr: float
) -> torch.optim.Optimizer:
    """Return the config's optimiser over parameter groups."""
    if config.optimizer == "adamw":
        first, second = config.betas
        return torch.optim.AdamW(groups, lr=lr, betas=(first, second))
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov)


def check(config: LoopConfig, images: int | None = None) -> None:
    """Validate a config.

    Args:
        images: number to train on; None: not known yet.

    Raises:
        InputError: naming the key and what would be right.
    """
    if config.amp not in amp.CHOICES:
        raise InputError(f"loop.amp {config.amp!r} is not one of {', '.join(amp.CHOICES)}")
    if config.batch_size < 1 or config.batch_size % dist.world_size():
        raise InputError(
            f"loop.batch_size {config.batch_size} must be a multiple of the {dist.world_size()} "
            "processes"
        )
    if images is not None and images < config.batch_size:
        raise InputError(
            f"loop.batch_size {config.batch_size} exceeds the {images} training images"
        )
    if config.sync_bn and dist.pick_device(config.device).type == "cpu":
        raise InputError("loop.sync_bn needs GPUs: set it to false, or loop.device to cuda")
    for key in ("save_every", "log_every"):
        if getattr(config, key) < 1:
            raise InputError(f"loop.{key} {getattr(config, key)} must be at least 1")
    if not 1 <= config.timeout <= dist.LONGEST:
        raise InputError(f"loop.timeout {config.timeout} must be 1 to {dist.LONGEST} seconds")
    for key in ("resume_every", "eval_every", "clip_grad_norm"):
        if not getattr(config, key) >= 0:
            raise InputError(f"loop.{key} {getattr(config, key)} must not be negative")
    if config.optimizer not in OPTIMIZERS:
        raise InputError(
            f"loop.optimizer {config.optimizer!r} is not one of {', '.join(OPTIMIZERS)}"
        )
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        raise InputError(f"loop.betas {config.betas} must be two numbers in [0, 1)")
    if config.nesterov and config.momentum == 0:
        raise InputError("loop.nesterov needs a loop.momentum above 0")
    if not math.isfinite(config.momentum) or not 0 <= config.momentum < 1:
        raise InputError(f"loop.momentum {config.momentum} must be in [0, 1)")
