"""The batch's attention over a memory bank, and from it the instance loss, without B×N logits.

Shapes: B images, N bank rows, D embedding, C rows of a chunk, W ranks.

L_IAS of image i is logsumexp_j(u_i·M_j/τ) − u_i·M_i/τ, and its gradient with respect to u_i is
(Σ_j p_j M_j − M_i)/τ: the softmax-weighted mean of the rows is the output of attention with the
bank as keys and values. One online-softmax pass gives both, in O(B·D) memory.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core import dist
from pretrain.products import similarities, weighted_sums

LOG2_E = math.log2(math.e)
EXCLUDED = -1e30  # a logit that stands for −inf, without its NaNs
KERNELS = ("auto", "chunks", "fused")
CHUNK = 16384  # bank rows of a pass on a CPU: they stay in its last cache
DEVICE_CHUNK = 262144  # and at most on a GPU, where each pass costs its launches
LOGITS = {"cpu": 1 << 20, "cuda": 1 << 23}  # B×C numbers of a pass, at most
HEADS = 128  # parts of the bank that a fused kernel works on at the same time


def attend(
    queries: Tensor, rows: Tensor, scale: float, kernel: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return log Σ_j exp(scale·q·M_j), B, and Σ_j p_j M_j, B×D; no gradient flows through it.

    Args:
        queries: q, B×D. rows: M, N×D, of any float dtype. scale: 1/τ.
        kernel: "chunks" multiplies chunk by chunk and serves everywhere; "fused" is torch's own
            attention kernel; "auto" takes the latter on GPUs, where it is there and as exact. On
            CPUs chunks are faster.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r} is not one of {', '.join(KERNELS)}")
    if kernel == "auto":
        on_gpu = queries.device.type == "cuda"
        kernel = "fused" if on_gpu and fused_serves(queries.device, queries.shape[1]) else "chunks"
    return (_attend_fused if kernel == "fused" else _attend_in_chunks)(queries, rows, scale)


@functools.cache
def fused_serves(device: torch.device, dim: int) -> bool:
    """Return whether a device's fused kernel takes float32 rows of ``dim`` and is exact enough."""
    generator = torch.Generator().manual_seed(0)
    queries, rows = (
        F.normalize(torch.randn(n, dim, generator=generator), dim=1).to(device) for n in (3, 700)
    )
    try:
        lse, mean = _attend_fused(queries, rows, 10.0)
    except (RuntimeError, NotImplementedError):
        return False
    expected_lse, expected_mean = _attend_in_chunks(queries, rows, 10.0)
    near = torch.allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
    return near and torch.allclose(mean, expected_mean, rtol=1e-4, atol=1e-6)


def rows_per_pass(queries: Tensor, on_cpu: int) -> int:
    """Return C for B×D queries: bounded by itself and by the size of the B×C logits."""
    device = queries.device.type
    most = LOGITS.get(device, LOGITS["cuda"]) // max(len(queries), 1)
    return min(on_cpu if device == "cpu" else DEVICE_CHUNK, max(most, 256))


def _attend_in_chunks(queries: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    state = OnlineSoftmax(queries)
    scaled = queries * (scale * LOG2_E)
    for part in rows.split(rows_per_pass(queries, CHUNK)):
        keys = part.to(queries.dtype)
        state.add(None, similarities(scaled, keys), None, keys)
    return state.result()


def _attend_fused(queries: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Give parts of the bank to a fused kernel as heads, so that all cores work; merge them."""
    images, heads = len(queries), max(1, min(HEADS, len(rows) // 64))
    length = len(rows) // heads
    keys = rows[: heads * length].view(1, heads, length, -1).to(queries.dtype)
    spread = queries[None, None].expand(1, heads, *queries.shape)
    if queries.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        means, lses = flash(spread, keys, keys, 0.0, False, scale=scale)[:2]  # 1×H×B×D
    else:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        means, lses = efficient(spread, keys, keys, None, True, 0.0, False, scale=scale)[:2]
    lse = lses.reshape(heads, -1)[:, :images]  # a kernel may pad the images
    mean = means[0]
    if heads * length < len(rows):
        rest = _attend_in_chunks(queries, rows[heads * length :], scale)
        lse, mean = torch.cat([lse, rest[0][None]]), torch.cat([mean, rest[1][None]])
    total = torch.logsumexp(lse, dim=0)
    return total, (mean * torch.exp(lse - total)[:, :, None]).sum(dim=0)


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
        if images is None and counted is None:
            self._add_all(logits, keys)
            return
        if counted is not None:
            logits.sub_(1.0 - counted, alpha=-EXCLUDED)
        before = of_images(self.largest, images)
        largest = torch.maximum(before, logits.amax(dim=1, keepdim=True))
        kept = torch.exp2(before - largest)
        weights = logits.sub_(largest).exp2_()
        if counted is not None:
            weights.mul_(counted)  # where nothing has counted so far
        total = of_images(self.total, images) * kept + weights.sum(dim=1, keepdim=True)
        weighted = of_images(self.weighted, images) * kept + weighted_sums(weights, keys)
        if images is None:
            self.largest, self.total, self.weighted = largest, total, weighted
        else:
            self.largest.index_copy_(0, images, largest)
            self.total.index_copy_(0, images, total)
            self.weighted.index_copy_(0, images, weighted)

    def _add_all(self, logits: Tensor, keys: Tensor) -> None:
        """``add`` where all counts, in as few operations as there can be."""
        largest = torch.maximum(self.largest, logits.amax(dim=1, keepdim=True))
        kept = self.largest.sub_(largest).exp2_()
        weights = logits.sub_(largest).exp2_()
        self.total.mul_(kept).add_(weights.sum(dim=1, keepdim=True))
        self.weighted.mul_(kept).add_(weighted_sums(weights, keys))
        self.largest = largest

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
