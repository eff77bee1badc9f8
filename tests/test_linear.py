"""The linear probe: scikit-learn's optimum, chosen on held-out images, blind to the test split."""

import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from core.errors import InputError
from transfer import linear
from transfer.linear import LinearConfig, linear_probe
from transfer.logistic import EigenBasis, LogisticFit, fit_logistic, fit_sweep
from transfer.metrics import top1


def problem(n: int, d: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ill-conditioned, shifted features with noisy linear labels, every class present."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0.5, -1.5, d)
    features = torch.randn(n, d, generator=generator) * spread
    direction = torch.randn(k, d, generator=generator)
    labels = (features @ direction.T + torch.randn(n, k, generator=generator)).argmax(1)
    labels[:k] = torch.arange(k)
    return features + torch.randn(d, generator=generator), labels


def objective(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, c: float) -> float:
    logits = features.double() @ weight.double().T + bias.double()
    penalty = weight.double().pow(2).sum() / (2 * c * len(labels))
    return (F.cross_entropy(logits, labels) + penalty).item()


@pytest.mark.parametrize(("n", "d", "k"), [(300, 12, 4), (60, 150, 3)])
@pytest.mark.parametrize("c", [1e-3, 0.1, 10.0])
def test_the_fit_equals_scikit_learn(n: int, d: int, k: int, c: float) -> None:
    """Loss and accuracy to 1e-4 (loss in nats, accuracy as a share), more images or dimensions."""
    features, labels = problem(n + 200, d, k)
    train, test = (features[:n], labels[:n]), (features[n:], labels[n:])
    ours = fit_logistic(*train, k, c)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = LogisticRegression(C=c, tol=1e-8, max_iter=10_000)
        theirs.fit(train[0].double().numpy(), train[1].numpy())
    weight, bias = torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_)
    expected = objective(*train, weight, bias, c)
    assert objective(*train, ours.weight, ours.bias, c) == pytest.approx(expected, abs=1e-4)
    assert ours.objective == pytest.approx(expected, abs=1e-4)
    assert ours.converged
    accuracy = 100 * theirs.score(test[0].double().numpy(), test[1].numpy())
    assert top1(ours.logits(test[0]), test[1]) == pytest.approx(accuracy, abs=0.01)


def test_the_fit_is_stationary() -> None:
    """In float64, the gradient by autograd of the objective as it is written vanishes."""
    features, labels = problem(200, 9, 4)
    fit = fit_logistic(features.double(), labels, 4, c=2.0, tolerance=1e-16)
    weight = fit.weight.clone().requires_grad_()
    bias = fit.bias.clone().requires_grad_()
    loss = F.cross_entropy(features.double() @ weight.T + bias, labels)
    (loss + weight.pow(2).sum() / (2 * 2.0 * 200)).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.grad.abs().max() < 1e-7
    assert bias.grad.abs().max() < 1e-7


def test_several_labels_an_image_are_one_regression_a_class() -> None:
    """Against scikit-learn's binary regression on the images that are not left out."""
    features, labels = problem(150, 6, 3)
    targets = F.one_hot(labels, 3)
    targets[::7, 1] = -1
    ours = fit_logistic(features, targets, 3, c=0.5, tolerance=1e-9)
    for k in range(3):
        judged = targets[:, k] >= 0
        theirs = LogisticRegression(C=0.5, tol=1e-9, max_iter=5000)
        theirs.fit(features[judged].double().numpy(), targets[judged, k].numpy())
        assert torch.allclose(
            ours.weight[k].double(), torch.from_numpy(theirs.coef_[0]), rtol=1e-2, atol=2e-3
        )


def test_a_sweep_in_another_sets_basis_is_the_same() -> None:
    """The basis is a rotation: one of a larger set, warm starts included, changes no optimum."""
    features, labels = problem(240, 10, 3)
    basis = EigenBasis.of(features)
    grid = [0.01, 0.1, 1.0]
    for fit in fit_sweep(basis, features[:160], labels[:160], 3, grid, tolerance=1e-8):
        alone = fit_logistic(features[:160], labels[:160], 3, fit.c, tolerance=1e-8)
        assert fit.objective == pytest.approx(alone.objective, abs=1e-6)
        assert torch.allclose(fit.weight, alone.weight, atol=5e-3)


def test_the_basis_loses_nothing() -> None:
    """Distances between images survive, with fewer images than dimensions too."""
    for n, d in ((50, 8), (8, 50)):
        features = problem(n, d, 2)[0].double()
        basis = EigenBasis.of(features)
        assert basis.vectors.shape == (d, min(n, d))
        rotated = basis.rotate(features)
        assert torch.allclose(
            torch.cdist(rotated, rotated), torch.cdist(features, features), atol=1e-6
        )


@pytest.mark.parametrize(
    ("features", "targets", "c", "reason"),
    [
        (torch.full((4, 2), float("nan")), torch.tensor([0, 1, 0, 1]), 1.0, "NaN"),
        (torch.ones(4, 2), torch.tensor([0, 1, 2, 1]), 1.0, "class numbers"),
        (torch.ones(4, 2), torch.tensor([0, 1, 1]), 1.0, "N targets"),
        (torch.ones(4, 2), torch.tensor([0, 1, 0, 1]), 0.0, "positive"),
        (torch.ones(4, 2), torch.zeros(4, 3), 1.0, "K = 2"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    features: Tensor, targets: Tensor, c: float, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        fit_logistic(features, targets, 2, c)


QUICK = LinearConfig(c_values=9, log10_c_min=-4, log10_c_max=4)


def parts() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    features, labels = problem(360, 10, 3)
    return (features[:240], labels[:240]), (features[240:], labels[240:])


def test_the_test_split_has_no_say() -> None:
    """Other test images and labels leave the choice and the fit as they were, bit for bit."""
    train, test = parts()
    first = linear_probe(train, test, 3, QUICK)
    spoilt = (test[0] * 0 + 5, test[1].flip(0))
    second = linear_probe(train, spoilt, 3, QUICK)
    assert (first.c, first.swept) == (second.c, second.swept)
    assert torch.equal(first.fit.weight, second.fit.weight)
    assert first.score != second.score


def test_the_held_out_images_are_not_learnt_from_until_all_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sweep fits on 80%, disjoint from what scores it; the refit has every image."""
    train, test = parts()
    fitted: list[Tensor] = []
    scored: list[Tensor] = []

    def recording(basis: EigenBasis, features: Tensor, *rest: object) -> object:
        fitted.append(features)
        return fit_sweep(basis, features, *rest)  # type: ignore[arg-type]

    def logits(self: LogisticFit, features: Tensor) -> Tensor:
        scored.append(features)
        return features @ self.weight.T + self.bias

    monkeypatch.setattr(linear, "fit_sweep", recording)
    monkeypatch.setattr(LogisticFit, "logits", logits)
    linear_probe(train, test, 3, QUICK)
    rows = [{tuple(row) for row in part.tolist()} for part in (*fitted, scored[0], scored[-1])]
    swept, refitted, held, tested = rows
    assert len(swept) == 192
    assert not swept & held
    assert swept | held == refitted == {tuple(row) for row in train[0].tolist()}
    assert tested == {tuple(row) for row in test[0].tolist()}
    assert all(torch.equal(part, scored[0]) for part in scored[:-1])


def test_an_official_val_split_chooses_and_then_is_learnt_from() -> None:
    train, test = parts()
    half = len(train[0]) // 2
    fit, val = (train[0][:half], train[1][:half]), (train[0][half:], train[1][half:])
    found = linear_probe(fit, test, 3, QUICK, val=val)
    together = fit_logistic(*train, 3, found.c)
    assert found.fit.objective == pytest.approx(together.objective, abs=1e-5)


def test_the_probe_does_not_depend_on_the_scale_of_features() -> None:
    train, test = parts()
    first = linear_probe(train, test, 3, QUICK)
    second = linear_probe((train[0] * 1024, train[1]), (test[0] * 1024, test[1]), 3, QUICK)
    assert first.score == pytest.approx(second.score, abs=1.0)
    assert second.c == pytest.approx(first.c / 1024**2, rel=1e-3)


def test_ties_go_to_the_stronger_penalty_and_edges_are_told() -> None:
    """Separable classes: every C from some on is perfect; the first such is taken."""
    labels = torch.arange(60) % 2
    features = F.one_hot(labels, 2).float() + 0.01 * torch.randn(60, 2)
    found = linear_probe((features, labels), (features, labels), 2, QUICK)
    perfect = [c for c, score in found.swept if score == 100]
    assert found.score == 100
    assert found.c == perfect[0]
    weakest = dataclasses.replace(QUICK, log10_c_min=3, log10_c_max=4, c_values=2)
    assert linear_probe((features, labels), (features, labels), 2, weakest).at_grid_edge


def test_several_labels_an_image_are_probed_by_voc_map() -> None:
    """Two independent attributes, each told by a feature: a perfect ranking is found."""
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(200, 2, generator=generator) < 0.3).long()
    features = targets * 4.0 + torch.randn(200, 2, generator=generator) * 0.3
    targets[::11, 0] = -1
    train, test = (features[:150], targets[:150]), (features[150:], targets[150:])
    found = linear_probe(train, test, 2, QUICK, metric="voc07_map")
    assert found.score == pytest.approx(100)
    assert found.metric == "voc07_map"


@pytest.mark.parametrize(
    ("key", "value"), [("held_out", 1.0), ("c_values", 0), ("normalise", "l3"), ("patience", 0)]
)
def test_values_out_of_range_are_named(key: str, value: object) -> None:
    train, test = parts()
    with pytest.raises(InputError, match=f"linear.{key}"):
        linear_probe(train, test, 3, dataclasses.replace(QUICK, **{key: value}))  # type: ignore[arg-type]


def test_features_that_are_all_alike_are_refused() -> None:
    _, labels = problem(30, 4, 2)
    alike = torch.ones(30, 4)
    with pytest.raises(InputError, match="the same for every image"):
        linear_probe((alike, labels), (alike, labels), 2, QUICK)


@pytest.mark.parametrize("seed", range(4))
def test_a_plateau_of_far_too_strong_penalties_does_not_end_the_sweep(seed: int) -> None:
    """Faint class codes beside loud noise: scores waver at chance over half of the grid."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (1500,), generator=draw)
    code = F.one_hot(labels, 4) + 0.3 * torch.randn(1500, 4, generator=draw)
    features = torch.cat([0.05 * code, 3 * torch.randn(1500, 4, generator=draw)], 1)
    train, test = (features[:1000], labels[:1000]), (features[1000:], labels[1000:])
    probe = linear_probe(train, test, 4)
    whole = linear_probe(train, test, 4, LinearConfig(patience=49))
    plateau = [score for _, score in probe.swept[:16]]
    assert max(plateau) < 40  # this is the case that it is meant to be
    assert (probe.c, probe.score) == (whole.c, whole.score)
    assert probe.score > 90


def test_the_sweep_ends_when_fits_only_grow_worse() -> None:
    """Many dimensions, few images, noisy labels: a weak penalty over-fits."""
    features, labels = problem(150, 100, 3)
    train, test = (features[:120], labels[:120]), (features[120:], labels[120:])
    probe = linear_probe(train, test, 3)
    whole = linear_probe(train, test, 3, LinearConfig(patience=49))
    assert len(probe.swept) < len(whole.swept) == 49
    assert probe.c == whole.c
