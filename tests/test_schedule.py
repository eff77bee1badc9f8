"""The learning rates of the released code, epoch by epoch, and the limits of the others."""

from pathlib import Path

import numpy as np
import pytest

from training.schedule import Stage, learning_rate

GOLDEN = Path(__file__).parent / "data" / "lr_schedules.npz"


def _rates(*stages: Stage) -> np.ndarray:
    return np.array([learning_rate(stage, e) for stage in stages for e in range(stage.epochs)])


@pytest.mark.parametrize(("name", "first", "second"), [("cifar", 200, 100), ("short", 20, 10)])
@pytest.mark.parametrize("warmup", [0, 5])
def test_both_stages_equal_the_released_schedule(
    name: str, first: int, second: int, warmup: int
) -> None:
    golden = np.load(GOLDEN)[f"ctc_warm5_{name}" if warmup else f"ctc_{name}"]
    one = Stage("one", first, 0.05, 1e-3, warmup_epochs=warmup)
    two = Stage("two", second, 0.005, 5e-4, warmup_epochs=warmup)
    np.testing.assert_allclose(_rates(one, two), golden, rtol=1e-12)


@pytest.mark.parametrize(("name", "epochs"), [("cifar", 300), ("short", 30)])
def test_cross_entropy_equals_the_released_schedule(name: str, epochs: int) -> None:
    stage = Stage("ce", epochs, 0.05, 5e-4, warmup_epochs=5, end_factor=0.1)
    np.testing.assert_allclose(_rates(stage), np.load(GOLDEN)[f"ce_{name}"], rtol=1e-12)


def test_a_step_schedule_starts_at_zero_peaks_after_the_warm_up_and_ends_at_its_end() -> None:
    stage = Stage("s", 10, 0.1, 0.0, "cosine_step", warmup_epochs=2, end_factor=0.01)
    assert learning_rate(stage, 0) == 0.0
    assert learning_rate(stage, 1) == pytest.approx(0.05)
    assert learning_rate(stage, 2) == pytest.approx(0.1)
    assert learning_rate(stage, 6) == pytest.approx(0.001 + 0.099 / 2)
    assert learning_rate(stage, 9, 1 - 1e-9) == pytest.approx(0.001)


def test_milestones_multiply_from_their_epoch_on() -> None:
    stage = Stage("s", 100, 0.025, 0.0, "multistep", milestones=(70, 90))
    rates = _rates(stage)
    np.testing.assert_allclose(rates[[0, 69, 70, 89, 90]], [0.025] * 2 + [0.0025] * 2 + [0.00025])


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="cosine_epoch"):
        Stage("s", 1, 0.1, 0.0, "cosin")
