"""NMI: how much of the classes k-means finds again without the labels.

Shapes: ``N`` images, ``D`` embedding, ``k`` clusters.
"""

import dataclasses
import statistics
import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

NORMALISATION = "arithmetic"  # I(C; Y) / ½(H(C) + H(Y)); scikit-learn < 0.22 had the geometric mean
MINIBATCH_FROM = 200_000  # images; from here on Lloyd's full passes take too long


@dataclasses.dataclass(frozen=True)
class Clustering:
    nmi: float  # mean over seeds, 0..1
    std: float  # over seeds, n − 1 in the denominator; 0 for one seed
    values: list[float]  # one a seed
    clusters: int
    normalisation: str = NORMALISATION


def nmi_of_labels(first: np.ndarray, second: np.ndarray) -> float:
    """Return I(A; B) / ½(H(A) + H(B)) of two labellings; 1 where both have one single class."""
    return float(normalized_mutual_info_score(first, second, average_method=NORMALISATION))


def cluster_nmi(
    features: Tensor,
    labels: Tensor,
    seeds: Sequence[int] = (0, 1, 2),
    iterations: int = 100,
    normalise: bool = True,
) -> Clustering:
    """Cluster by k-means, k the number of classes present, and compare with the labels.

    One k-means++ start a seed. Features go onto the unit sphere first (``normalise``), as for
    Recall@1. Lloyd's algorithm up to ``MINIBATCH_FROM`` images, mini-batches from there on: memory
    is one copy of the features and N×k at most.

    Args:
        features: N×D.
        labels: N integers.

    Raises:
        ValueError: unequal lengths, no seed, or features that are not finite.
    """
    points = features.detach().float().cpu().numpy()
    truth = labels.detach().cpu().numpy()
    if points.ndim != 2 or len(points) != len(truth) or not len(points) or not seeds:
        raise ValueError(
            f"features {points.shape} and labels {truth.shape} must be N×D and N, with a seed"
        )
    if not np.isfinite(points).all():
        raise ValueError("features hold values that are not finite")
    if normalise:
        norms = np.linalg.norm(points, axis=1, keepdims=True)
        points = points / np.maximum(norms, 1e-12)
    clusters = len(np.unique(truth))
    values = []
    for seed in seeds:
        kind = KMeans if len(points) < MINIBATCH_FROM else MiniBatchKMeans
        means = kind(clusters, n_init=1, max_iter=iterations, random_state=int(seed))
        with warnings.catch_warnings():  # fewer distinct points than classes: NMI says so itself
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = means.fit_predict(points)
        values.append(nmi_of_labels(truth, found))
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return Clustering(statistics.fmean(values), std, values, clusters)
