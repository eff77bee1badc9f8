"""The linear probe: logistic regression on frozen features, its penalty chosen without the test.

Shapes: N images, D feature dimensions, K classes.

The penalty is swept on a part of the training split; the chosen one is refitted on all of it and
tested once. The grid is laid relative to the features' variance, so that the result does not
depend on their scale.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import InputError
from transfer.data import parts_to_choose_by
from transfer.logistic import EigenBasis, LogisticFit, fit_sweep, mean_loss
from transfer.metrics import HELD_OUT_METRICS, METRICS

NORMALISATIONS = ("none", "l2")


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """How the penalty is chosen; the figures are own choice, since CTC's are not published."""

    held_out: float = 0.2  # share of the training split, where there is no official val split
    log10_c_min: float = -6.0  # the grid: C × mean feature variance
    log10_c_max: float = 6.0
    c_values: int = 49  # grid points, evenly spaced in the logarithm
    patience: int = 8  # stop after so many fitted values that better neither score nor loss
    normalise: str = "none"  # "l2": every feature to unit length first
    sweep_tolerance: float = 1e-5  # relative decrease of the loss at which a fit of the sweep ends
    tolerance: float = 1e-6  # of the final fit
    sweep_iterations: int = 200  # at most, per value of the sweep
    iterations: int = 2000  # at most, of the final fit


@dataclasses.dataclass(frozen=True)
class Probe:
    """A chosen, refitted and tested probe."""

    score: float  # on the test split, %
    metric: str
    c: float  # chosen, as scikit-learn's C on these features
    held_out_score: float  # at the chosen C, %
    swept: list[tuple[float, float]]  # (C, held-out score) in the order tried
    at_grid_edge: bool  # the best C was the first or last of the grid: widen it
    fit: LogisticFit


def linear_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: int,
    config: LinearConfig | None = None,
    metric: str = "top1",
    val: tuple[Tensor, Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> Probe:
    """Choose the penalty, refit, test once.

    Args:
        train, test, val: features N×D and labels (N, or N×K where an image has several).
            val: the official validation split; None: a part of train is held out.
        metric: a key of ``transfer.metrics.METRICS``.
        device: where the fits run.

    Raises:
        ValueError: features that are not finite, or shapes that do not fit.
        InputError: a config value out of range, or no image that can be held out.
    """
    config = config or LinearConfig()
    check(config)
    device = torch.device(device)
    train, test = _prepare(train, config, device), _prepare(test, config, device)
    if val is not None:
        fit_part, held_part = train, _prepare(val, config, device)
        train = (torch.cat([train[0], held_part[0]]), torch.cat([train[1], held_part[1]]))
    else:
        kept, held = parts_to_choose_by(train[1].cpu(), config.held_out)
        fit_part = (train[0][kept.to(device)], train[1][kept.to(device)])
        held_part = (train[0][held.to(device)], train[1][held.to(device)])
    basis = EigenBasis.of(train[0])  # only a rotation: it changes no fit
    swept = _sweep(basis, fit_part, held_part, classes, config, metric)
    best = max(range(len(swept)), key=lambda i: (swept[i][1], -i))  # ties: the stronger penalty
    c, held_out_score = swept[best]
    fit = next(fit_sweep(basis, *train, classes, [c], config.tolerance, config.iterations))
    score = METRICS[metric](fit.logits(test[0]).cpu(), test[1].cpu())
    at_edge = best in (0, config.c_values - 1)
    return Probe(score, metric, c, held_out_score, swept, at_edge, fit)


def check(config: LinearConfig) -> None:
    """Validate the ranges of values.

    Raises:
        InputError: naming the key and what would be right.
    """
    if not 0 < config.held_out < 1:
        raise InputError(f"linear.held_out is {config.held_out}; it must lie between 0 and 1")
    if config.c_values < 1 or config.log10_c_max < config.log10_c_min:
        raise InputError("linear.c_values must be at least 1, and log10_c_min at most log10_c_max")
    if config.normalise not in NORMALISATIONS:
        known = ", ".join(NORMALISATIONS)
        raise InputError(f"linear.normalise {config.normalise!r} is not one of {known}")
    if config.patience < 1:
        raise InputError(f"linear.patience is {config.patience}; it must be at least 1")


def _sweep(
    basis: EigenBasis,
    fit_part: tuple[Tensor, Tensor],
    held_part: tuple[Tensor, Tensor],
    classes: int,
    config: LinearConfig,
    metric: str,
) -> list[tuple[float, float]]:
    """Return (C, held-out score) from the strongest penalty on, each fit started from the last.

    Where the penalty is far too strong, scores stand still or waver over decades: that is no
    reason to stop. Patience counts once the fit has come half the way from chance to certainty,
    and neither held-out score nor loss betters.
    """
    grid = c_grid(config, basis)
    score_of = HELD_OUT_METRICS[metric]
    features, labels = held_part[0], held_part[1].cpu()
    fits = fit_sweep(
        basis, *fit_part, classes, grid, config.sweep_tolerance, config.sweep_iterations
    )
    swept: list[tuple[float, float]] = []
    best, lowest, since, chance = -1.0, math.inf, 0, 0.0
    for fit in fits:
        logits = fit.logits(features).cpu()
        score, loss = score_of(logits, labels), mean_loss(logits, labels)
        swept.append((fit.c, score))
        chance = max(chance, fit.objective)  # of the first fit, whose penalty is the strongest
        unfitted = fit.objective > chance / 2
        since = 0 if unfitted or score > best or loss < lowest else since + 1
        best, lowest = max(best, score), min(lowest, loss)
        if since >= config.patience:
            break
    return swept


def c_grid(config: LinearConfig, basis: EigenBasis) -> Sequence[float]:
    """Return the values of C, ascending: the configured ones over the features' mean variance."""
    variance = float(basis.variances.double().sum()) / len(basis.mean)
    if variance <= 0:
        raise InputError(
            "the features are the same for every image: nothing can be learnt from them"
        )
    exponents = torch.linspace(
        config.log10_c_min, config.log10_c_max, config.c_values, dtype=torch.float64
    )
    return (10**exponents / variance).tolist()


def _prepare(
    part: tuple[Tensor, Tensor], config: LinearConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    features = part[0].to(device, torch.float32)
    if config.normalise == "l2":
        features = F.normalize(features, dim=1)
    return features, part[1].to(device)
