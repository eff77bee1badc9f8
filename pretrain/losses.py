"""The losses as formulas: pure functions of tensors, differentiable by autograd, any float dtype.

Shapes: B images, N training images = bank rows, K negatives, D embedding.
Symbols of CTC (arXiv 2203.03871 and its released code): u, v, t L2-normalised embeddings, M a
memory bank, τ a temperature, Z a normalisation constant, c = K/N the noise share.

``pretrain.bank_loss`` computes the same without the B×N and B×K tensors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NCE_EPSILON = 1e-7  # ε of the released code, added to P + c
ESTIMATORS = ("nce", "infonce")


def instance_loss(embedding: Tensor, rows: Tensor, index: Tensor, tau1: float) -> Tensor:
    """Return L_IAS per image, B: −log softmax of the image's own row among all bank rows.

    Materialises the B×N logits. The bank gets no gradient. Source: stage 1 of CTC.

    Args:
        embedding: u, B×D, L2-normalised. rows: M, N×D. index: B, the images' rows in 0..N-1.
        tau1: above 0.
    """
    logits = embedding @ rows.detach().T / tau1  # B×N
    return F.cross_entropy(logits, index, reduction="none")


def preservation_loss(
    embedding: Tensor,
    rows: Tensor,
    contrast_index: Tensor,
    tau2: float,
    *,
    estimator: str = "nce",
    log_z: Tensor | float = 0.0,
    share: float | Tensor = 1.0,
) -> Tensor:
    """Return one direction of L_IPS per image, B, on explicitly named negatives.

    Source: stage 2 of CTC; ``nce`` as released, ``infonce`` as the poster argues.

    Args:
        embedding: v (or t), B×D, L2-normalised. rows: M^t (or M^v), N×D, no gradient.
        contrast_index: B×(K+1) bank rows, column 0 the positive.
        tau2: above 0.
        log_z: log Z of this direction (``nce``). share: c = K/N, a number or B (``nce``).
    """
    similarity = contrast_similarity(embedding, rows, contrast_index) / tau2  # B×(K+1)
    positive, negatives = similarity[:, 0], similarity[:, 1:]
    if estimator == "nce":
        return nce_loss(positive, negatives, log_z, share)
    if estimator == "infonce":
        return infonce_loss(positive, negatives)
    raise ValueError(f"estimator {estimator!r} is not one of {', '.join(ESTIMATORS)}")


def contrast_similarity(embedding: Tensor, rows: Tensor, contrast_index: Tensor) -> Tensor:
    """Return the inner products of each image with the rows named for it, B×(K+1)."""
    return torch.einsum("bd,bkd->bk", embedding, rows.detach()[contrast_index])


def nce_loss(
    positive: Tensor, negatives: Tensor, log_z: Tensor | float, share: float | Tensor
) -> Tensor:
    """Return noise-contrastive estimation with a constant Z, per image, B.

    −log[P⁺/(P⁺ + c + ε)] − Σ log[c/(P + c + ε)] with P = exp(·)/Z. Written with the log odds
    x = log P − log(c + ε) it is softplus(−x⁺) + Σ softplus(x) + K·log((c + ε)/c), which neither
    overflows nor cancels, and whose derivatives are σ(x⁺) − 1 and σ(x).

    Args:
        positive: B, similarity over τ. negatives: B×K, likewise. share: c, a number or B.
    """
    share = torch.as_tensor(share, dtype=positive.dtype, device=positive.device)
    shift = nce_shift(log_z, share).expand(positive.shape)
    drawn = F.softplus(negatives - shift[:, None]).sum(dim=1)
    return F.softplus(shift - positive) + drawn + nce_constant(negatives.shape[1], share)


def nce_shift(log_z: Tensor | float, share: Tensor) -> Tensor:
    """Return log Z + log(c + ε), what a similarity over τ is compared with."""
    return torch.log(share + NCE_EPSILON) + log_z


def nce_constant(negatives: int | Tensor, share: Tensor) -> Tensor:
    """Return K·log((c + ε)/c), the part of the loss without a gradient."""
    return negatives * torch.log1p(NCE_EPSILON / share)


def infonce_loss(positive: Tensor, negatives: Tensor) -> Tensor:
    """Return −log softmax of the positive among itself and its negatives, per image, B."""
    every = torch.cat([positive[:, None], negatives], dim=1)  # B×(K+1)
    return torch.logsumexp(every, dim=1) - positive


def log_mean_exp(similarity: Tensor) -> Tensor:
    """Return log of the mean of exp over all entries, a scalar: log(Z/N) of the first batch."""
    return torch.logsumexp(similarity.flatten(), 0) - torch.log(
        torch.tensor(similarity.numel(), dtype=similarity.dtype, device=similarity.device)
    )
