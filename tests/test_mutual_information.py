"""Estimates against the exact value for Gaussians, and what any mutual information must obey."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis import mutual_information as mi
from analysis.mutual_information import Settings, estimate, estimate_jobs
from benchmarks.mine import _plain

QUICK = Settings(
    hidden=48,
    iterations=250,
    batch=400,
    lr=4e-3,
    init_std=0.0,
    held_out=0.4,
    evaluations=10,
    marginal_draws=4,
    embedding=16,
)
PAIRS = 10_000
ERROR = 0.05  # nat


def gaussians(size: int, rho: float, pairs: int = PAIRS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pairs whose every coordinate has correlation ρ: I = −d/2·log(1 − ρ²)."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(pairs, size, generator=draw)
    noise = torch.randn(pairs, size, generator=draw)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def exact_critic(left: Tensor, right: Tensor, rho: float) -> Tensor:
    """log p(y|x)/p(y) of such pairs but for a constant, from …×size."""
    square = rho**2 * (left**2 + right**2) - 2 * rho * left * right
    return -(square / (2 * (1 - rho**2))).sum(-1)


def truth(size: int, rho: float) -> float:
    return -size / 2 * math.log(1 - rho**2)


@pytest.mark.parametrize("estimator", mi.ESTIMATORS)
@pytest.mark.parametrize(("size", "rho"), [(1, 0.8), (4, 0.5)])
def test_correlated_gaussians(estimator: str, size: int, rho: float) -> None:
    found = estimate(*gaussians(size, rho), estimator, QUICK)
    assert found.nats == pytest.approx(truth(size, rho), abs=max(ERROR, 0.05 * truth(size, rho)))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", mi.ESTIMATORS)
@pytest.mark.parametrize("size", [1, 2, 5, 10])
def test_gaussian_grid(estimator: str, size: int) -> None:
    """≤ 5% or 0.05 nat at every ρ, and monotone in ρ."""
    # 50,000 pairs are read: from 10,000 the exact critic of ρ = 0.4 in d = 10 has an error of 0.02.
    settings = dataclasses.replace(
        QUICK, hidden=128, iterations=2000, batch=1000, lr=2e-3, evaluation_pairs=50_000
    )
    if estimator == "infonce" and size == 10:  # the exact critic reads 3.94 of 4.13 at N = 1,000
        settings = dataclasses.replace(settings, iterations=1000, batch=2000)
    values = []
    for rho in (0.0, 0.2, 0.4, 0.6, 0.75):
        found = estimate(*gaussians(size, rho, 200_000), estimator, settings)
        exact = truth(size, rho)
        values.append(found.nats)
        assert found.nats == pytest.approx(exact, abs=max(ERROR, 0.05 * exact)), rho
    assert values == sorted(values)


@pytest.mark.parametrize("estimator", mi.ESTIMATORS)
def test_independent_sides_share_nothing(estimator: str) -> None:
    assert abs(estimate(*gaussians(3, 0.0), estimator, QUICK).nats) <= ERROR


def test_more_correlation_is_more_information_within_its_stated_error() -> None:
    values = [estimate(*gaussians(2, rho), "mine", QUICK) for rho in (0.2, 0.5, 0.8)]
    assert values[0].nats < values[1].nats < values[2].nats
    for found, rho in zip(values, (0.2, 0.5, 0.8), strict=True):
        assert abs(found.nats - truth(2, rho)) < 4 * found.standard_error + 0.01


def test_order_of_pairs_and_an_invertible_map_change_nothing_but_noise() -> None:
    x, y = gaussians(2, 0.7)
    plain = estimate(x, y, "mine", QUICK).nats
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert estimate(x[order], y[order], "mine", QUICK).nats == pytest.approx(plain, abs=ERROR)
    bent = (y + 0.5 * y**3) @ torch.tensor([[2.0, 1.0], [0.0, -3.0]]) + 7
    assert estimate(x, bent, "mine", QUICK).nats == pytest.approx(plain, abs=ERROR)


def test_processing_loses_information() -> None:
    x, y = gaussians(2, 0.8)
    whole = estimate(x, y, "mine", QUICK).nats
    half = estimate(x, y[:, :1], "mine", QUICK).nats
    signs = estimate(x, (y[:, 0] > 0).long(), "mine", QUICK).nats
    assert half == pytest.approx(truth(1, 0.8), abs=ERROR)
    assert whole > half > signs > 0.1


def test_labels_are_their_one_hot_rows() -> None:
    labels = torch.randint(4, (400,), generator=torch.Generator().manual_seed(0))
    x = F.one_hot(labels, 4).float() + 0.3 * gaussians(4, 0.0, 400)[0]
    settings = dataclasses.replace(QUICK, iterations=40, standardise=False, batch=100)
    for estimator in mi.ESTIMATORS:
        as_labels = estimate(labels, x, estimator, settings)
        as_rows = estimate(F.one_hot(labels, 4).float(), x, estimator, settings)
        assert as_labels.nats == pytest.approx(as_rows.nats, abs=1e-4)
    assert estimate(labels, x, "mine", QUICK).nats <= math.log(4) + ERROR


def test_the_split_first_layer_is_the_plain_mlp() -> None:
    x, y = gaussians(3, 0.5, 50)
    critic = mi.PairCritic(3, 3, Settings(hidden=16))
    plain = nn.Linear(6, 16)
    plain.weight.data = torch.cat([critic.weight_x, critic.weight_y], 1).detach()
    plain.bias.data = critic.bias.detach()

    def score(left: Tensor, right: Tensor) -> Tensor:
        hidden = plain(torch.cat([left, right], 1)).relu()
        for layer in critic.middle:
            hidden = layer(hidden).relu()
        return critic.last(hidden)[:, 0]

    joint, marginal = critic(x, y, (1, 7))
    torch.testing.assert_close(joint, score(x, y))
    partner = torch.arange(50)
    torch.testing.assert_close(marginal[0], score(x, y[(partner + 1) % 50]))
    torch.testing.assert_close(marginal[1], score(x, y[(partner + 7) % 50]))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_product_as_a_convolution_is_the_product(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    torch.set_num_threads(threads)  # PyTorch's choice of kernel depends on it
    monkeypatch.setattr(mi, "CONVOLVED", 1)
    rows, weight = gaussians(40, 0.0, 64)[0].requires_grad_(), torch.randn(24, 40)
    weight.requires_grad_()
    bias = torch.randn(24, requires_grad=True)
    outputs = [mi._linear(rows, weight, bias, True), F.linear(rows, weight, bias)]
    torch.testing.assert_close(*outputs)
    grads = [torch.autograd.grad(out.square().sum(), (rows, weight, bias)) for out in outputs]
    torch.testing.assert_close(*grads)


def test_mine_gradient_is_debiased_by_the_moving_average() -> None:
    """∂/∂θ [mean e^f / a − mean f] with a = (1 − r)·a₀ + r·mean e^f, a₀ = 1, not differentiated."""
    x, y = gaussians(2, 0.5, 40)
    settings = Settings(hidden=8, batch=40, ema_rate=0.25, protocol="released")
    trainer = mi._Trainer(x, y[None], "mine", settings, 0, torch.arange(40))
    joint, marginal = trainer._scores(torch.arange(40), (1,))
    joint.retain_grad()
    marginal.retain_grad()
    first, value = trainer._loss((joint, marginal))
    first.sum().backward()
    weight = marginal.detach().exp()
    average = 0.75 + 0.25 * weight.mean()
    assert marginal.grad is not None
    assert joint.grad is not None
    torch.testing.assert_close(marginal.grad, weight / 40 / average)
    torch.testing.assert_close(joint.grad, torch.full_like(joint, -1 / 40))
    torch.testing.assert_close(value, joint.mean(-1) - weight.mean().log())


@pytest.mark.parametrize("decay", [True, False])
def test_the_rate_falls_to_nothing_by_the_last_step_or_stays(decay: bool) -> None:
    x, y = gaussians(2, 0.5, 40)
    settings = Settings(hidden=8, batch=40, iterations=4, lr=0.1, decay=decay)
    trainer = mi._Trainer(x, y[None], "mine", settings, 0, torch.arange(40))
    rates = []
    for _ in range(5):
        rates.append(trainer.optimiser.param_groups[0]["lr"])
        trainer.step()
    half = 0.1 * math.cos(math.pi / 8) ** 2  # ½(1 + cos(π/4))
    falling = [0.1, half, 0.05, 0.1 - half, 0.0]
    assert rates == pytest.approx(falling if decay else [0.1] * 5)


def test_scores_that_overflow_exp_do_not() -> None:
    joint, marginal = torch.full((1, 4), 500.0), torch.full((1, 2, 4), 499.0)
    torch.testing.assert_close(mi.donsker_varadhan(joint, marginal), torch.tensor([1.0]))


def test_standard_error_matches_the_spread_over_fresh_samples() -> None:
    """The exact critic of ρ = 0.6 Gaussians, read on 200 samples of 300 pairs."""
    rho, pairs, shifts = 0.6, 300, (1, 50, 111, 200)
    values, errors = [], []
    for seed in range(200):
        x, y = gaussians(1, rho, pairs, seed)
        joint = exact_critic(x, y, rho)
        marginal = torch.stack([exact_critic(x, y.roll(-s, 0), rho) for s in shifts])
        values.append(float(mi.donsker_varadhan(joint, marginal)))
        errors.append(float(mi.standard_error(joint, marginal, shifts)))
    spread = torch.tensor(values).std().item()
    assert torch.tensor(errors).mean().item() == pytest.approx(spread, rel=0.2)


def test_infonce_never_passes_log_n_and_says_so() -> None:
    x, _ = gaussians(4, 0.0, 2000)
    found = estimate(x, x, "infonce", dataclasses.replace(QUICK, batch=64))
    assert found.cap == pytest.approx(math.log(64))
    assert 0.8 * found.cap < found.nats <= found.cap
    assert estimate(x, x, "mine", dataclasses.replace(QUICK, iterations=20)).cap is None


def test_infonce_over_n_pairs_stays_below_the_truth_even_with_the_exact_critic() -> None:
    x, y = gaussians(10, 0.75, 60_000)
    read = {}
    for n in (200, 1000):
        batches = zip(x.split(n), y.split(n), strict=True)
        gains = [mi._infonce_gains(exact_critic(a[:, None], b[None], 0.75)) for a, b in batches]
        read[n] = torch.cat(gains).mean().item()
    assert read[1000] == pytest.approx(truth(10, 0.75) - 0.19, abs=0.03)
    assert read[200] < read[1000] - 0.1


@pytest.mark.slow
def test_a_falling_rate_lifts_what_held_out_pairs_read() -> None:
    """In ten dimensions, where a constant rate's noise costs more than 0.05 of 0.87 nat."""
    settings = dataclasses.replace(QUICK, hidden=128, iterations=2000, batch=1000, lr=1e-3)
    values = []
    for decay in (False, True):
        how = dataclasses.replace(settings, decay=decay)
        values.append(estimate(*gaussians(10, 0.4, 60_000), "mine", how).nats)
    assert values[0] + 0.005 < values[1] < truth(10, 0.4)


def test_smile_clips_only_under_the_logarithm() -> None:
    """I = 4.6 nat, τ = 1: the clipped logarithm is at least −1, so the value exceeds mean f − 1."""
    settings = dataclasses.replace(QUICK, iterations=60, clip=1.0)
    x, y = gaussians(2, 0.99, 2000)
    trainer = mi._Trainer(x, y[None], "smile", settings, 0, torch.arange(2000))
    for _ in range(60):
        trainer.step()
    with torch.no_grad():
        joint, marginal = trainer._scores(torch.arange(2000), (1,))
    value, _ = trainer._loss((joint, marginal))[1], None
    expected = joint.mean(-1) - marginal.clamp(-1, 1).exp().mean((-2, -1)).log()
    torch.testing.assert_close(value, expected)
    assert float((marginal < -1).float().mean()) > 0.1  # the case does clip


def test_jobs_side_by_side_equal_jobs_alone() -> None:
    x, first = gaussians(3, 0.6, 600)
    second = gaussians(3, 0.3, 600, seed=5)[1]
    settings = dataclasses.replace(QUICK, iterations=30, evaluations=5, batch=100)
    for estimator in mi.ESTIMATORS:
        together = estimate_jobs(x, [first, second], estimator, settings, seeds=(0, 3))
        for y, found in zip((first, second), together, strict=True):
            alone = estimate(x, y, estimator, settings, seeds=(0, 3))
            assert found.values == pytest.approx(alone.values, abs=2e-4)
            assert found.standard_error == pytest.approx(alone.standard_error, rel=0.02, abs=1e-4)


def test_the_benchmarks_plain_way_is_the_same_estimator() -> None:
    x, y = gaussians(2, 0.8, 3000)
    settings = dataclasses.replace(
        QUICK, protocol="released", standardise=False, init_std=0.1, iterations=400
    )
    ours = estimate(x, y, "mine", settings).nats
    assert _plain(x, y, settings, 0) == pytest.approx(ours, abs=ERROR)


@pytest.mark.gpu
def test_on_a_gpu_jobs_agree_with_the_cpu_within_noise() -> None:
    x, first = gaussians(3, 0.6)
    second = gaussians(3, 0.3, seed=5)[1]
    for estimator in mi.ESTIMATORS:
        found = estimate_jobs(x.to("cuda"), [first.to("cuda"), second.to("cuda")], estimator, QUICK)
        for job, y in zip(found, (first, second), strict=True):
            alone = estimate(x, y, estimator, QUICK)
            assert job.nats == pytest.approx(alone.nats, abs=ERROR)


def test_seeds_reproduce_and_differ_and_global_random_state_is_left_alone() -> None:
    x, y = gaussians(2, 0.5, 500)
    settings = dataclasses.replace(QUICK, iterations=40, batch=100)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = estimate(x, y, "mine", settings, seeds=(0, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert estimate(x, y, "mine", settings, seeds=(0, 1, 2)).values == first.values
    assert len(set(first.values)) == 3
    assert first.nats == pytest.approx(sum(first.values) / 3)
    assert first.std == pytest.approx(torch.tensor(first.values).std().item(), rel=1e-3)


def test_over_fitting_lifts_the_released_value_and_not_the_held_out_one() -> None:
    """120 independent pairs of 50 dimensions, learnt by heart."""
    x, y = gaussians(50, 0.0, 120)
    settings = dataclasses.replace(QUICK, iterations=400, batch=100)
    held_out = estimate(x, y, "mine", settings)
    released = estimate(x, y, "mine", dataclasses.replace(settings, protocol="released"))
    assert released.nats > 1.0
    assert held_out.nats < 0.1


def test_parts_are_disjoint_and_whole_and_released_has_none() -> None:
    train, choose, read = mi._split(100, Settings(held_out=0.3, validation=0.1), seed=4)
    assert (len(train), len(choose), len(read)) == (60, 10, 30)
    assert sorted(torch.cat([train, choose, read]).tolist()) == list(range(100))
    everything = mi._split(100, Settings(protocol="released"), seed=4)
    assert all(len(part) == 100 for part in everything)


def test_bfloat16_does_not_move_the_estimate() -> None:
    x, y = gaussians(4, 0.6)
    full = estimate(x, y, "mine", QUICK).nats
    low = estimate(x, y, "mine", dataclasses.replace(QUICK, precision="bfloat16")).nats
    assert low == pytest.approx(full, abs=ERROR)


def test_a_diverged_critic_is_an_error_that_names_the_step() -> None:
    x, y = gaussians(2, 0.5, 200)
    wild = dataclasses.replace(QUICK, lr=1e30, iterations=10, evaluations=10)
    with pytest.raises(ValueError, match=r"diverged.*step"):
        estimate(x, y, "mine", wild)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.ones(30, 2), torch.ones(29, 2), "30 rows and y 29"),
        (torch.ones(5, 2), torch.ones(5, 2), "20 or more"),
        (
            torch.full((30, 2), float("nan")),
            torch.ones(30, 2),
            "x holds values that are not finite",
        ),
        (torch.ones(30, 2), torch.ones(30), "y must be n×size"),
        (torch.ones(30, 2), -torch.ones(30, dtype=torch.long), "labels from 0 on"),
    ],
)
def test_bad_pairs_are_refused(x: Tensor, y: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        estimate(x, y, "mine", QUICK)


def test_bad_settings_are_refused() -> None:
    for wrong in (
        {"protocol": "mine"}, {"precision": "half"}, {"batch": 1}, {"lr": 0.0}, {"held_out": 0.95},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            Settings(**wrong)  # type: ignore[arg-type]
    x, y = gaussians(1, 0.5, 50)
    with pytest.raises(ValueError, match="not one of mine"):
        estimate(x, y, "kraskov", QUICK)
    with pytest.raises(ValueError, match="one seed"):
        estimate(x, y, "mine", QUICK, seeds=())
