"""NMI against its definition, scikit-learn's score, and clusters that can be drawn by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from analysis.clustering import NORMALISATION, cluster_nmi, nmi_of_labels


def by_definition(a: list[int], b: list[int]) -> float:
    """I(A; B) / ½(H(A) + H(B)) from counts."""
    n = len(a)
    count_a, count_b, both = Counter(a), Counter(b), Counter(zip(a, b, strict=True))
    entropy = [
        -sum(c / n * math.log(c / n) for c in count.values()) for count in (count_a, count_b)
    ]
    shared = sum(c / n * math.log(n * c / (count_a[i] * count_b[j])) for (i, j), c in both.items())
    return shared / (sum(entropy) / 2)


def test_nmi_is_the_arithmetic_normalisation_of_the_definition() -> None:
    draw = np.random.default_rng(0)
    a = draw.integers(0, 4, 200)
    b = np.where(draw.random(200) < 0.6, a, draw.integers(0, 7, 200))
    assert nmi_of_labels(a, b) == pytest.approx(by_definition(a.tolist(), b.tolist()), abs=1e-12)
    geometric = normalized_mutual_info_score(a, b, average_method="geometric")
    assert abs(nmi_of_labels(a, b) - geometric) > 1e-3  # the case tells the two apart
    assert NORMALISATION == "arithmetic"


def blobs(classes: int, each: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions evenly round a circle, so that they survive the unit sphere."""
    labels = torch.arange(classes).repeat_interleave(each)
    angle = labels * (2 * math.pi / classes)
    noise = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(0)) * spread
    return torch.stack([angle.cos(), angle.sin()], 1) + noise, labels


def test_perfect_clusters_give_one_whatever_their_numbering() -> None:
    features, labels = blobs(3, 40, 0.01)
    found = cluster_nmi(features, (2 - labels) * 5, seeds=(0, 1))
    assert found.values == pytest.approx([1.0, 1.0], abs=1e-9)
    assert (found.nmi, found.std, found.clusters) == (pytest.approx(1.0), pytest.approx(0.0), 3)


def test_labels_that_features_do_not_tell_give_nearly_nothing() -> None:
    features, labels = blobs(4, 250, 0.3)
    mixed = labels[torch.randperm(1000, generator=torch.Generator().manual_seed(3))]
    assert cluster_nmi(features, mixed).nmi < 0.02


def test_identical_features_are_one_cluster_and_tell_nothing() -> None:
    found = cluster_nmi(torch.ones(30, 4), torch.arange(30) % 3, seeds=(0,))
    assert found.nmi == pytest.approx(0.0, abs=1e-9)


def test_seeds_are_used_and_reproduced_and_agree_with_scikit_learn() -> None:
    features, labels = blobs(5, 30, 0.6)
    first, again = (cluster_nmi(features, labels, seeds=(0, 1, 2)) for _ in range(2))
    assert first.values == again.values
    assert len(set(first.values)) > 1
    assert first.std == pytest.approx(np.std(first.values, ddof=1))
    unit = torch.nn.functional.normalize(features).numpy()
    reference = KMeans(5, n_init=1, max_iter=100, random_state=1).fit_predict(unit)
    assert first.values[1] == pytest.approx(nmi_of_labels(labels.numpy(), reference), abs=1e-6)


def test_scale_of_a_feature_vector_does_not_count_unless_asked() -> None:
    features, labels = blobs(3, 40, 0.05)
    scale = torch.where(torch.arange(len(features)) % 2 == 0, 0.01, 50.0)[:, None]
    assert cluster_nmi(features * scale, labels, seeds=(0,)).nmi == pytest.approx(1.0)
    assert cluster_nmi(features * scale, labels, seeds=(0,), normalise=False).nmi < 0.9


@pytest.mark.parametrize(
    ("features", "labels", "words"),
    [
        (torch.ones(3, 2), torch.zeros(2), "N×D and N"),
        (torch.full((3, 2), float("inf")), torch.zeros(3), "not finite"),
    ],
)
def test_bad_input_is_refused(features: torch.Tensor, labels: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cluster_nmi(features, labels)
