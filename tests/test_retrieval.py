"""Recall@1 against a brute-force loop, and on cases small enough to count by hand."""

import pytest
import torch
from torch import Tensor

from analysis.retrieval import recall_at_1


def brute_force(features: Tensor, labels: Tensor) -> float:
    """One query at a time, in float64, ties by the share of tied references that are right."""
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(len(unit)):
        others = [j for j in range(len(unit)) if j != i]
        cosines = torch.stack([unit[i] @ unit[j] for j in others])
        tied = [j for j, c in zip(others, cosines, strict=True) if c >= cosines.max() - 1e-6]
        total += sum(int(labels[j] == labels[i]) for j in tied) / len(tied)
    return total / len(unit)


@pytest.mark.parametrize("block_bytes", [1, 4 * 60 * 7, 2**26])  # 1, 7 and all queries a block
def test_equals_brute_force_whatever_the_block(block_bytes: int) -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=draw) * torch.rand(60, 1, generator=draw).exp()
    labels = torch.randint(3, (60,), generator=draw)
    assert recall_at_1(features, labels, block_bytes) == pytest.approx(
        brute_force(features, labels), abs=1e-12
    )


def test_the_query_is_not_its_own_neighbour() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert recall_at_1(features, torch.tensor([0, 1, 0, 1])) == 0.0
    assert recall_at_1(features, torch.tensor([0, 0, 1, 1])) == 1.0


def test_only_the_direction_counts() -> None:
    """By distance (1, 0)'s nearest is (1, 1); by cosine it is (9, 1)."""
    features = torch.tensor([[1.0, 0.0], [9.0, 1.0], [1.0, 1.0], [8.0, 9.0]])
    assert recall_at_1(features, torch.tensor([0, 0, 1, 1])) == 1.0


def test_ties_count_by_the_share_that_is_right_not_by_their_order() -> None:
    """Five copies of one vector, labels 0 0 0 1 1: each 0 has 2 of 4 right, each 1 has 1 of 4."""
    labels = torch.tensor([0, 0, 0, 1, 1])
    expected = (3 * 2 / 4 + 2 * 1 / 4) / 5
    for order in (torch.arange(5), torch.tensor([4, 0, 3, 1, 2])):
        found = recall_at_1(torch.ones(5, 3), labels[order])
        assert found == pytest.approx(expected, abs=1e-12)


def test_random_features_are_at_chance() -> None:
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(3000) % 10
    found = recall_at_1(torch.randn(3000, 16, generator=draw), labels)
    assert found == pytest.approx(299 / 2999, abs=4 * (0.09 / 3000) ** 0.5)


def test_an_image_alone_in_its_class_is_a_miss_and_a_zero_vector_is_no_error() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 0.0]])
    assert recall_at_1(features, torch.tensor([0, 0, 1])) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("features", "labels", "words"),
    [
        (torch.ones(1, 2), torch.zeros(1), "at least 2"),
        (torch.ones(3, 2), torch.zeros(2), "N×D and N"),
        (torch.tensor([[1.0], [float("nan")]]), torch.zeros(2), "not finite"),
    ],
)
def test_bad_input_is_refused(features: Tensor, labels: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recall_at_1(features, labels)
