"""Draws of negatives: exactly uniform for each image, and functions of (seed, step, image)."""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from core.seeds import mixed
from pretrain import negatives
from pretrain.negatives import Drawer, Windows, hashed, make_drawer, walk

CLASSES = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3, 3] * 4, dtype=torch.int32)  # of N = 40 rows
N = len(CLASSES)


def drawer(seed: int, negatives: int, **how: Any) -> Drawer:
    return make_drawer(seed, negatives, CLASSES, **how)


def drawn(how: Drawer, index: list[int], step: int = 0) -> Windows:
    images = torch.tensor(index)
    (windows,) = how.draw(step, images, CLASSES[images], CLASSES)
    return windows


def counted(windows: Windows) -> torch.Tensor:
    return windows.counted(0, len(windows.rows), torch.float32) > 0


@pytest.mark.parametrize("start", [0, 2, 5])
def test_every_subset_of_the_other_classes_is_equally_likely(start: int) -> None:
    """Over all orders of 6 rows, a walk from any position takes each 3-subset equally often."""
    classes = torch.tensor([0, 0, 1, 2, 2, 3], dtype=torch.int32)
    counts: Counter[tuple[int, ...]] = Counter()
    for order in itertools.permutations(range(6)):
        rows = torch.tensor(order)
        groups, begin = torch.tensor([[2], [start]], dtype=torch.int32)
        length, count = walk(classes[rows], groups, begin, 3)
        windows = Windows(rows, classes[rows], groups, begin, length, count)
        counts[tuple(sorted(windows.listed()[0].tolist()))] += 1
    assert set(counts) == set(itertools.combinations([0, 1, 2, 5], 3))
    assert set(counts.values()) == {720 // 4}


def test_each_image_gets_k_distinct_rows_of_other_classes() -> None:
    index = list(range(0, N, 3))
    listed = drawn(drawer(5, 17), index).listed()
    assert listed.shape == (len(index), 17)
    for image, rows in zip(index, listed.tolist(), strict=True):
        assert len(set(rows)) == 17
        assert CLASSES[image] not in CLASSES[rows]


def test_images_of_one_step_do_not_share_one_set_unless_told_to() -> None:
    alone = drawn(drawer(5, 5), [5, 15, 25]).listed()  # all of class 2
    shared = drawn(drawer(5, 5, shared=True), [5, 15, 25]).listed()
    assert len({tuple(sorted(row)) for row in alone.tolist()}) == 3
    assert len({tuple(sorted(row)) for row in shared.tolist()}) == 1


def test_windows_overlap_as_much_on_average_as_independent_subsets() -> None:
    """Two images of a step share K²/N rows on average (here of one class: K²/others)."""
    shared = []
    for step in range(400):
        first, second = drawn(drawer(1, 12), [5, 15], step).listed().tolist()
        shared.append(len(set(first) & set(second)))
    mean = torch.tensor(shared).double().mean()
    assert float(mean) == pytest.approx(12**2 / 36, abs=0.5)  # 4 standard errors


def test_draws_depend_on_seed_step_and_image_but_not_on_the_batch() -> None:
    one = drawer(5, 6)
    whole = drawn(one, [3, 8, 11, 30], step=9).listed()
    part = drawn(one, [30, 8], step=9).listed()
    assert torch.equal(part, whole[[3, 1]])
    assert torch.equal(whole, drawn(one, [3, 8, 11, 30], step=9).listed())
    assert not torch.equal(whole, drawn(one, [3, 8, 11, 30], step=10).listed())
    assert not torch.equal(whole, drawn(drawer(6, 6), [3, 8, 11, 30], step=9).listed())


def test_with_replacement_k_may_exceed_the_others() -> None:
    listed = drawn(drawer(5, 100), [6, 0]).listed()
    assert listed.shape == (2, 100)
    for image, rows in zip([6, 0], listed.tolist(), strict=True):
        assert CLASSES[image] not in CLASSES[rows]
        frequencies = Counter(rows)
        assert max(frequencies.values()) < 20  # 24 rows or more: 4 each on average


def test_k_of_zero_takes_every_other_row() -> None:
    windows = drawn(drawer(5, 0), [0, 2])
    assert windows.count.tolist() == [N - 8, N - 12]
    for image, own in zip([0, 2], counted(windows), strict=True):
        assert torch.equal(windows.rows[own], (CLASSES[image] != CLASSES).nonzero()[:, 0])


def test_without_replacement_fewer_others_than_k_are_all_taken() -> None:
    windows = drawn(drawer(5, 30, replacement="never"), [6])  # 24 others
    assert windows.count.tolist() == [24]
    assert int(counted(windows).sum()) == 24


@pytest.mark.parametrize("shared", [False, True])
def test_the_smallest_pool_still_holds_k_others_for_every_class(shared: bool) -> None:
    one = drawer(5, 20, shared=shared, pool=20)
    assert one.strata[0].pool == 36  # 20 and the largest class
    for step in range(20):
        windows = drawn(one, list(range(N)), step)
        assert windows.count.tolist() == [20] * N


def test_strata_split_rows_and_negatives() -> None:
    images = torch.tensor([5, 15, 6])
    drawn_parts = drawer(5, 14, strata=4).draw(2, images, CLASSES[images], CLASSES)
    assert [part.count.tolist() for part in drawn_parts] == [[3] * 3, [4] * 3, [3] * 3, [4] * 3]
    for number, part in enumerate(drawn_parts):
        assert (part.listed() % 4 == number).all()


@pytest.mark.parametrize("world", [2, 4])
def test_shards_draw_together_what_the_whole_bank_draws(world: int) -> None:
    images = torch.tensor([5, 15, 6, 39])
    whole = drawer(5, 13, strata=4).draw(2, images, CLASSES[images], CLASSES)
    expected = {number: part.listed() for number, part in enumerate(whole)}
    for rank in range(world):
        held = CLASSES[rank::world]
        one = make_drawer(5, 13, held, strata=4, rank=rank, world=world)
        parts = one.draw(2, images, CLASSES[images], held)
        for stratum, part in zip(one.strata, parts, strict=True):
            assert torch.equal(part.listed() * world + rank, expected.pop(stratum.number))
    assert not expected


@pytest.mark.parametrize("size", [1, 7, 16, 40, 100])
def test_chunks_hold_every_negative_exactly_once(size: int) -> None:
    windows = drawn(drawer(3, 13), list(range(0, N, 2)))
    found: list[list[int]] = [[] for _ in windows.start]
    for rows, images, counts in windows.chunks(size, torch.float32):
        assert images is not None  # on a CPU
        for image, own in zip(images.tolist(), counts, strict=True):
            found[image] += rows[own > 0].tolist()
    for rows, expected in zip(found, windows.listed().tolist(), strict=True):
        assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_walks_end_where_a_count_step_by_step_ends(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every start, class and K, whatever the blocks that are counted together."""
    monkeypatch.setattr(negatives, "BLOCK", size)
    monkeypatch.setattr(negatives, "BLOCKS_AT_A_TIME", 2)
    order = CLASSES[torch.randperm(N, generator=torch.Generator().manual_seed(4))]
    pairs = [(start, group) for start in range(N) for group in range(5)]
    start, group = torch.tensor(pairs, dtype=torch.int32).T
    for k in (1, 9, 24, 30):
        length, count = walk(order, group.contiguous(), start.contiguous(), k)
        for (first, own), steps, found in zip(pairs, length.tolist(), count.tolist(), strict=True):
            around = [order[(first + step) % N] != own for step in range(N)]
            others = sum(map(int, around))
            expected = next((s + 1 for s in range(N) if sum(around[: s + 1]) == k), N)
            assert (steps, found) == (expected, min(k, others))


def test_tensor_hash_equals_the_integer_hash() -> None:
    values = torch.tensor([0, 1, 5, 2**31, 2**62 + 12345])
    expected = [mixed(11, 7, value) >> 1 for value in values.tolist()]
    assert hashed(values, 11, 7).tolist() == expected
