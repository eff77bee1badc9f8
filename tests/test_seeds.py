"""Seeds: integer hashes that give the same order and the same draws everywhere."""

import numpy as np
import torch

from core.seeds import Dice, mixed, mixed_array, shuffled, torch_seeded


def test_array_and_scalar_hash_agree():
    last = np.array([0, 1, 2, 77, 2**40])
    expected = [mixed(3, 2**63 + 5, int(value)) for value in last]
    assert mixed_array((3, 2**63 + 5), last).tolist() == expected


def test_hash_depends_on_every_number_and_on_their_order():
    values = {mixed(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(values) == 12**3


def test_one_input_bit_moves_about_half_of_the_output_bits():
    moved = [
        (mixed(5, index) ^ mixed(5, index ^ (1 << bit))).bit_count()
        for index in range(100)
        for bit in range(20)
    ]
    assert 31 < np.mean(moved) < 33
    assert min(moved) > 8


def test_shuffled_is_a_permutation_without_a_favourite_place():
    orders = np.stack([shuffled(20, 9, epoch) for epoch in range(2000)])
    assert (np.sort(orders, axis=1) == np.arange(20)).all()
    counts = np.stack([np.bincount(orders[:, place], minlength=20) for place in range(20)])
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert 260 < chi_square < 460  # 19·19 = 361 degrees of freedom, ± 3.7 standard deviations


def test_torch_seeded_repeats_its_draws_and_leaves_the_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with torch_seeded(4, 5):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with torch_seeded(4, 5):
        again = torch.rand(3)
    with torch_seeded(5, 4):
        other = torch.rand(3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_torch_seeded_restores_the_generator_after_an_error():
    before = torch.get_rng_state()
    try:
        with torch_seeded(1):
            torch.rand(2)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_dice_repeat_for_a_seed_and_cover_their_range_evenly():
    dice, again = Dice(3, 4), Dice(3, 4)
    throws = [dice.below(6) for _ in range(6000)]
    assert throws == [again.below(6) for _ in range(6000)]
    counts = np.bincount(throws, minlength=6)
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5  # chi-square, 5 degrees, p = 0.001
    assert {dice.between(-2, 2) for _ in range(200)} == {-2, -1, 0, 1, 2}
    assert [Dice(3, 5).below(1000) for _ in range(3)] != [Dice(3, 4).below(1000) for _ in range(3)]


def test_noise_has_the_shape_and_all_byte_values():
    noise = Dice(1).noise(50, 41, 3)
    assert noise.shape == (50, 41, 3)
    assert noise.dtype == np.uint8
    assert len(np.unique(noise)) == 256
    assert abs(noise.mean() - 127.5) < 3
