"""Draws of negatives: exactly uniform for each image, and functions of (seed, step, place)."""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from core.errors import InputError
from pretrain.negatives import Drawer, Negatives, exact_float, stretches
from pretrain.recipe import CTCConfig

CLASSES = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3, 3] * 4)  # of N = 40 rows
N = len(CLASSES)


def drawer(k: int, *, labels: Tensor = CLASSES, seed: int = 5, **how: Any) -> Drawer:
    return Drawer(CTCConfig(num_negatives=k, **how), labels, seed)


def drawn(how: Drawer, index: list[int], step: int = 0, labels: Tensor = CLASSES) -> Negatives:
    return how.draw(step, labels[index], labels.to(torch.int32))


@pytest.mark.parametrize("offset", [0.0, 0.3, 0.99])
def test_every_subset_of_the_other_classes_is_equally_likely(offset: float) -> None:
    """Over all orders of 6 rows, from any offset, each 3-subset is cut equally often."""
    classes = torch.tensor([0, 0, 1, 2, 2, 3])
    counts: Counter[tuple[int, ...]] = Counter()
    for order in itertools.permutations(range(6)):
        of_pool = classes[list(order)]
        start, length, count = stretches(of_pool, torch.tensor([2]), torch.tensor([offset]), 3)
        covered = [order[(int(start) + step) % 6] for step in range(int(length))]
        taken = [row for row in covered if classes[row] != 2]
        assert len(taken) == int(count) == 3
        assert covered[0] == taken[0]
        assert covered[-1] == taken[-1]
        counts[tuple(sorted(taken))] += 1
    assert set(counts) == set(itertools.combinations([0, 1, 2, 5], 3))
    assert set(counts.values()) == {720 // 4}


MARGINALS: dict[str, tuple[int, int, dict[str, Any]]] = {  # N, K, and how they are drawn
    "whole order": (40, 8, {"pool": 40}),
    "small pool": (40, 8, {"pool": 9}),
    "shared": (40, 8, {"negatives": "shared"}),
    "of many": (600, 8, {}),  # where the pool is drawn without an order of all rows
    "replaced": (40, 33, {}),
}


@pytest.mark.parametrize("name", MARGINALS)
def test_each_row_of_another_class_is_drawn_equally_often(name: str) -> None:
    """With probability K / (N − N_c); two of them together as by independent subsets."""
    images, k, how = MARGINALS[name]
    labels = torch.arange(images) % 10
    labels[labels == 9] = 8  # a class twice as large
    one, steps, index = drawer(k, labels=labels, **how), 2000, [8, 3]
    seen = torch.zeros(2, images)
    both = 0
    for step in range(steps):
        listed = drawn(one, index, step, labels).listed()
        for image in (0, 1):
            seen[image] += torch.bincount(listed[image], minlength=images)
        both += bool(((listed[0] == 0).any() & (listed[0] == 1).any()).item())
    for own, found in zip(labels[index], seen, strict=True):
        others = int((labels != own).sum())
        share = k / others
        variance = share * (1 - 1 / others if name == "replaced" else 1 - share)
        z = (found - steps * share) / (variance * steps) ** 0.5
        assert not found[labels == own].any()
        assert float(z[labels != own].abs().max()) < 4.5
        assert float(z[labels != own].square().mean()) == pytest.approx(1, abs=0.7)
    if name != "replaced":
        others = int((labels != 8).sum())
        pair = k * (k - 1) / (others * (others - 1))
        assert abs(both - steps * pair) < 4.5 * (steps * pair) ** 0.5 + 1


def test_each_image_gets_k_distinct_rows_of_other_classes() -> None:
    index = list(range(0, N, 3))
    listed = drawn(drawer(17), index).listed()
    assert listed.shape == (len(index), 17)
    for image, rows in zip(index, listed.tolist(), strict=True):
        assert len(set(rows)) == 17
        assert CLASSES[image] not in CLASSES[rows]


def test_images_of_one_step_do_not_share_one_set_unless_told_to() -> None:
    alone = drawn(drawer(5), [5, 15, 25]).listed()  # all of class 2
    shared = drawn(drawer(5, negatives="shared"), [5, 15, 25]).listed()
    assert len({tuple(sorted(row)) for row in alone.tolist()}) == 3
    assert len({tuple(sorted(row)) for row in shared.tolist()}) == 1


@pytest.mark.parametrize("pool", [40, 20])
def test_two_images_share_k_squared_over_the_pool_on_average(pool: int) -> None:
    """Of one class: K² / the pool's other-class rows, 36 of 40 here."""
    shared, one = [], drawer(8, pool=pool)
    for step in range(1000):
        first, second = drawn(one, [5, 15], step).listed().tolist()
        shared.append(len(set(first) & set(second)))
    mean = torch.tensor(shared).double().mean()
    assert float(mean) == pytest.approx(8**2 / (one.pool * 36 / 40), abs=0.35)  # 4 standard errors


def test_draws_depend_on_seed_step_and_place_alone() -> None:
    one = drawer(6)
    whole = drawn(one, [3, 8, 11, 30], step=9).listed()
    torch.manual_seed(3)
    assert torch.equal(whole, drawn(one, [3, 8, 11, 30], step=9).listed())
    assert torch.equal(whole[:2], drawn(one, [3, 8], step=9).listed())
    assert not torch.equal(whole, drawn(one, [3, 8, 11, 30], step=10).listed())
    assert not torch.equal(whole, drawn(drawer(6, seed=6), [3, 8, 11, 30], step=9).listed())


def test_with_replacement_k_may_exceed_the_others() -> None:
    listed = drawn(drawer(100), [6, 0]).listed()
    assert listed.shape == (2, 100)
    for image, rows in zip([6, 0], listed.tolist(), strict=True):
        assert CLASSES[image] not in CLASSES[rows]
        assert max(Counter(rows).values()) < 20  # 24 rows or more: 4 each on average


def test_k_of_zero_takes_every_other_row() -> None:
    chosen = drawn(drawer(0), [0, 2])
    assert chosen.count.tolist() == [N - 8, N - 12]
    counted = chosen.counted(0, N, None, torch.float32) > 0
    for image, own in zip([0, 2], counted, strict=True):
        assert torch.equal(chosen.rows[own], (CLASSES[image] != CLASSES).nonzero()[:, 0])


@pytest.mark.parametrize("how", [{}, {"negatives": "shared"}, {"pool": 20}])
def test_the_smallest_pool_still_holds_k_others_for_every_class(how: dict[str, Any]) -> None:
    one = drawer(20, **how)
    assert one.pool == (40 if not how else 36)  # 36: 20 and the largest class
    for step in range(20):
        assert drawn(one, list(range(N)), step).count.tolist() == [20] * N


def test_the_default_pool_is_four_times_k() -> None:
    labels = torch.arange(1_281_167) % 1000
    assert drawer(65_536, labels=labels).pool == 262_144
    assert drawer(16_384, labels=torch.arange(50_000) % 100).pool == 50_000


@pytest.mark.parametrize("size", [1, 7, 16, 40, 100])
def test_chunks_hold_every_negative_exactly_once(size: int) -> None:
    chosen = drawn(drawer(13), list(range(0, N, 2)))
    found: list[list[int]] = [[] for _ in chosen.start]
    for rows, images, counted in chosen.chunks(size, torch.float32):
        assert images is not None  # on a CPU
        for image, own in zip(images.tolist(), counted, strict=True):
            found[image] += rows[own > 0].tolist()
    for taken, expected in zip(found, chosen.listed().tolist(), strict=True):
        assert sorted(taken) == sorted(expected)


def test_stretches_end_where_a_count_step_by_step_ends() -> None:
    """For every offset, class and K."""
    order = CLASSES[torch.randperm(N, generator=torch.Generator().manual_seed(4))]
    pairs = [(start / N, group) for start in range(N) for group in range(5)]
    offset, group = torch.tensor(pairs).T
    for k in (1, 9, 24, 30, N):
        found = stretches(order, group.long(), offset, k)
        for (first, own), start, length, count in zip(pairs, *(x.tolist() for x in found)):
            others = [position for position in range(N) if order[position] != own]
            expected = min(k, len(others))
            assert count == expected
            assert start == others[int(first * len(others))]
            around = [order[(start + step) % N] != own for step in range(length)]
            assert sum(around) == expected
            assert around[-1]


@pytest.mark.parametrize("pool", [5, (1 << 23) - 1, 1 << 23, (1 << 30) - 1])
def test_positions_are_compared_in_numbers_that_hold_them(pool: int) -> None:
    dtype = exact_float(pool)
    top = torch.tensor([2 * pool - 1, 2 * pool], dtype=dtype)
    assert top.tolist() == [2 * pool - 1, 2 * pool]


def test_one_class_and_pools_beyond_any_are_rejected() -> None:
    with pytest.raises(InputError, match="two classes"):
        drawer(5, labels=torch.zeros(7, dtype=torch.long))
    with pytest.raises(InputError, match=r"num_negatives 2000000000 .* bank rows a step"):
        drawer(2_000_000_000)
