"""Both directions of L_IPS against windows of bank rows, in O(B·C + C·D) memory.

Shapes: B images, N bank rows, K negatives, D embedding, C rows of a chunk, W ranks.

The loss of an image is a sum over its negatives (``nce``) or a logsumexp (``infonce``), so it and
its gradient with respect to the embedding are gathered chunk by chunk: the rows of a chunk are
read once, multiplied with the embeddings whose windows lie there, turned into terms of the loss
and, in place, into the gradient's coefficients, and multiplied again. Two matrix products a
direction, no B×N and no B×K×D tensor. The formulas are those of ``pretrain.losses``.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core import dist
from pretrain.attention import LOG2_E, OnlineSoftmax, merge_over_ranks, of_images, rows_per_pass
from pretrain.losses import nce_constant, nce_shift
from pretrain.negatives import Windows
from pretrain.products import similarities, weighted_sums

CHUNK = 4096  # bank rows of a pass on a CPU: they stay in its second cache


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the negatives are turned into a loss."""

    temperature: float  # τ2
    images: int  # N, rows of the whole bank
    estimator: str = "nce"
    sharded: bool = False  # rows and windows are this rank's shard's; every call is collective
    track_z: bool = False  # also return the batch's own log Z, which a moving Z needs (nce)


class NoiseContrast:
    """Σ log(1 + o) and Σ o/(1 + o)·row over negatives of odds o = exp(x) (losses.nce_loss).

    Logits come to the base 2, as OnlineSoftmax takes them.
    """

    in_pairs = True  # odds stay below 1e19

    def __init__(self, queries: Tensor, shift: Tensor, track_z: bool) -> None:
        self.shift = shift[:, None] * LOG2_E  # B×1
        self.total = queries.new_zeros(len(queries))
        self.weighted = torch.zeros_like(queries)
        self.odds = queries.new_zeros(len(queries)) if track_z else None

    def add(self, images: Tensor | None, logits: Tensor, counted: Tensor, keys: Tensor) -> None:
        """Take the logits of some images (None: of all), b×C, and the C×D rows; eats the logits.

        ``counted``, b×C: 1 where a logit counts, else 0.

        log(1 + o) rounds o to 2^-24, up as often as down; it is ten times faster than log1p,
        which is not vectorised on CPUs.
        """
        odds = logits.sub_(of_images(self.shift, images)).exp2_().mul_(counted)
        if self.odds is not None:
            _grow(self.odds, images, odds.sum(dim=1))
        value = odds + 1.0
        half, rest = divmod(odds.shape[1], 2)
        if self.in_pairs and not rest:  # (1 + a)(1 + b) = 1 + a + b(1 + a): half the logarithms
            factors = torch.addcmul(odds[:, :half], odds[:, half:], value[:, :half]).add_(1.0)
        else:
            factors = value.clone()
        _grow(self.weighted, images, weighted_sums(odds.div_(value), keys))
        _grow(self.total, images, factors.log_().sum(dim=1))

    def log_sum(self) -> Tensor:
        """Return log Σ exp(·/τ) of the negatives, B (``track_z``)."""
        if self.odds is None:
            return torch.zeros_like(self.total)
        return self.odds.log() + self.shift[:, 0] / LOG2_E


class SingleNoiseContrast(NoiseContrast):
    """The same for temperatures at which the product of two odds may overflow."""

    in_pairs = False


class CarefulNoiseContrast(NoiseContrast):
    """The same for temperatures so low that the odds themselves may overflow."""

    def __init__(self, queries: Tensor, shift: Tensor, track_z: bool) -> None:
        super().__init__(queries, shift, track_z)
        self.softmax = OnlineSoftmax(queries)

    def add(self, images: Tensor | None, logits: Tensor, counted: Tensor, keys: Tensor) -> None:
        self.softmax.add(images, logits.clone(), counted, keys)
        logits.sub_(of_images(self.shift, images)).div_(LOG2_E)
        logits.masked_fill_(counted == 0, float("-inf"))
        _grow(self.total, images, F.softplus(logits).sum(dim=1))
        _grow(self.weighted, images, weighted_sums(logits.sigmoid_(), keys))

    def log_sum(self) -> Tensor:
        return self.softmax.result()[0]


def _grow(sums: Tensor, images: Tensor | None, more: Tensor) -> None:
    if images is None:
        sums += more
    else:
        sums.index_add_(0, images, more)


def contrast_losses(
    embeddings: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    banks: tuple[Tensor, Tensor],
    windows: Sequence[Windows],
    settings: Settings,
    log_z: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ℓ^v and ℓ^t per image, B and B, and log Z of the joined batch, 2 (with ``track_z``).

    Args:
        embeddings: v and t, B×D, float32 or float64. own: their positives M^t_i and M^v_i, B×D.
        banks: M^t and M^v, N×D or this rank's shard.
        windows: the B images' negatives, in any number of strata; when sharded, of all W·B images,
            in this shard's strata.
        log_z: log Z of each direction, 2 (``nce``).
    """
    return _Contrast.apply(*embeddings, *own, log_z, banks, windows, settings)


@torch.no_grad()
def first_log_z(
    embeddings: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    banks: tuple[Tensor, Tensor],
    windows: Sequence[Windows],
    settings: Settings,
) -> Tensor:
    """Return log Z of each direction, 2: Z = N · mean of exp(·/τ) over the joined batch.

    The mean is over positives and negatives of all ranks' images. Collective.
    """
    positives = _positives(embeddings, own, settings)
    sums = [lse for lse, _ in _softmax_sums(embeddings, banks, windows, settings)]
    count = _total_count(windows, settings)
    return _batch_log_z(torch.stack(sums), torch.stack(positives), count, settings)


def _batch_log_z(negatives: Tensor, positives: Tensor, count: Tensor, settings: Settings) -> Tensor:
    """Return log Z of the joined batch, 2.

    Args:
        negatives: logsumexp over each image's, 2×B. positives: 2×B. count: of negatives, B.
    """
    every = torch.logaddexp(negatives, positives)
    every = dist.gather_rows(every.T.contiguous())  # W·B×2
    entries = (dist.gather_rows(count) + 1).sum().to(every.dtype)
    return torch.logsumexp(every, dim=0) - entries.log() + math.log(settings.images)


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, t: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        own_v, own_t, log_z, banks, windows, settings = rest
        embeddings, own = (v, t), (own_v, own_t)
        positives = _positives(embeddings, own, settings)
        value = _nce if settings.estimator == "nce" else _infonce
        losses, coefficients, sums = value(embeddings, positives, banks, windows, settings, log_z)
        gradients = [
            (mean + (pull - 1.0)[:, None] * row) / settings.temperature
            for (mean, pull), row in zip(coefficients, own, strict=True)
        ]
        ctx.save_for_backward(*gradients)
        batch_z = torch.zeros_like(log_z)
        if settings.track_z:
            count = _total_count(windows, settings)
            batch_z = _batch_log_z(torch.stack(sums), torch.stack(positives), count, settings)
        ctx.mark_non_differentiable(batch_z)
        return (*losses, batch_z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, t = ctx.saved_tensors
        return grads[0][:, None] * v, grads[1][:, None] * t, *[None] * 6


# what a direction's value gives: losses B, (Σ coefficient·row B×D, σ or p of the positive B), sums
Values = tuple[list[Tensor], list[tuple[Tensor, Tensor]], list[Tensor]]


def _nce(
    embeddings: tuple[Tensor, Tensor],
    positives: list[Tensor],
    banks: tuple[Tensor, Tensor],
    windows: Sequence[Windows],
    settings: Settings,
    log_z: Tensor,
) -> Values:
    count = _total_count(windows, settings)
    share = count.to(positives[0].dtype) / settings.images  # c
    shifts = [nce_shift(z, share) for z in log_z.to(share.dtype)]
    spread = [dist.gather_rows(s) if settings.sharded else s for s in shifts]
    # rows are at most sqrt(3) long, so x < 2·sqrt(3)/τ; exp of 88 overflows in float32
    contrast = NoiseContrast
    if settings.temperature < 0.08:
        contrast = SingleNoiseContrast if settings.temperature >= 0.05 else CarefulNoiseContrast
    gathered = _pass_over(
        embeddings,
        banks,
        windows,
        settings,
        lambda number, query: contrast(query, spread[number], settings.track_z),
    )
    losses, coefficients, sums = [], [], []
    for state, positive, shift in zip(gathered, positives, shifts, strict=True):
        packed = torch.cat([state.weighted, state.total[:, None]], dim=1)  # B×(D+1)
        log_sum = state.log_sum()
        if settings.sharded:
            packed = dist.all_sum(packed)
            log_sum = torch.logsumexp(dist.gather_rows(log_sum[None]), dim=0)
        packed, log_sum = _mine(packed, settings), _mine(log_sum, settings)
        losses.append(F.softplus(shift - positive) + packed[:, -1] + nce_constant(count, share))
        coefficients.append((packed[:, :-1], torch.sigmoid(positive - shift)))
        sums.append(log_sum)
    return losses, coefficients, sums


def _infonce(
    embeddings: tuple[Tensor, Tensor],
    positives: list[Tensor],
    banks: tuple[Tensor, Tensor],
    windows: Sequence[Windows],
    settings: Settings,
    log_z: Tensor,
) -> Values:
    losses, coefficients, sums = [], [], []
    softmax = _softmax_sums(embeddings, banks, windows, settings)
    for (lse, mean), positive in zip(softmax, positives, strict=True):
        total = torch.logaddexp(lse, positive)
        losses.append(total - positive)
        weighted = mean * torch.exp(lse - total)[:, None]
        coefficients.append((weighted, torch.exp(positive - total)))
        sums.append(lse)
    return losses, coefficients, sums


def _softmax_sums(
    embeddings: tuple[Tensor, Tensor],
    banks: tuple[Tensor, Tensor],
    windows: Sequence[Windows],
    settings: Settings,
) -> list[tuple[Tensor, Tensor]]:
    """Return logsumexp and weighted mean row over each image's negatives, B and B×D a direction."""
    results = []
    for state in _pass_over(
        embeddings, banks, windows, settings, lambda _, query: OnlineSoftmax(query)
    ):
        lse, mean = state.result()
        if settings.sharded:
            lse, mean = merge_over_ranks(lse, mean)
        results.append((_mine(lse, settings), _mine(mean, settings)))
    return results


def _pass_over(
    embeddings: tuple[Tensor, Tensor],
    banks: tuple[Tensor, Tensor],
    windows: Sequence[Windows],
    settings: Settings,
    make: Callable[[int, Tensor], Any],
) -> list[Any]:
    """Feed the logits of the windows' rows, chunk by chunk, to what ``make`` gives, and return it.

    Args:
        make: from a direction's number and its B×D queries.
    """
    every = [dist.gather_rows(e) if settings.sharded else e for e in embeddings]
    queries = [e.detach() * (LOG2_E / settings.temperature) for e in every]
    gathered = [make(number, query) for number, query in enumerate(queries)]
    chunk, dtype = rows_per_pass(queries[0], CHUNK), queries[0].dtype
    readers = [Rows(bank, dtype, chunk) for bank in banks]
    for stratum in windows:
        for rows, images, counted in stratum.chunks(chunk, dtype):
            for query, reader, state in zip(queries, readers, gathered, strict=True):
                keys = reader.read(rows)  # C×D
                logits = similarities(of_images(query, images), keys)  # b×C
                state.add(images, logits, counted, keys)
    return gathered


class Rows:
    """Reads chunks of a bank's rows into one buffer, in the dtype that they are computed with."""

    def __init__(self, bank: Tensor, dtype: torch.dtype, chunk: int) -> None:
        self.bank = bank
        self.stored = bank.new_empty(chunk, bank.shape[1])
        self.wide = self.stored if bank.dtype == dtype else self.stored.to(dtype)

    def read(self, rows: Tensor) -> Tensor:
        """Return the C×D rows; the next call overwrites them."""
        stored, wide = self.stored[: len(rows)], self.wide[: len(rows)]
        torch.index_select(self.bank, 0, rows, out=stored)
        return wide if wide is stored else wide.copy_(stored)


def _positives(
    embeddings: Sequence[Tensor], own: Sequence[Tensor], settings: Settings
) -> list[Tensor]:
    pairs = zip(embeddings, own, strict=True)
    return [(e.detach() * row).sum(dim=1) / settings.temperature for e, row in pairs]


def _total_count(windows: Sequence[Windows], settings: Settings) -> Tensor:
    count = torch.stack([stratum.count for stratum in windows]).sum(dim=0)
    return _mine(dist.all_sum(count) if settings.sharded else count, settings)


def _mine(joined: Tensor, settings: Settings) -> Tensor:
    """Cut this rank's images out of the joined batch."""
    if not settings.sharded:
        return joined
    size = len(joined) // dist.world_size()
    return joined[dist.rank() * size : (dist.rank() + 1) * size]
