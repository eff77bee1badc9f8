"""Memory banks: whose rows move, where to, and what a state dict carries."""

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.memory import MemoryBank, last_occurrence, refresh

N, D = 12, 6


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def test_rows_start_uniform_within_the_bound_and_differ_by_seed() -> None:
    rows = MemoryBank(4000, 128, 0.9, seed=1).rows
    bound = 1 / math.sqrt(128 / 3)
    assert float(rows.abs().max()) <= bound
    assert float(rows.mean()) == pytest.approx(0, abs=0.001)
    assert float(rows.var()) == pytest.approx(bound**2 / 3, rel=0.01)  # so E‖row‖² = 1
    assert float(rows.std(dim=0).min()) > 0.9 * bound / math.sqrt(3)
    assert torch.equal(rows, MemoryBank(4000, 128, 0.9, seed=1).rows)
    assert not torch.equal(rows, MemoryBank(4000, 128, 0.9, seed=2).rows)


def test_update_moves_the_named_rows_only() -> None:
    torch.manual_seed(0)
    bank = MemoryBank(N, D, 0.75)
    before, embedding, index = bank.rows.clone(), unit(3, D), torch.tensor([7, 0, 4])
    bank.update(index, embedding)
    expected = before.clone()
    for i, row in zip(index.tolist(), embedding, strict=True):
        moved = 0.75 * before[i] + 0.25 * row
        expected[i] = moved / moved.norm()
    torch.testing.assert_close(bank.rows, expected)
    torch.testing.assert_close(bank.sample(index), expected[index])


def test_the_last_of_an_image_standing_twice_counts() -> None:
    bank, embedding = MemoryBank(N, D, 0.0), unit(4, D)
    bank.update(torch.tensor([5, 2, 5, 5]), embedding)
    torch.testing.assert_close(bank.rows[5], embedding[3])
    assert last_occurrence(torch.tensor([5, 2, 5, 5, 2])).tolist() == [3, 4, 3, 3, 4]


def test_a_bank_gives_and_gets_no_gradient() -> None:
    bank = MemoryBank(N, D, 0.5)
    embedding = unit(2, D).requires_grad_()
    bank.update(torch.tensor([1, 2]), embedding)
    assert not bank.sample(torch.tensor([1])).requires_grad
    assert list(bank.parameters()) == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
def test_state_dict_restores_rows_bit_for_bit(dtype: str) -> None:
    bank, other = MemoryBank(N, D, 0.5, dtype=dtype, seed=1), MemoryBank(N, D, 0.5, dtype=dtype)
    bank.update(torch.tensor([3]), unit(1, D))
    state = bank.state_dict()
    assert list(state) == ["rows"]
    assert other.load_state_dict(state).missing_keys == []
    assert torch.equal(other.rows, bank.rows)
    assert other.rows.dtype == bank.rows.dtype


def test_a_state_dict_of_another_size_or_without_rows_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"rows is \(5, 6\), not \(12, 6\)"):
        MemoryBank(N, D, 0.5).load_state_dict(MemoryBank(5, D, 0.5).state_dict())
    with pytest.raises(RuntimeError, match="rows"):
        MemoryBank(N, D, 0.5).load_state_dict({})


def test_half_precision_rows_are_read_and_moved_in_float32() -> None:
    bank = MemoryBank(N, D, 0.0, dtype="bf16")
    embedding = unit(1, D)
    bank.update(torch.tensor([3]), embedding)
    assert bank.sample(torch.tensor([3])).dtype == torch.float32
    assert torch.equal(bank.rows[3], embedding[0].bfloat16())


def test_refresh_fills_every_bank_and_leaves_absent_images() -> None:
    banks = [MemoryBank(N, D, 0.9, seed=1), MemoryBank(N, 4, 0.9, seed=2)]
    before = banks[0].rows.clone()
    first, second = unit(N, D), unit(N, 4)
    parts = [torch.tensor([0, 3, 6]), torch.tensor([9]), torch.arange(1, 5)]
    refresh(banks, ((i, (first[i], second[i])) for i in parts))
    done = torch.cat(parts).unique()
    torch.testing.assert_close(banks[0].rows[done], first[done])
    torch.testing.assert_close(banks[1].rows[done], second[done])
    rest = [i for i in range(N) if i not in done]
    assert torch.equal(banks[0].rows[rest], before[rest])


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="bf16"):
        MemoryBank(N, D, 0.5, dtype="int8")
