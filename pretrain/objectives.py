"""What a pretraining optimises: cross-entropy, or CTC in its two stages.

Shapes: B images a rank and step, N training images, C channels and features, E embedding, S side
in pixels.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import InputError
from core.seeds import torch_seeded
from pretrain import bank_loss
from pretrain.memory import MemoryBank, refresh
from pretrain.negatives import Drawer, Negatives
from pretrain.recipe import CEConfig, CTCConfig
from training.loop import Objective
from training.schedule import Stage


class CrossEntropy(Objective):
    """Cross-entropy alone: {"loss_ce"}.

    Args:
        model: with ``forward_features`` and ``forward_head``, as models.resnet's.
    """

    def __init__(self, model: nn.Module, config: CEConfig) -> None:
        super().__init__()
        config.stages()
        self.model, self.config = model, config

    def stages(self) -> list[Stage]:
        return self.config.stages()

    def forward(self, images: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        logits = self.model(images)
        return {"loss_ce": cross_entropy(logits, labels, self.config.label_smoothing)}


class CTC(Objective):
    """Contrastive temporal coding: {"loss_ce", "loss_ias"}, then {"loss_ce", "loss_ips"}.

    ``term`` is the loss beside cross-entropy in the stage entered last: an InstanceTerm, a
    PreservationTerm, or None where its weight is 0. Stage 1's projection and bank end with it.

    Args:
        model: with ``head_hidden_size``, ``forward_features`` and ``forward_head``.
        labels: N int64, the class of every training image.
        seed: of projections, banks and negatives.

    Raises:
        InputError: a value out of range, or images of one class only.
    """

    model: Any
    term: "InstanceTerm | PreservationTerm | None"

    def __init__(self, model: nn.Module, labels: Tensor, config: CTCConfig, seed: int = 0) -> None:
        super().__init__()
        if labels.dim() != 1:
            raise InputError("CTC needs one class per image; this data set has several")
        config.stages()
        self.model, self.config, self.seed = model, config, seed
        self.labels = labels.cpu()
        if config.beta > 0:
            Drawer(config, self.labels, seed)  # raises what it does not accept, before any work
        self.term = None
        self.step = 0

    def stages(self) -> list[Stage]:
        return self.config.stages()

    def enter_stage(self, number: int) -> None:
        config, labels = self.config, self.labels
        if (config.alpha, config.beta)[number] == 0:
            self.term = None
        elif number == 0:
            features = self.model.head_hidden_size
            self.term = InstanceTerm(features, len(labels), config, self.seed)
        else:
            self.term = PreservationTerm(self.model, labels, config, self.seed)
        # DDP would overwrite every rank's shard with the first rank's
        self._ddp_params_and_buffers_to_ignore = [
            name
            for name, _ in self.named_buffers()
            if name.endswith((".storage", ".classes")) and config.bank_sharding == "sharded"
        ]

    def start_stage(self, number: int, batches: Callable[[], Iterator[Any]]) -> None:
        if isinstance(self.term, PreservationTerm):
            self.term.freeze(self.model)
            if self.config.bank_refresh:
                self.term.refresh(batches())

    def set_step(self, iteration: int) -> None:
        self.step = iteration

    def forward(self, images: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        maps = self.model.forward_features(images)  # B×C×h×w
        losses = {"loss_ce": cross_entropy(self.model.forward_head(maps), labels)}
        if self.term is None:
            return losses
        features = self.model.forward_head(maps, pre_logits=True)  # B×C
        if isinstance(self.term, InstanceTerm):
            losses["loss_ias"] = self.config.alpha * self.term(features, index)
        else:
            term = self.term(features, images, labels, index, self.step)
            losses["loss_ips"] = self.config.beta * term
        return losses

    def after_step(self) -> None:
        if self.term is not None:
            self.term.update()


class InstanceTerm(nn.Module):
    """L_IAS, stage 1 of CTC: every training image is a class of its own.

    u = normalise(W f + b) is pulled to the image's own row of a bank and away from all others.

    Args:
        features: C. images: N. seed: of projection and bank.
    """

    def __init__(self, features: int, images: int, config: CTCConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.projection = seeded_linear(features, config.dim1, seed, 1)
        self.projection.requires_grad_(config.train_projection)
        self.bank = bank_of(config, images, config.dim1, config.m1, seed)
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, features: Tensor, index: Tensor) -> Tensor:
        """Return L_IAS, the mean over B images, from features B×C and index B."""
        with torch.autocast(features.device.type, enabled=False):
            u = project(self.projection, features)  # B×E
            return self.loss(u, index)

    def loss(self, u: Tensor, index: Tensor) -> Tensor:
        """Return L_IAS of embeddings u, B×E."""
        self.seen = (index, u.detach())
        own, sharded = self.bank.sample(index).to(u.dtype), self.bank.sharded
        tau1 = self.config.tau1
        return bank_loss.instance_loss(u, own, self.bank.rows, tau1, sharded=sharded).mean()

    def update(self) -> None:
        """Move the bank's rows towards the embeddings of the last forward pass. Collective."""
        if self.seen is not None:
            self.bank.update(*self.seen)
        self.seen = None


class PreservationTerm(nn.Module):
    """L_IPS, stage 2 of CTC: what the network at the end of stage 1 knew is kept.

    v = normalise(W_s f + b_s) of the learning network and t = normalise(W_t sg(f̄) + b_t) of the
    frozen one, both of the same view of the same image, are each contrasted with the other's bank.

    Args:
        model: the learning network; its frozen copy is built here and filled by ``freeze``.
        labels: N, the classes of all training images.
        seed: of projections, banks and negatives.
    """

    classes: Tensor
    log_z: Tensor
    z_known: Tensor

    def __init__(self, model: nn.Module, labels: Tensor, config: CTCConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.images = config, len(labels)
        self.frozen = copy.deepcopy(model).requires_grad_(False).eval()
        features: Any = model.head_hidden_size
        self.projection = seeded_linear(features, config.dim2, seed, 2)  # of v
        self.frozen_projection = seeded_linear(features, config.dim2, seed, 3)  # of t
        self.bank, self.frozen_bank = (  # M^v, M^t
            bank_of(config, self.images, config.dim2, config.m2, seed + number) for number in (1, 2)
        )
        classes = labels[self.bank.rank :: self.bank.world].to(torch.int32)
        self.register_buffer("classes", classes, persistent=False)  # of the bank's rows
        self.register_buffer("log_z", torch.zeros(2))  # log Z of v·M^t and of t·M^v
        self.register_buffer("z_known", torch.zeros((), dtype=torch.bool))
        self._has_z: bool | None = False  # z_known, as the host knows it; None: it must read it
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_has_z", None))
        self.drawer = Drawer(config, labels, seed)
        self.seen: tuple[Tensor, Tensor, Tensor] | None = None

    def train(self, mode: bool = True) -> "PreservationTerm":
        super().train(mode)
        self.frozen.eval()
        return self

    @torch.no_grad()
    def freeze(self, model: nn.Module) -> None:
        """Copy the network as it is now; this information bank does not change any more."""
        self.frozen.load_state_dict(model.state_dict())

    @torch.no_grad()
    def refresh(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Fill both banks with the projected frozen features of (images, labels, index) batches."""

        def projected() -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
            for images, _, index in batches:
                f = self.frozen_features(images)
                yield index, (project(self.projection, f), project(self.frozen_projection, f))

        refresh([self.bank, self.frozen_bank], projected())

    def forward(
        self, features: Tensor, images: Tensor, labels: Tensor, index: Tensor, step: int
    ) -> Tensor:
        """Return L_IPS = ℓ^v + ℓ^t, each the mean over B images.

        Args:
            features: f, B×C, of the learning network. images: what it saw, B×3×S×S.
            labels, index: B. step: the global step, which the negatives depend on.
        """
        with torch.no_grad():
            frozen_features = self.frozen_features(images)
        with torch.autocast(features.device.type, enabled=False):
            v = project(self.projection, features)  # B×E
            t = project(self.frozen_projection, frozen_features)  # B×E
            return self.loss(v, t, labels, index, step)

    def loss(self, v: Tensor, t: Tensor, labels: Tensor, index: Tensor, step: int) -> Tensor:
        """Return L_IPS of embeddings v and t, B×E; the first batch fixes Z."""
        config, sharded = self.config, self.bank.sharded
        banks = (self.frozen_bank, self.bank)  # that v and t are contrasted with
        own = (banks[0].sample(index).to(v.dtype), banks[1].sample(index).to(v.dtype))
        rows = (banks[0].rows, banks[1].rows)
        negatives = self.draw(labels, step)
        problem = (v, t), own, rows, negatives, self.images, config.tau2
        if config.estimator == "nce" and not self._z_is_known():
            self._fix_z(bank_loss.first_log_z(*problem, sharded=sharded))
        log_z = self.log_z if config.estimator == "nce" else None
        losses_v, losses_t = bank_loss.preservation_losses(*problem, log_z, sharded=sharded)
        self.seen = (index, v.detach(), t.detach())
        return losses_v.mean() + losses_t.mean()

    def draw(self, labels: Tensor, step: int) -> Negatives:
        """Draw the negatives of B images (of all ranks' if sharded) among this rank's bank rows."""
        bank = self.bank
        own = bank_loss.all_images(labels, bank.sharded)
        return self.drawer.draw(step, own, self.classes, bank.rank, bank.world)

    def update(self) -> None:
        """Move both banks after a step. Collective."""
        if self.seen is not None:
            index, v, t = self.seen
            self.bank.update(index, v)
            self.frozen_bank.update(index, t)
        self.seen = None

    def frozen_features(self, images: Tensor) -> Tensor:
        """Return f̄, B×C, of the frozen network."""
        network: Any = self.frozen
        return network.forward_head(network.forward_features(images), pre_logits=True)

    @torch.no_grad()
    def _fix_z(self, log_z: Tensor) -> None:
        self.log_z.copy_(log_z)
        self.z_known.fill_(True)
        self._has_z = True

    def _z_is_known(self) -> bool:
        if self._has_z is None:  # once after a resume
            self._has_z = bool(self.z_known)
        return self._has_z


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return L_CE, the mean over B images, in float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def project(projection: nn.Linear, features: Tensor) -> Tensor:
    """Return normalise(W f + b), B×E, in the projection's own precision."""
    return F.normalize(projection(features.to(projection.weight.dtype)), dim=1)


def seeded_linear(features: int, dim: int, *seed: int) -> nn.Linear:
    """Return a linear layer in torch's default initialisation, drawn from a seed."""
    with torch_seeded(*seed):
        return nn.Linear(features, dim)


def bank_of(config: CTCConfig, images: int, dim: int, momentum: float, seed: int) -> MemoryBank:
    """Return a memory bank as the config wants it stored."""
    sharded = config.bank_sharding == "sharded"
    return MemoryBank(images, dim, momentum, dtype=config.bank_dtype, seed=seed, sharded=sharded)
