"""CTC's losses against memory banks in one pass over chunks of rows: no B×N and no B×K×D tensor.

Shapes: B images, N bank rows, K negatives, D embedding, C rows of a chunk, W ranks.

Each loss of an image is a sum over bank rows (``nce``) or a logsumexp (L_IAS, ``infonce``), and its
gradient with respect to the embedding a weighted sum of the same rows. So both are accumulated
chunk by chunk: the rows of a chunk are read once, multiplied with the embeddings, turned into terms
of the loss and, in place, into weights, and multiplied again. The formulas are those of
``pretrain.losses``, against which tests compare every path.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from core import dist
from pretrain.losses import nce_constant, nce_shift
from pretrain.negatives import Negatives, rows_of

LOG2_E = math.log2(math.e)
EXCLUDED = -1e30  # a logit that stands for −inf, without its NaNs
LARGEST_ODDS = 60.0  # log2; squared they stay below float32's largest
ALL_ROWS_CHUNK = 16384  # bank rows of a pass on a CPU where they lie in order: its last cache
DRAWN_ROWS_CHUNK = 4096  # and where they are gathered, two banks at a time: its second cache
DEVICE_CHUNK = 262144  # and at most on a GPU, where each pass costs its launches
LOGITS = {"cpu": 1 << 20, "cuda": 1 << 23}  # B×C numbers of a pass, at most
Pair = tuple[Tensor, Tensor]

# On CPUs torch multiplies float32 matrices by MKL, which on AMD processors leaves AVX-512 unused;
# oneDNN, which torch carries too, is up to twice as fast there, and as exact. torch has no public
# call that picks it for float32 without also lowering the precision; this is the operator that
# torch.compile uses. The choice depends on the machine alone, never on timing: a resumed run must
# compute what the first one did.
_ONEDNN = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


def times_transposed(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right.T, float32 matrices on a CPU by the fastest exact route."""
    is_plain = left.dtype == torch.float32 and left.device.type == "cpu"
    if _ONEDNN is not None and is_plain and left.numel() and right.numel():
        return _ONEDNN(left, right, None, "none", [], "")
    return left @ right.T


class Sums:
    """Σ f(x) and Σ f'(x)·row over bank rows, for each of B images; x = embedding·row/τ.

    f(x) is exp(x), relative to the largest x so far; or with a shift log(1 + exp(x − shift)).
    Logits are kept to the base 2: exp2 is several times faster than exp on some CPUs.

    Args:
        embedding: B×D. tau: τ1 or τ2. shift: B (losses.nce_shift).
        sharded: the rows that are added are a rank's part of all; ``softmax`` and ``nce`` then
            merge the sums of all ranks. Collective; embedding and shift are those of all ranks.
    """

    def __init__(
        self, embedding: Tensor, tau: float, shift: Tensor | None = None, sharded: bool = False
    ) -> None:
        self.queries = embedding * (LOG2_E / tau)
        self.is_nce, self.sharded = shift is not None, sharded
        images = len(embedding)
        self.sums = embedding.new_zeros(images, 1 + embedding.shape[1])  # of f, of f'·row
        if shift is None:
            self.reference = embedding.new_full((images, 1), EXCLUDED)  # the largest x so far
        else:
            self.reference = shift[:, None] * LOG2_E
        # rows are at most sqrt(3) long, so x − shift < 2·sqrt(3)/τ
        self.may_overflow = 2 * math.sqrt(3) / tau * LOG2_E > LARGEST_ODDS

    def add(
        self, keys: Tensor, images: Tensor | None = None, counted: Tensor | None = None
    ) -> None:
        """Add C×D rows for some images (None: all); ``counted``, b×C: 1 where a pair counts."""
        logits = times_transposed(rows_of(self.queries, images), keys)  # b×C
        reference, before = rows_of(self.reference, images), rows_of(self.sums, images)
        if self.is_nce:
            total, weights = self._log_one_plus(logits.sub_(reference), counted)
        else:
            if counted is not None:
                logits.add_(counted - 1.0, alpha=-EXCLUDED)
            largest = torch.maximum(reference, logits.amax(dim=1, keepdim=True))
            before = before * torch.exp2(reference - largest)
            weights = logits.sub_(largest).exp2_()
            if counted is not None:
                weights.mul_(counted)  # where nothing has counted so far
            total = weights.sum(dim=1, keepdim=True)
            self.reference = _with_rows(self.reference, images, largest)
        new = torch.cat([total, times_transposed(weights, keys.T)], dim=1)  # b×(1 + D)
        self.sums = _with_rows(self.sums, images, new.add_(before))

    def _log_one_plus(self, x: Tensor, counted: Tensor | None) -> Pair:
        """Return Σ log2(1 + 2^x), b×1, and 2^x / (1 + 2^x), b×C; overwrites x.

        log(1 + o) rounds o to 2^-24, up as often as down; it is ten times faster than log1p,
        which is not vectorised on CPUs. Two odds share a logarithm, as 1 + (a + b(1 + a)): in
        (1 + a)(1 + b) the product of small odds would always be rounded away.
        """
        beyond: Tensor | float = 0.0
        if self.may_overflow:
            beyond = (x - LARGEST_ODDS).clamp_(min=0.0)
            beyond = (beyond if counted is None else beyond.mul_(counted)).sum(dim=1, keepdim=True)
            x = x.clamp_(max=LARGEST_ODDS)
        odds = x.exp2_()
        if counted is not None:
            odds.mul_(counted)
        plus_one = odds + 1.0
        half = odds.shape[1] // 2
        pairs = torch.addcmul(odds[:, :half], odds[:, half : 2 * half], plus_one[:, :half])
        total = pairs.add_(1.0).log2_().sum(dim=1, keepdim=True)
        total += plus_one[:, 2 * half :].log2().sum(dim=1, keepdim=True)  # of an odd one out
        return total + beyond, odds.div_(plus_one)

    def nce(self) -> Pair:
        """Return Σ log(1 + exp(x − shift)), B, and Σ σ(x − shift)·row, B×D, of own images."""
        sums = own_images(dist.all_sum(self.sums), True) if self.sharded else self.sums
        return sums[:, 0] / LOG2_E, sums[:, 1:]

    def softmax(self) -> Pair:
        """Return log Σ exp(x), B (−inf of nothing), and the mean row by its weights, B×D (0)."""
        sums, reference = self.sums, self.reference
        if self.sharded:
            reference = dist.gather_rows(reference.T).amax(dim=0)[:, None]
            sums = dist.all_sum(sums * torch.exp2(self.reference - reference))
            sums, reference = own_images(sums, True), own_images(reference, True)
        total = sums[:, :1]
        lse = (reference + total.log2())[:, 0] / LOG2_E
        return lse, sums[:, 1:] / total.clamp(min=torch.finfo(total.dtype).tiny)


def instance_loss(
    embedding: Tensor, own: Tensor, rows: Tensor, tau1: float, *, sharded: bool = False
) -> Tensor:
    """Return L_IAS per image, B: ``losses.instance_loss`` in O(B·D) memory.

    Args:
        embedding: u, B×D, float32 or float64. own: M_i, B×D, the images' own rows.
        rows: M, N×D of any float dtype, or this rank's shard of it (``sharded``; collective).
    """
    with torch.no_grad():
        sums = Sums(all_images(embedding, sharded), tau1, sharded=sharded)
        for part in rows.split(_rows_per_pass(sums.queries, ALL_ROWS_CHUNK)):
            sums.add(part.to(embedding.dtype))
        lse, mean = sums.softmax()
        losses = lse - (embedding * own).sum(dim=1) / tau1
    return _with_gradient(losses, embedding, (mean - own) / tau1)


def preservation_losses(
    embeddings: Pair,
    own: Pair,
    banks: Pair,
    negatives: Negatives,
    images: int,
    tau2: float,
    log_z: Tensor | None,
    *,
    sharded: bool = False,
) -> Pair:
    """Return ℓ^v and ℓ^t per image, B and B: ``losses.preservation_loss`` on drawn negatives.

    Args:
        embeddings: v and t, B×D, float32 or float64. own: their positives M^t_i and M^v_i, B×D.
        banks: M^t and M^v, N×D, or this rank's shard of them (``sharded``; collective).
        negatives: of the B images or, sharded, of all W·B images.
        images: N. log_z: log Z of each direction, 2, for ``nce``; None for ``infonce``.
    """
    losses = []
    with torch.no_grad():
        count = negatives.count
        share = count.to(own[0].dtype) / images  # c
        shifts = None if log_z is None else [nce_shift(z, share) for z in log_z.to(share.dtype)]
        sums = _sums(embeddings, banks, negatives, tau2, sharded, shifts)
    for number, (embedding, row, one) in enumerate(zip(embeddings, own, sums, strict=True)):
        with torch.no_grad():
            positive = (embedding * row).sum(dim=1) / tau2
            if shifts is not None:
                shift = own_images(shifts[number], sharded)
                total, weighted = one.nce()
                constant = own_images(nce_constant(count, share), sharded)
                value = F.softplus(shift - positive) + total + constant
                pull = -torch.sigmoid(shift - positive)
            else:
                lse, mean = one.softmax()
                total = torch.logaddexp(lse, positive)
                value = total - positive
                weighted = mean * torch.exp(lse - total)[:, None]
                pull = torch.expm1(positive - total)
            gradient = (weighted + pull[:, None] * row) / tau2
        losses.append(_with_gradient(value, embedding, gradient))
    return losses[0], losses[1]


@torch.no_grad()
def first_log_z(
    embeddings: Pair,
    own: Pair,
    banks: Pair,
    negatives: Negatives,
    images: int,
    tau2: float,
    *,
    sharded: bool = False,
) -> Tensor:
    """Return log Z of each direction, 2: Z = N · mean of exp(·/τ2) over the joined batch.

    The mean is over positives and negatives of all ranks' images. Collective. Arguments are those
    of ``preservation_losses``.
    """
    sums = _sums(embeddings, banks, negatives, tau2, sharded, None)
    per_image = [
        torch.logaddexp(one.softmax()[0], (embedding * row).sum(dim=1) / tau2)
        for one, embedding, row in zip(sums, embeddings, own, strict=True)
    ]
    every = dist.gather_rows(torch.stack(per_image, dim=1))  # W·B×2
    entries = all_images(negatives.count + 1, not sharded).sum()
    return torch.logsumexp(every, dim=0) - entries.to(every.dtype).log() + math.log(images)


def _sums(
    embeddings: Pair,
    banks: Pair,
    negatives: Negatives,
    tau2: float,
    sharded: bool,
    shifts: Sequence[Tensor] | None,
) -> list[Sums]:
    """Return both directions' sums over all negatives."""
    sums = [
        Sums(all_images(e.detach(), sharded), tau2, shift, sharded)
        for e, shift in zip(embeddings, shifts or (None, None), strict=True)
    ]
    chunk, dtype = _rows_per_pass(sums[0].queries, DRAWN_ROWS_CHUNK), embeddings[0].dtype
    buffers = [bank.new_empty(chunk, bank.shape[1]) for bank in banks]
    for rows, images, counted in negatives.chunks(chunk, dtype):
        for one, bank, buffer in zip(sums, banks, buffers, strict=True):
            keys = torch.index_select(bank, 0, rows, out=buffer[: len(rows)])  # C×D
            one.add(keys.to(dtype), images, counted)
    return sums


def _with_gradient(losses: Tensor, embedding: Tensor, gradient: Tensor) -> Tensor:
    """Return B losses whose gradient with respect to the B×D embedding is known already."""
    return losses + ((embedding - embedding.detach()) * gradient).sum(dim=1)


def all_images(own: Tensor, gathered: bool) -> Tensor:
    """Return all ranks' images, W·B×…, if asked to; else the tensor."""
    return dist.gather_rows(own) if gathered else own


def own_images(joined: Tensor, gathered: bool) -> Tensor:
    """Return this rank's images of all ranks', if they were gathered; else the tensor."""
    size = len(joined) // dist.world_size()
    return joined[dist.rank() * size :][:size] if gathered else joined


def _with_rows(x: Tensor, images: Tensor | None, rows: Tensor) -> Tensor:
    return rows if images is None else x.index_copy_(0, images, rows)


def _rows_per_pass(queries: Tensor, on_cpu: int) -> int:
    """Return C for B×D queries: bounded by itself and by the size of the B×C logits."""
    device = queries.device.type
    most = LOGITS.get(device, LOGITS["cuda"]) // max(len(queries), 1)
    return min(on_cpu if device == "cpu" else DEVICE_CHUNK, max(most, 256))
