"""Few images a class: a logistic regression on seeded draws, with the interval over draws.

Shapes: N images, D feature dimensions, K classes.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from core.seeds import mixed_array
from transfer.logistic import fit_logistic


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over draws with its 95% interval."""

    mean: float
    half_width: float  # Student's t with draws − 1 degrees of freedom
    draws: list[float]


def draw(labels: Tensor, shots: int, seed: int, number: int) -> Tensor:
    """Return the ascending positions of ``shots`` images of each class.

    A function of the labels, ``shots``, ``seed`` and the ``number`` of the draw only; a larger
    draw holds the smaller one of the same seed and number.

    Args:
        labels: N.

    Raises:
        ValueError: a class has fewer than ``shots`` images.
    """
    noise = mixed_array((seed, number), np.arange(len(labels)))
    order = torch.from_numpy(np.lexsort((noise, labels.cpu().numpy())))  # by class, then by noise
    ordered = labels.cpu()[order]
    counts = torch.bincount(ordered)
    if int(counts.min()) < shots:
        short = int(counts.argmin())
        raise ValueError(f"class {short} has {int(counts[short])} images, fewer than {shots} shots")
    starts = counts.cumsum(0) - counts
    chosen = (starts[:, None] + torch.arange(shots)).flatten()
    return order[chosen].sort().values


def few_shot(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: int,
    metric: Callable[[Tensor, Tensor], float],
    shots: int,
    draws: int = 5,
    c: float = 1.0,
    seed: int = 0,
) -> Interval:
    """Fit on ``shots`` images a class, score on all of test; repeat over ``draws`` draws.

    Features are L2-normalised and C is fixed, since so few images leave none to choose it on
    (as in arXiv 2003.11539, §3.2).

    Args:
        train, test: features N×D and labels N.
        metric: of scores N×K and labels N.

    Raises:
        ValueError: fewer than two draws, or a class with too few images.
    """
    if draws < 2:
        raise ValueError(f"{draws} draws give no interval; take at least 2")
    features, labels = F.normalize(train[0].float(), dim=1), train[1]
    test_features = F.normalize(test[0].float(), dim=1)
    values = []
    for number in range(draws):
        chosen = draw(labels, shots, seed, number).to(features.device)
        fit = fit_logistic(features[chosen], labels[chosen], classes, c, tolerance=1e-6)
        values.append(metric(fit.logits(test_features), test[1]))
    return interval(values)


def interval(values: list[float]) -> Interval:
    """Return mean and 95% interval of at least two independent values."""
    deviation = statistics.stdev(values)
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return Interval(
        statistics.fmean(values), quantile * deviation / math.sqrt(len(values)), list(values)
    )
