"""What a pretraining optimises: cross-entropy, or CTC in its two stages.

Shapes: B images a rank and step, N training images, C channels and features, S side in pixels.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import InputError
from pretrain.recipe import (
    CEConfig,
    CTCConfig,
    ce_stages,
    check_ce,
    check_ctc,
    check_negatives,
    ctc_stages,
)
from pretrain.terms import BankOptions, InstanceTerm, PreservationOptions, PreservationTerm
from training.loop import Objective
from training.schedule import Stage


class CrossEntropy(Objective):
    """Cross-entropy alone: {"loss_ce"}.

    Args:
        model: with ``forward_features`` and ``forward_head``, as models.resnet's.
    """

    def __init__(self, model: nn.Module, config: CEConfig) -> None:
        super().__init__()
        check_ce(config)
        self.model, self.config = model, config

    def stages(self) -> list[Stage]:
        return ce_stages(self.config)

    def forward(self, images: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        logits = self.model(images)
        return {"loss_ce": cross_entropy(logits, labels, self.config.label_smoothing)}


class CTC(Objective):
    """Contrastive temporal coding: {"loss_ce", "loss_ias"}, then {"loss_ce", "loss_ips"}.

    ``term`` is the loss beside cross-entropy in the stage entered last: an InstanceTerm, a
    PreservationTerm, or None where its weight is 0. Stage 1's projection and bank end with it.

    Args:
        model: with ``num_features``, ``forward_features`` and ``forward_head``.
        labels: N int64, the class of every training image.
        seed: of projections, banks and negatives.

    Raises:
        InputError: a setting that cannot be, or more negatives than there are without replacement.
    """

    model: Any
    term: InstanceTerm | PreservationTerm | None

    def __init__(self, model: nn.Module, labels: Tensor, config: CTCConfig, seed: int = 0) -> None:
        super().__init__()
        if labels.dim() != 1:
            raise InputError("CTC needs one class per image; this data set has several")
        check_ctc(config)
        self.model, self.config, self.seed = model, config, seed
        self.labels = labels.cpu()
        check_negatives(config, self.labels)
        self.term = None
        self.step = 0

    def stages(self) -> list[Stage]:
        return ctc_stages(self.config)

    def enter_stage(self, number: int) -> None:
        config = self.config
        weight = (config.alpha, config.beta)[number]
        if weight == 0:
            self.term = None
        elif number == 0:
            self.term = InstanceTerm(
                self.model.num_features,
                config.dim1,
                config.tau1,
                config.m1,
                self._bank_options(),
                train_projection=config.train_projection,
                seed=self.seed,
            )
        else:
            options = preservation_options(config)
            self.term = PreservationTerm(
                self.model, self.labels, options, self._bank_options(), seed=self.seed
            )
        # DDP would overwrite every rank's shard with the first rank's
        self._ddp_params_and_buffers_to_ignore = [
            name
            for name, _ in self.named_buffers()
            if name.endswith((".storage", ".groups")) and config.bank_sharding == "sharded"
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

    def _bank_options(self) -> BankOptions:
        sharded = self.config.bank_sharding == "sharded"
        return BankOptions(len(self.labels), self.config.bank_dtype, sharded)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return L_CE, the mean over B images, in float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def preservation_options(config: CTCConfig) -> PreservationOptions:
    """Return what the stage-2 term is told of a config."""
    return PreservationOptions(
        temperature=config.tau2,
        momentum=config.m2,
        dim=config.dim2,
        estimator=config.estimator,
        negatives=config.num_negatives,
        shared=config.negatives == "shared",
        pool=config.pool,
        strata=config.strata,
        replacement=config.replacement,
        other_class_only=config.other_class_only,
        z_decay=config.z_decay if config.z == "ema" else 1.0,
    )
