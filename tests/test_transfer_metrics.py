"""Scores by hand-made cases; neighbours by brute force; few-shot draws that can be repeated."""

import math

import pytest
import torch

from transfer.fewshot import draw, few_shot, interval
from transfer.knn import knn_scores
from transfer.metrics import (
    average_precision_11,
    mean_per_class,
    top1,
    voc07_map,
)


def scores_of(predictions: list[int], classes: int) -> torch.Tensor:
    return torch.eye(classes)[torch.tensor(predictions)]


def test_mean_per_class_weighs_classes_equally() -> None:
    """Class 0: 3 of 4 right; class 1: 0 of 1; class 2: 1 of 1. Top-1 is 4/6, the mean 7/12."""
    labels = torch.tensor([0, 0, 0, 0, 1, 2])
    scores = scores_of([0, 0, 0, 1, 0, 2], 3)
    assert top1(scores, labels) == pytest.approx(100 * 4 / 6)
    assert mean_per_class(scores, labels) == pytest.approx(100 * (3 / 4 + 0 + 1) / 3)


def test_mean_per_class_is_not_defined_without_images_of_a_class() -> None:
    labels, scores = torch.tensor([0, 0, 2]), scores_of([0, 1, 2], 3)
    with pytest.raises(ValueError, match="class 1 has no image"):
        mean_per_class(scores, labels)
    assert mean_per_class(scores, labels, skip_absent=True) == pytest.approx(75)


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)),
        (torch.zeros(2, 3), torch.tensor([0, 3])),
        (torch.zeros(2, 3), torch.tensor([0])),
    ],
)
def test_labels_that_do_not_fit_are_refused(scores: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"labels|scores"):
        top1(scores, labels)


def test_average_precision_by_hand() -> None:
    """Ranked +, −, +, −, −, with 2 positives: precision 1 up to recall ½, then 2/3.

    Six levels (0 to 0.5) see 1, five (0.6 to 1) see 2/3: AP = (6 + 5·2/3) / 11.
    """
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    targets = torch.tensor([1, 0, 1, 0, 0])
    assert average_precision_11(scores, targets) == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_average_precision_leaves_difficult_images_out() -> None:
    """A −1 in between neither counts as wrong nor as found."""
    scores = torch.tensor([0.9, 0.85, 0.8, 0.7, 0.6, 0.5])
    targets = torch.tensor([1, -1, 0, 1, 0, -1])
    assert average_precision_11(scores, targets) == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_average_precision_of_equal_scores_does_not_depend_on_order() -> None:
    """All equal: one threshold, precision = share of positives at every level."""
    for targets in ([1, 0, 0, 0], [0, 0, 0, 1]):
        found = average_precision_11(torch.zeros(4), torch.tensor(targets))
        assert found == pytest.approx(0.25)


def test_average_precision_is_perfect_and_worst_where_it_should_be() -> None:
    assert average_precision_11(torch.tensor([3.0, 2, 1]), torch.tensor([1, 1, 0])) == 1
    last = average_precision_11(torch.tensor([3.0, 2, 1]), torch.tensor([0, 0, 1]))
    assert last == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="no positive"):
        average_precision_11(torch.zeros(2), torch.tensor([0, -1]))


def test_voc_map_is_the_mean_over_classes() -> None:
    scores = torch.tensor([[3.0, 1], [2, 2], [1, 3]])
    targets = torch.tensor([[1, 1], [1, 0], [0, 0]])
    assert voc07_map(scores, targets) == pytest.approx(100 * (1 + 1 / 3) / 2)


def test_neighbours_equal_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, queries = (
        torch.randn(60, 5, generator=generator),
        torch.randn(9, 5, generator=generator),
    )
    labels = torch.arange(60) % 4
    found = knn_scores(queries, reference, labels, 4, (3, 20), temperature=0.2)
    for q, query in enumerate(queries):
        cosines = [float(query @ r / (query.norm() * r.norm())) for r in reference]
        ranked = sorted(range(60), key=lambda i: -cosines[i])
        for k in (3, 20):
            votes = [0.0] * 4
            for i in ranked[:k]:
                votes[int(labels[i])] += math.exp((cosines[i] - cosines[ranked[0]]) / 0.2)
            assert found[k][q].tolist() == pytest.approx(votes, rel=1e-4)


def test_neighbours_survive_a_small_temperature_and_large_features() -> None:
    reference = torch.tensor([[1e4, 0.0], [0, 1e4]])
    found = knn_scores(reference, reference, torch.tensor([0, 1]), 2, (1, 2), temperature=1e-3)
    assert found[2].argmax(1).tolist() == [0, 1]
    with pytest.raises(ValueError, match="3 neighbours of 2"):
        knn_scores(reference, reference, torch.tensor([0, 1]), 2, (3,))


def test_draws_are_balanced_reproducible_nested_and_differ() -> None:
    labels = torch.tensor([0, 1, 2] * 20)
    first = draw(labels, 5, seed=1, number=0)
    assert torch.bincount(labels[first]).tolist() == [5, 5, 5]
    assert torch.equal(first, draw(labels, 5, seed=1, number=0))
    assert not torch.equal(first, draw(labels, 5, seed=1, number=1))
    assert not torch.equal(first, draw(labels, 5, seed=2, number=0))
    assert set(draw(labels, 2, 1, 0).tolist()) < set(first.tolist())
    with pytest.raises(ValueError, match="class 0 has 20 images"):
        draw(labels, 21, seed=1, number=0)


def test_the_interval_is_students() -> None:
    """Three values 1, 2, 3: deviation 1, t = 4.3027 with two degrees of freedom."""
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_few_shot_learns_what_can_be_learnt_and_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = 3 * torch.eye(3)[labels] + torch.randn(90, 3, generator=generator)
    train, test = (features[:60], labels[:60]), (features[60:], labels[60:])
    one = few_shot(train, test, 3, top1, shots=1, draws=5, seed=4)
    ten = few_shot(train, test, 3, top1, shots=10, draws=5, seed=4)
    assert 100 / 3 < one.mean < ten.mean
    assert ten.half_width < one.half_width
    assert one == few_shot(train, test, 3, top1, shots=1, draws=5, seed=4)
    assert one != few_shot(train, test, 3, top1, shots=1, draws=5, seed=5)
