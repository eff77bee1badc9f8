"""The batch's attention over a memory bank, and from it the instance loss, without B×N logits.

Shapes: B images, N bank rows, D embedding, C rows of a chunk, W ranks.

L_IAS of image i is logsumexp_j(u_i·M_j/τ) − u_i·M_i/τ, and its gradient with respect to u_i is
(Σ_j p_j M_j − M_i)/τ: the softmax-weighted mean of the rows is the output of attention with the
bank as keys and values. One online-softmax pass gives both, in O(B·D) memory.
"""

import math
from typing import Any

import torch
from torch import Tensor

from core import dist

LOG2_E = math.log2(math.e)
EXCLUDED = -1e30  # a logit that stands for −inf, without its NaNs
CHUNK = 2048  # bank rows in one pass of the fallback: B×C logits and C×D rows stay in the cache


def attend(
    queries: Tensor, rows: Tensor, scale: float, kernel: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return log Σ_j exp(scale·q·M_j), B, and Σ_j p_j M_j, B×D; no gradient flows through it.

    Args:
        queries: q, B×D. rows: M, N×D, of any float dtype. scale: 1/τ.
        kernel: "auto", or "chunks" for the fallback.
    """
    return _attend_in_chunks(queries, rows, scale)


def _attend_in_chunks(queries: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    state = OnlineSoftmax(queries)
    scaled = queries * (scale * LOG2_E)
    for low in range(0, len(rows), CHUNK):
        keys = rows[low : low + CHUNK].to(queries.dtype)
        state.add(None, scaled @ keys.T, None, keys)
    return state.result()


class OnlineSoftmax:
    """Σ exp(x) and Σ exp(x)·row, gathered chunk by chunk against the largest x so far.

    Logits come to the base 2, x·log2(e): exp2 is several times faster than exp on some CPUs.
    """

    def __init__(self, queries: Tensor) -> None:
        images = len(queries)
        self.largest = queries.new_full((images, 1), EXCLUDED)
        self.total = queries.new_zeros(images, 1)
        self.weighted = torch.zeros_like(queries)

    def add(
        self, images: Tensor | None, logits: Tensor, counted: Tensor | None, keys: Tensor
    ) -> None:
        """Take the logits of some images (None: of all), b×C, and the C×D rows; eats the logits.

        ``counted``, b×C: 1 where a logit counts, else 0.
        """
        if counted is not None:
            logits.sub_(1.0 - counted, alpha=-EXCLUDED)
        before = of_images(self.largest, images)
        largest = torch.maximum(before, logits.amax(dim=1, keepdim=True))
        kept = torch.exp2(before - largest)
        weights = logits.sub_(largest).exp2_()
        if counted is not None:
            weights.mul_(counted)  # where nothing has counted so far
        total = of_images(self.total, images) * kept + weights.sum(dim=1, keepdim=True)
        weighted = torch.addmm(of_images(self.weighted, images) * kept, weights, keys)
        if images is None:
            self.largest, self.total, self.weighted = largest, total, weighted
        else:
            self.largest.index_copy_(0, images, largest)
            self.total.index_copy_(0, images, total)
            self.weighted.index_copy_(0, images, weighted)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return logsumexp, B (−inf of nothing), and the weighted mean row, B×D (0 of nothing)."""
        lse = (self.largest + self.total.log2())[:, 0] / LOG2_E
        return lse, self.weighted / self.total.clamp(min=torch.finfo(self.total.dtype).tiny)


def of_images(state: Tensor, images: Tensor | None) -> Tensor:
    """Return the rows of some images, or of all."""
    return state if images is None else state.index_select(0, images)


def merge_over_ranks(lse: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint parts of the keys, one part a rank: B and B×D on every rank."""
    parts = dist.gather_rows(lse[None])  # W×B
    total = torch.logsumexp(parts, dim=0)
    return total, dist.all_sum(mean * torch.exp(lse - total)[:, None])


class _InstanceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embedding: Tensor, own: Tensor, rows: Tensor, scale: float, sharded: bool
    ) -> Tensor:
        if sharded:
            size, first = len(embedding), dist.rank() * len(embedding)
            lse, mean = attend(dist.gather_rows(embedding), rows, scale)
            lse, mean = merge_over_ranks(lse, mean)
            lse, mean = lse[first : first + size], mean[first : first + size]
        else:
            lse, mean = attend(embedding, rows, scale)
        ctx.save_for_backward((mean - own) * scale)
        return lse - (embedding * own).sum(dim=1) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grads[0][:, None] * gradient, None, None, None, None


def bank_instance_loss(
    embedding: Tensor, own: Tensor, rows: Tensor, temperature: float, *, sharded: bool = False
) -> Tensor:
    """Return L_IAS per image, B: ``losses.instance_loss`` in O(B·D) memory.

    Args:
        embedding: u, B×D, float32 or float64. own: M_i, B×D, the images' own rows.
        rows: M, N×D, or this rank's shard of it (``sharded``; then it is collective).
        temperature: τ1.
    """
    return _InstanceLoss.apply(embedding, own, rows, 1.0 / temperature, sharded)
