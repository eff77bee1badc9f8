"""Multinomial logistic regression by L-BFGS in the features' eigenbasis, for whole sweeps of C.

Shapes: N images, D feature dimensions, R ≤ D directions of the eigenbasis, K classes.

The penalty ‖W‖² is invariant to rotations and the unpenalised bias absorbs any shift, so the
problem is solved in the centred eigenbasis of the features, where the bound of Böhning (1992) on
the Hessian, ½·XᵀX/N + λ, is diagonal: it preconditions L-BFGS for every λ of a sweep at no cost.
Logits are linear in the parameters, so a line search costs no product with the features.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

HISTORY = 20  # pairs that L-BFGS remembers
IGNORED = -1  # in N×K targets: not labelled for this class (VOC's "difficult")


@dataclasses.dataclass(frozen=True)
class EigenBasis:
    """Centre and principal directions of a set of features; a change of coordinates, no loss."""

    mean: Tensor  # D
    vectors: Tensor  # D×R, orthonormal columns
    variances: Tensor  # R, descending

    @classmethod
    def of(cls, features: Tensor) -> "EigenBasis":
        """Return the basis that spans the centred N×D ``features``; R = min(N, D)."""
        mean = features.mean(0)
        centred = features - mean
        span = None
        if len(centred) < centred.shape[1]:  # only the row space matters to a penalised fit
            span = torch.linalg.qr(centred.T).Q  # D×N
            centred = centred @ span
        gram = (centred.T @ centred).double() / len(centred)
        values, vectors = torch.linalg.eigh(gram)
        vectors = vectors.flip(1).to(features.dtype)
        if span is not None:
            vectors = span @ vectors
        return cls(mean, vectors, values.flip(0).clamp_min(0).to(features.dtype))

    def rotate(self, features: Tensor) -> Tensor:
        """Return N×D features in this basis, N×R."""
        return (features - self.mean) @ self.vectors


@dataclasses.dataclass(frozen=True)
class LogisticFit:
    """A fitted model; ``logits = features @ weight.T + bias``."""

    weight: Tensor  # K×D
    bias: Tensor  # K
    c: float  # inverse regularisation as in scikit-learn: C·Σ loss + ½‖W‖²
    objective: float  # mean loss + ‖W‖²/(2·C·N), nats
    iterations: int
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """Return N×K logits of N×D features."""
        return features.to(self.weight) @ self.weight.T + self.bias


def fit_logistic(
    features: Tensor,
    targets: Tensor,
    classes: int,
    c: float = 1.0,
    *,
    tolerance: float = 1e-7,
    max_iterations: int = 1000,
) -> LogisticFit:
    """Fit one model; equals scikit-learn's ``LogisticRegression(C=c)`` on the same features.

    Args:
        features: N×D, float32 or float64; the fit runs on their device in their precision.
        targets: N class numbers (softmax over classes), or N×K of 1, 0 and −1 (one logistic
            regression a class; entries of −1 are left out).
        tolerance: stop when the expected decrease of the mean loss is below it, nats.

    Raises:
        ValueError: shapes that do not fit, NaN, a class number out of range, ``c`` not positive.
    """
    _check(features, targets, classes, [c])
    basis = EigenBasis.of(features)
    sweep = fit_sweep(basis, features, targets, classes, [c], tolerance, max_iterations)
    return next(sweep)


def fit_sweep(
    basis: EigenBasis,
    features: Tensor,
    targets: Tensor,
    classes: int,
    grid: Sequence[float],
    tolerance: float = 1e-7,
    max_iterations: int = 1000,
) -> Iterator[LogisticFit]:
    """Yield a fit for each C of ``grid`` (ascending), each started from the one before.

    ``basis`` must span ``features``: that of the same features, or of a set that holds them.
    """
    _check(features, targets, classes, grid)
    x = basis.rotate(features)  # N×R
    loss = _Loss(targets, classes, x.dtype)
    theta = x.new_zeros(x.shape[1] + 1, classes)  # the last row is the bias
    for c in grid:
        penalty = 1.0 / (c * len(x))
        state = _Lbfgs(x, loss, penalty, basis.variances, theta)
        state.minimise(tolerance, max_iterations)
        theta = state.theta
        weight = (basis.vectors @ theta[:-1]).T.contiguous()  # K×D
        bias = theta[-1] - weight @ basis.mean
        yield LogisticFit(weight, bias, c, state.value, state.iterations, state.converged)


def mean_loss(logits: Tensor, targets: Tensor) -> float:
    """Return the mean loss of N×K logits, nats, of what ``fit_logistic`` takes as targets."""
    return _Loss(targets, logits.shape[1], logits.dtype)(logits)[0]


class _Loss:
    """Mean loss of N×K logits, and its derivative: softmax or one sigmoid a class."""

    def __init__(self, targets: Tensor, classes: int, dtype: torch.dtype) -> None:
        self.multi_label = targets.ndim == 2
        self.curvature = 0.25 if self.multi_label else 0.5  # bound on the Hessian's eigenvalues
        self.targets = targets
        if self.multi_label:
            self.mask = (targets != IGNORED).to(dtype)
            self.positive = (targets == 1).to(dtype)

    def __call__(self, logits: Tensor) -> tuple[float, Tensor]:
        """Return the mean loss in nats and N·∂loss/∂logits (probability − target), N×K."""
        if self.multi_label:
            terms = F.softplus(logits) - self.positive * logits
            residual = (torch.sigmoid(logits) - self.positive) * self.mask
            return ((terms * self.mask).sum(dtype=torch.float64) / len(logits)).item(), residual
        picked = self.targets[:, None]
        log_probability = torch.log_softmax(logits, 1)
        value = -log_probability.gather(1, picked).mean(dtype=torch.float64).item()
        residual = log_probability.exp_()
        residual.scatter_add_(1, picked, residual.new_full((1, 1), -1.0).expand(len(logits), 1))
        return value, residual


class _Lbfgs:
    """L-BFGS with a diagonal start matrix and a line search on cached logits (convex, smooth)."""

    def __init__(
        self, x: Tensor, loss: _Loss, penalty: float, variances: Tensor, theta: Tensor
    ) -> None:
        self.x, self.loss, self.penalty, self.theta = x, loss, penalty, theta.clone()
        bound = loss.curvature * torch.cat([variances, variances.new_ones(1)])
        bound[:-1] += penalty
        self.inverse_bound = 1.0 / bound.clamp_min(torch.finfo(x.dtype).tiny)[:, None]
        self.pairs: list[tuple[Tensor, Tensor, float]] = []
        self.iterations, self.converged = 0, False
        self.z = self._logits(self.theta)
        self.value, residual = self._evaluate(self.z, self.theta)
        self.gradient = self._gradient(residual, self.theta)

    def minimise(self, tolerance: float, max_iterations: int) -> None:
        """Step until the expected decrease falls below ``tolerance`` or no step helps any more."""
        floor = 4 * torch.finfo(self.x.dtype).eps
        while self.iterations < max_iterations:
            direction = -self._times_inverse_hessian(self.gradient)
            slope = _dot(self.gradient, direction)
            if -0.5 * slope <= tolerance * self.value or not math.isfinite(slope):
                self.converged = math.isfinite(slope)
                return
            before = self.value
            if not self._step(direction, slope) or before - self.value < floor * abs(before):
                if not self.pairs:
                    self.converged = True  # at the precision's floor from the bound itself
                    return
                self.pairs.clear()  # once more from the bound, without remembered curvature
            self.iterations += 1

    def _step(self, direction: Tensor, slope: float) -> bool:
        """Move along ``direction`` to where the slope nearly vanishes; False if none is lower."""
        along = self._logits(direction)
        low, low_slope, high, high_slope = 0.0, slope, math.inf, math.inf
        t = 1.0
        for _ in range(20):
            theta = self.theta + t * direction
            z = self.z + t * along
            value, residual = self._evaluate(z, theta)
            here = (
                _dot(residual, along) / len(self.x)
                + self.penalty * _dot(theta[:-1], direction[:-1])
            )  # fmt: skip
            if abs(here) <= 0.5 * abs(slope) and value <= self.value:
                break
            if here < 0:
                low, low_slope = t, here
            else:
                high, high_slope = t, here
            t = _next_trial(low, low_slope, high, high_slope)
        else:
            return False
        gradient = self._gradient(residual, theta)
        s, y = theta - self.theta, gradient - self.gradient
        curvature = _dot(s, y)
        if curvature > 0:
            self.pairs = [*self.pairs[-HISTORY + 1 :], (s, y, 1.0 / curvature)]
        self.theta, self.z, self.value, self.gradient = theta, z, value, gradient
        return True

    def _times_inverse_hessian(self, gradient: Tensor) -> Tensor:
        """Return the two-loop recursion's product (Nocedal and Wright, algorithm 7.4)."""
        q = gradient.clone()
        alphas = []
        for s, y, rho in reversed(self.pairs):
            alpha = rho * _dot(s, q)
            q.sub_(y, alpha=alpha)
            alphas.append(alpha)
        q *= self.inverse_bound
        if self.pairs:
            s, y, rho = self.pairs[-1]
            q *= 1.0 / (rho * _dot(y, self.inverse_bound * y))
        for (s, y, rho), alpha in zip(self.pairs, reversed(alphas), strict=True):
            q.add_(s, alpha=alpha - rho * _dot(y, q))
        return q

    def _logits(self, theta: Tensor) -> Tensor:
        return torch.addmm(theta[-1], self.x, theta[:-1])

    def _evaluate(self, z: Tensor, theta: Tensor) -> tuple[float, Tensor]:
        value, residual = self.loss(z)
        return value + 0.5 * self.penalty * _dot(theta[:-1], theta[:-1]), residual

    def _gradient(self, residual: Tensor, theta: Tensor) -> Tensor:
        gradient = torch.empty_like(theta)
        torch.mm(self.x.T, residual, out=gradient[:-1])
        torch.sum(residual, 0, out=gradient[-1])
        gradient /= len(self.x)
        gradient[:-1].add_(theta[:-1], alpha=self.penalty)
        return gradient


def _next_trial(low: float, low_slope: float, high: float, high_slope: float) -> float:
    """Return the next step length: the secant's zero inside the bracket, or further out."""
    if not math.isfinite(high):
        return 2.0 * low
    if not math.isfinite(high_slope):
        return 0.5 * (low + high)
    share = low_slope / (low_slope - high_slope)
    return low + min(max(share, 0.1), 0.9) * (high - low)


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.dot(a.reshape(-1), b.reshape(-1)).item()


def _check(features: Tensor, targets: Tensor, classes: int, grid: Sequence[float]) -> None:
    if features.ndim != 2 or len(features) != len(targets) or len(features) == 0:
        raise ValueError(
            f"features must be N×D with N targets, not {tuple(features.shape)} "
            f"with {tuple(targets.shape)}"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("the features hold NaN or infinity")
    if targets.ndim == 2 and targets.shape[1] != classes:
        raise ValueError(f"N×K targets must have K = {classes} columns, not {targets.shape[1]}")
    if targets.ndim == 1 and not bool(((targets >= 0) & (targets < classes)).all()):
        raise ValueError(f"class numbers must lie in 0..{classes - 1}")
    if any(c <= 0 for c in grid) or list(grid) != sorted(grid):
        raise ValueError("the values of C must be positive and ascending")
