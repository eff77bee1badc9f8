"""k-nearest neighbours by cosine similarity, weighted by temperature: no training at all.

Shapes: N reference images, Q queries, D feature dimensions, K classes, k neighbours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # queries compared at a time: Q×N never stands in memory as a whole


def knn_scores(
    queries: Tensor,
    reference: Tensor,
    labels: Tensor,
    classes: int,
    neighbours: Sequence[int] = (20, 200),
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """Return Q×K votes for each number of neighbours, each vote worth exp(cosine / temperature).

    Votes are divided by the nearest one's, so that none overflows. The weighting, and 0.07, are
    those of instance discrimination (arXiv 1805.01978, §3.4).

    Args:
        queries: Q×D. reference: N×D. labels: N, of the reference.
        neighbours: each at most N.

    Raises:
        ValueError: more neighbours than reference images, or a temperature that is not positive.
    """
    largest = max(neighbours)
    if largest > len(reference) or min(neighbours) < 1:
        raise ValueError(f"{largest} neighbours of {len(reference)} reference images")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be positive")
    unit_reference = F.normalize(reference.float(), dim=1)
    votes: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for chunk in queries.split(CHUNK):
        similarity = F.normalize(chunk.float(), dim=1) @ unit_reference.T  # q×N
        nearest, index = similarity.topk(largest, dim=1)  # q×largest, descending
        weight = torch.exp((nearest - nearest[:, :1]) / temperature)
        for k in neighbours:
            scores = weight.new_zeros(len(chunk), classes)
            scores.scatter_add_(1, labels[index[:, :k]], weight[:, :k])
            votes[k].append(scores)
    return {k: torch.cat(parts) for k, parts in votes.items()}
