"""The two losses that CTC adds to cross-entropy, each with its projections, banks and constants.

Shapes: B images a rank and step, N training images, K negatives, D features, E embedding, W ranks.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import dist
from core.seeds import torch_seeded
from pretrain.attention import bank_instance_loss
from pretrain.contrast import Settings, contrast_losses, first_log_z
from pretrain.memory import MemoryBank, refresh
from pretrain.negatives import make_drawer


@dataclasses.dataclass(frozen=True)
class BankOptions:
    """What both terms' banks have in common."""

    images: int  # N
    dtype: str = "fp32"  # a key of pretrain.memory.DTYPES
    sharded: bool = False


class InstanceTerm(nn.Module):
    """L_IAS, stage 1 of CTC: every training image is a class of its own.

    u = normalise(W f + b) is drawn to the image's own row of a bank and away from all others.

    Args:
        features: D. dim: E. temperature: τ1. momentum: m1. seed: of projection and bank.
        train_projection: whether W and b learn; in the released code they stay random.
    """

    def __init__(
        self,
        features: int,
        dim: int,
        temperature: float,
        momentum: float,
        options: BankOptions,
        *,
        train_projection: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.projection = seeded_linear(features, dim, seed, 1)
        self.projection.requires_grad_(train_projection)
        self.bank = MemoryBank(
            options.images, dim, momentum, dtype=options.dtype, seed=seed, sharded=options.sharded
        )
        self._seen: tuple[Tensor, Tensor] | None = None

    def forward(self, features: Tensor, index: Tensor) -> Tensor:
        """Return L_IAS, the mean over B images, from features B×D and index B."""
        with torch.autocast(features.device.type, enabled=False):
            embedding = project(self.projection, features)  # u, B×E
            self._seen = (index, embedding.detach())
            own = self.bank.sample(index).to(embedding.dtype)
            losses = bank_instance_loss(
                embedding, own, self.bank.rows, self.temperature, sharded=self.bank.sharded
            )
            return losses.mean()

    def update(self) -> None:
        """Move the bank's rows towards the embeddings of the last forward pass. Collective."""
        if self._seen is not None:
            self.bank.update(*self._seen)
        self._seen = None


@dataclasses.dataclass(frozen=True)
class PreservationOptions:
    """How stage 2 of CTC contrasts."""

    temperature: float = 0.1  # τ2
    momentum: float = 0.9  # m2
    dim: int = 128  # E
    estimator: str = "nce"
    negatives: int = 16384  # K; 0: every other-group row
    shared: bool = False
    pool: int = 0  # rows that a step's windows lie in; 0: all
    strata: int = 0  # parts of the rows that are drawn from separately; 0: one, or one a shard
    replacement: str = "auto"  # auto: only where K exceeds the others; always; never
    other_class_only: bool = True
    z_decay: float = 1.0  # share of the old Z that each step keeps; 1: fixed by the first batch


class PreservationTerm(nn.Module):
    """L_IPS, stage 2 of CTC: what the network at the end of stage 1 knew is kept.

    v = normalise(W_s f + b_s) of the learning network and t = normalise(W_t sg(f̄) + b_t) of the
    frozen one, both of the same view of the same image, are each contrasted with the other's bank.

    Args:
        model: the learning network; its frozen copy is built here and filled by ``freeze``.
        labels: N, the classes of all training images.
        seed: of projections, banks and negatives.
    """

    groups: Tensor
    log_z: Tensor
    z_known: Tensor

    def __init__(
        self,
        model: nn.Module,
        labels: Tensor,
        options: PreservationOptions,
        bank_options: BankOptions,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.options = options
        self.frozen = copy.deepcopy(model).requires_grad_(False).eval()
        features, dim = int(model.num_features), options.dim  # type: ignore[arg-type]
        self.projection = seeded_linear(features, dim, seed, 2)  # of v
        self.frozen_projection = seeded_linear(features, dim, seed, 3)  # of t
        self.bank, self.frozen_bank = (  # M^v, M^t
            MemoryBank(
                bank_options.images,
                dim,
                options.momentum,
                dtype=bank_options.dtype,
                seed=seed + number,
                sharded=bank_options.sharded,
            )
            for number in (1, 2)
        )
        rank, world = self.bank.rank, self.bank.world
        every = labels if options.other_class_only else torch.arange(bank_options.images)
        self.register_buffer("groups", every[rank::world].to(torch.int32), persistent=False)
        self.register_buffer("log_z", torch.zeros(2))  # log Z of v·M^t and of t·M^v
        self.register_buffer("z_known", torch.zeros((), dtype=torch.bool))
        self._has_z: bool | None = None  # z_known, as the host knows it
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_has_z", None))
        self.drawer = make_drawer(
            seed,
            options.negatives,
            self.groups,
            shared=options.shared,
            replacement=options.replacement,
            pool=options.pool,
            strata=options.strata,
            rank=rank,
            world=world,
        )
        self.settings = Settings(
            options.temperature,
            bank_options.images,
            options.estimator,
            self.bank.sharded,
            track_z=options.estimator == "nce" and options.z_decay < 1.0,
        )
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None
        self._new_z: Tensor | None = None

    def train(self, mode: bool = True) -> "PreservationTerm":
        super().train(mode)
        self.frozen.eval()
        return self

    @torch.no_grad()
    def freeze(self, model: nn.Module) -> None:
        """Take the information bank: the network as it is now, for good."""
        self.frozen.load_state_dict(model.state_dict())

    @torch.no_grad()
    def refresh(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Fill both banks with the projected frozen features of (images, labels, index) batches."""
        refresh([self.bank, self.frozen_bank], self._projected(batches))

    def _projected(
        self, batches: Iterable[tuple[Tensor, Tensor, Tensor]]
    ) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        for images, _, index in batches:
            features = self._frozen_features(images)
            v = project(self.projection, features)
            yield index, (v, project(self.frozen_projection, features))

    def forward(
        self, features: Tensor, images: Tensor, labels: Tensor, index: Tensor, step: int
    ) -> Tensor:
        """Return L_IPS = ℓ^v + ℓ^t, each the mean over B images.

        Args:
            features: f, B×D, of the learning network. images: what it saw, B×3×S×S.
            labels, index: B. step: the global step, which the negatives depend on.
        """
        with torch.no_grad():
            frozen_features = self._frozen_features(images)
        with torch.autocast(features.device.type, enabled=False):
            v = project(self.projection, features)  # B×E
            t = project(self.frozen_projection, frozen_features)  # B×E
            return self.contrast(v, t, labels, index, step)

    def contrast(self, v: Tensor, t: Tensor, labels: Tensor, index: Tensor, step: int) -> Tensor:
        """Return L_IPS of embeddings v and t, B×E."""
        banks = (self.frozen_bank, self.bank)
        own = (banks[0].sample(index).to(v.dtype), banks[1].sample(index).to(v.dtype))
        rows = (banks[0].rows, banks[1].rows)
        of_images = labels if self.options.other_class_only else index
        numbers = index
        if self.settings.sharded:
            of_images, numbers = dist.gather_rows(of_images), dist.gather_rows(index)
        windows = self.drawer.draw(step, numbers, of_images, self.groups)
        if self.options.estimator == "nce" and not self._z_is_known():
            self._set_z(first_log_z((v, t), own, rows, windows, self.settings))
        losses_v, losses_t, new_z = contrast_losses(
            (v, t), own, rows, windows, self.settings, self.log_z
        )
        self._seen = (index, v.detach(), t.detach())
        self._new_z = new_z if self.settings.track_z else None
        return losses_v.mean() + losses_t.mean()

    def update(self) -> None:
        """Move both banks, and Z if it moves, after a step. Collective."""
        if self._seen is None:
            return
        index, v, t = self._seen
        self.bank.update(index, v)
        self.frozen_bank.update(index, t)
        if self._new_z is not None:
            kept = self.options.z_decay
            old, new = self.log_z + math.log(kept), self._new_z + math.log1p(-kept)
            self._set_z(torch.logaddexp(old, new.to(old.dtype)))
        self._seen = self._new_z = None

    def _frozen_features(self, images: Tensor) -> Tensor:
        network: Any = self.frozen
        return network.forward_head(network.forward_features(images), pre_logits=True)

    @torch.no_grad()
    def _set_z(self, log_z: Tensor) -> None:
        self.log_z.copy_(log_z)
        self.z_known.fill_(True)
        self._has_z = True

    def _z_is_known(self) -> bool:
        if self._has_z is None:  # once after the start or a resume
            self._has_z = bool(self.z_known)
        return self._has_z


def project(projection: nn.Linear, features: Tensor) -> Tensor:
    """Return normalise(W f + b), B×E, in the projection's own precision."""
    return F.normalize(projection(features.to(projection.weight.dtype)), dim=1)


def seeded_linear(features: int, dim: int, *seed: int) -> nn.Linear:
    """Return a linear layer in torch's default initialisation, drawn from a seed."""
    with torch_seeded(*seed):
        return nn.Linear(features, dim)
