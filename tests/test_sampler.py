"""The epoch order: one order for any number of ranks, and from any step on."""

import pytest

from core.errors import InputError
from data.sampler import EpochSampler, RankShare


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_together_see_the_batches_of_one_process_in_its_order(world):
    alone = EpochSampler(100, 12, seed=3)
    alone.set_epoch(5)
    ranks = [EpochSampler(100, 12, 3, rank, world) for rank in range(world)]
    for rank in ranks:
        rank.set_epoch(5)
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert [key for part in parts for key in part] == whole
        assert {len(part) for part in parts} == {12 // world}


def test_an_epoch_visits_no_image_twice_and_drops_only_the_remainder():
    sampler = EpochSampler(50, 8, seed=0)
    keys = [key for batch in sampler for key in batch]
    assert len(set(keys)) == len(keys) == 48
    assert {epoch for epoch, _ in keys} == {0}
    assert all(0 <= index < 50 for _, index in keys)


def test_what_is_dropped_changes_over_the_epochs():
    sampler = EpochSampler(50, 8, seed=0)
    seen = set()
    for epoch in range(5):
        sampler.set_epoch(epoch)
        seen |= {index for batch in sampler for _, index in batch}
    assert seen == set(range(50))


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        sampler = EpochSampler(64, 8, seed)
        sampler.set_epoch(epoch)
        return [index for batch in sampler for _, index in batch]

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


@pytest.mark.parametrize("start", [0, 1, 4, 6])
def test_starting_at_a_step_yields_the_rest_of_the_epoch(start):
    sampler = EpochSampler(50, 8, seed=0)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2, start)
    assert len(sampler) == 6 - start
    assert list(sampler) == whole[start:]
    sampler.set_epoch(3)
    assert len(sampler) == sampler.steps_per_epoch == 6


def test_batch_that_does_not_divide_or_exceeds_the_data_is_refused():
    with pytest.raises(InputError, match="multiple of 3"):
        EpochSampler(100, 8, 0, rank=0, world=3)
    with pytest.raises(InputError, match="at most 7"):
        EpochSampler(7, 8, 0)
    with pytest.raises(InputError, match="batch size 0"):
        EpochSampler(7, 0, 0)
    with pytest.raises(ValueError, match="rank 2"):
        EpochSampler(100, 8, 0, rank=2, world=2)
    with pytest.raises(ValueError, match="step 7"):
        EpochSampler(50, 8, 0).set_epoch(0, 7)


@pytest.mark.parametrize("n", [1, 7, 12])
def test_shares_of_ranks_cover_every_index_once(n):
    shares = [list(RankShare(n, rank, 4)) for rank in range(4)]
    assert sorted(index for share in shares for index in share) == list(range(n))
    assert [len(RankShare(n, rank, 4)) for rank in range(4)] == [len(share) for share in shares]
