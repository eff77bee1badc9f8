"""Recall@1: how often the nearest neighbour of an image is of its class.

Shapes: ``N`` images, ``D`` embedding, ``B`` queries a block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 64 * 2**20  # of one block of similarities
TIE_TOLERANCE = 1e-6  # of a cosine: float32 rounding of one product against another


@torch.no_grad()
def recall_at_1(features: Tensor, labels: Tensor, block_bytes: int = BLOCK_BYTES) -> float:
    """Return the share of images whose nearest other image, by cosine, has the same label; 0..1.

    The query itself is not among its references. References within ``TIE_TOLERANCE`` of the
    nearest are tied: the query then counts by the share of them that has its label, which is the
    expectation over a random choice among them (so copies of one image decide nothing by their
    order). A zero vector has cosine 0 to everything. An image alone in its class is a miss.

    Memory beyond the normalised features is one block of B×N similarities, ``block_bytes``.

    Args:
        features: N×D, any scale.
        labels: N integers.

    Raises:
        ValueError: fewer than two images, unequal lengths, or features that are not finite.
    """
    if features.ndim != 2 or len(features) != len(labels) or len(features) < 2:
        raise ValueError(
            f"features {tuple(features.shape)} and labels {tuple(labels.shape)} must be N×D and N, "
            "with N at least 2"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features hold values that are not finite")
    unit = F.normalize(features.float())  # N×D
    labels = labels.to(unit.device)
    size = max(1, block_bytes // (4 * len(unit)))
    hits = torch.zeros((), dtype=torch.float64, device=unit.device)
    for start in range(0, len(unit), size):
        cosine = unit[start : start + size] @ unit.T  # B×N
        rows = torch.arange(len(cosine), device=unit.device)
        cosine[rows, start + rows] = -torch.inf
        nearest = cosine.amax(1, keepdim=True)  # B×1
        query, reference = (cosine >= nearest - TIE_TOLERANCE).nonzero(as_tuple=True)
        right = (labels[reference] == labels[start + query]).double()
        tied = torch.zeros(2, len(rows), dtype=torch.float64, device=unit.device)
        tied[0].index_add_(0, query, right)
        tied[1].index_add_(0, query, torch.ones_like(right))
        hits += (tied[0] / tied[1]).sum()
    return float(hits) / len(unit)
