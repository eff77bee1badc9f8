"""Mutual information by neural estimation, in nats: MINE, SMILE and InfoNCE behind one call.

Shapes: ``n`` pairs, ``B`` pairs a step, ``P`` and ``Q`` the sizes of x and y, ``H`` hidden units,
``E`` embedding, ``J`` jobs (critics trained side by side on the same x), ``K`` marginal draws.

A critic f(x, y) is trained to tell the joint distribution from the product of its marginals:

- ``mine``: Donsker-Varadhan, I ≥ E_p[f] − log E_q[exp f], with the gradient of the logarithm
  debiased by a moving average of E_q[exp f] (arXiv 1801.04062, equation 12).
- ``smile``: trained by the Jensen-Shannon bound, read by Donsker-Varadhan with exp f clipped to
  [exp −τ, exp τ] under the logarithm (arXiv 1910.06222, equation 12): less variance, some bias.
- ``infonce``: I ≥ log N − L over batches of N pairs (arXiv 1807.03748); never above log N.

Protocol ``held-out``: the critic learns on one part of the pairs, a second chooses the iteration,
and the value is read on a third: a lower bound that over-fitting cannot lift. ``released`` (the
paper's code): no split, the mean of the last values on the training pairs; for comparison only.
A falling rate brings held-out values closer to the truth: what a constant one leaves in the weights
is noise, and every error of the critic lowers the bound. InfoNCE over N pairs stays below I even
with the best critic, and the more the larger I is: by 0.19 nat of 4.1 at N = 1,000.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.lr_scheduler import CosineAnnealingLR

ESTIMATORS, PROTOCOLS = ("mine", "smile", "infonce"), ("held-out", "released")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONVOLVED = 2**20  # numbers in a product's rows from which it is a convolution
WINDOW = 500  # the released code reports the mean of its last 500 values


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a critic is built and trained; the defaults are the released code's for I(X;T)."""

    hidden: int = 1024  # units of each of the three hidden layers
    iterations: int = 10_000
    batch: int = 5_000  # joint pairs a step, and as many marginal ones
    lr: float = 8e-5  # of Adam; the released code has 1e-5 for I(T;Y)
    decay: bool = True  # lr falls to 0 along half a cosine; false (the released code): constant
    init_std: float = 0.02  # of the hidden weights; 0: PyTorch's own initialisation
    ema_rate: float = 0.01  # mine: rate of the moving average that debiases the gradient
    clip: float = 5.0  # smile: τ, nat
    embedding: int = 64  # infonce: E, of the inner product f(x)·g(y)
    protocol: str = "held-out"
    held_out: float = 0.3  # share of the pairs on which the value is read
    validation: float = 0.1  # share of the pairs that chooses the iteration
    evaluations: int = 50  # points of the held-out curve
    marginal_draws: int = 8  # K marginal pairs for each held-out joint pair
    evaluation_pairs: int = 10_000  # at most so many pairs in each held-out part
    standardise: bool = True  # each dimension to mean 0, std 1 of the training pairs (invertible)
    precision: str = "float32"  # of the hidden layers; scores and bounds are always float32

    def __post_init__(self) -> None:
        for value, known in ((self.protocol, PROTOCOLS), (self.precision, PRECISIONS)):
            if value not in known:
                raise ValueError(f"{value!r} is not one of {', '.join(known)}")
        sizes = (self.hidden, self.iterations, self.embedding, self.evaluations, self.batch - 1)
        if min(*sizes, self.marginal_draws) < 1:
            raise ValueError("sizes and counts must be at least 1 (batch: 2)")
        if min(self.lr, self.clip, self.ema_rate) <= 0 or self.ema_rate >= 1:
            raise ValueError("lr, clip and ema_rate must be positive, and ema_rate below 1")
        if min(self.held_out, self.validation) <= 0 or self.held_out + self.validation >= 1:
            raise ValueError("held_out and validation must be positive and leave pairs to train on")


HELD_OUT = Settings()
RELEASED_XT = Settings(protocol="released", standardise=False, decay=False)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One mutual information, in nats."""

    nats: float  # mean over seeds
    std: float  # over seeds; 0 for one
    standard_error: float  # of one seed's value, from the spread of the held-out pairs
    values: list[float]  # one a seed
    curve: list[tuple[int, float]]  # (iteration, value), mean over seeds
    cap: float | None  # infonce: log N, which no value can pass


def estimate(
    x: Tensor, y: Tensor, estimator: str = "mine", settings: Settings = HELD_OUT,
    seeds: Sequence[int] = (0,),
) -> Estimate:  # fmt: skip
    """Estimate I(x; y) from n pairs, on the device of x.

    Args:
        x, y: n×P and n×Q real, or n integer labels (the same as their one-hot rows).
        estimator: ``mine``, ``smile`` or ``infonce``.
        seeds: each gives its own split, initialisation and draws; more than one gives a std.

    Raises:
        ValueError: shapes, too few pairs, values that are not finite, or a critic that diverged.
    """
    return estimate_jobs(x, [y], estimator, settings, seeds)[0]


def estimate_jobs(
    x: Tensor, ys: Sequence[Tensor], estimator: str = "mine", settings: Settings = HELD_OUT,
    seeds: Sequence[int] = (0,),
) -> list[Estimate]:  # fmt: skip
    """Estimate I(x; y) for every y of ``ys`` (equal shapes), the J critics in one batched pass.

    Each result equals ``estimate``'s up to rounding: jobs share splits, draws and initial weights,
    nothing else. It pays on a GPU, which one critic leaves idle.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator {estimator!r} is not one of {', '.join(ESTIMATORS)}")
    if not seeds or not ys or len({(y.shape, y.dtype) for y in ys}) > 1:
        raise ValueError("at least one seed and one y are needed, every y of one shape and type")
    for y in ys:
        _check(x, y)
    runs = [_run_seed(x, ys, estimator, settings, int(seed)) for seed in seeds]
    results = []
    for job in range(len(ys)):
        values = [run.values[job] for run in runs]
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        error = math.sqrt(statistics.fmean(run.errors[job] ** 2 for run in runs))
        curve = torch.stack([run.curve[:, job] for run in runs]).mean(0).tolist()
        points = list(zip(runs[0].points, curve, strict=True))
        mean = statistics.fmean(values)
        results.append(Estimate(mean, std, error, values, points, runs[0].cap))
    return results


class PairCritic(nn.Module):
    """f(x, y): an MLP of four linear layers over the concatenation of x and y.

    Its first layer is kept as W_x·x + W_y·y + b, so that joint and marginal pairs of the same rows
    share both products; side by side, [W_x W_y] is the weight of the plain form.
    """

    def __init__(self, x_size: int, y_size: int, settings: Settings) -> None:
        super().__init__()
        hidden = settings.hidden
        whole = nn.Linear(x_size + y_size, hidden)
        middle = [nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)]
        _initialise([whole, *middle], settings.init_std)
        self.weight_x = nn.Parameter(whole.weight[:, :x_size].detach().clone())  # H×P
        self.weight_y = nn.Parameter(whole.weight[:, x_size:].detach().clone())  # H×Q
        self.bias = nn.Parameter(whole.bias.detach().clone())  # H
        self.middle: Any = nn.ModuleList(middle)
        self.last = nn.Linear(hidden, 1)
        self.alone = True  # not one of several jobs under ``vmap``

    def forward(self, x: Tensor, y: Tensor, shifts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return f of the joint pairs (x_i, y_i), B, and of the marginal (x_i, y_{i+s}), K×B."""
        from_x = self._project(x, self.weight_x, self.bias)  # B×H
        from_y = self._project(y, self.weight_y, None)  # B×H; then one pass a shift: bounded memory
        scores = [self._score(from_x + from_y.roll(-s, 0)) for s in (0, *shifts)]
        return scores[0], torch.stack(scores[1:])

    def _project(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if rows.is_floating_point():
            return _linear(rows, weight, bias, self.alone)
        # Labels pick columns, as their one-hot rows would.
        return F.embedding(rows, weight.t()) + (0 if bias is None else bias)

    def _score(self, first: Tensor) -> Tensor:
        hidden = first.relu_()
        for layer in self.middle:
            hidden = _linear(hidden, layer.weight, layer.bias, self.alone).relu_()
        # A bfloat16 score would be coarser than the estimate: the last layer is float32.
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.last.weight[0] + self.last.bias


class SeparableCritic(nn.Module):
    """f(x, y) = g(x)·h(y): every pairing of a batch for the price of B rows (for InfoNCE)."""

    def __init__(self, x_size: int, y_size: int, settings: Settings) -> None:
        super().__init__()
        self.tower_x = _tower(x_size, settings)
        self.tower_y = _tower(y_size, settings)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        """Return f(x_i, y_j), B×B."""
        left, right = self.tower_x(x).float(), self.tower_y(y).float()
        with torch.autocast(left.device.type, enabled=False):  # scores are float32
            return (left @ right.mT / math.sqrt(left.shape[-1]),)


def donsker_varadhan(joint: Tensor, marginal: Tensor) -> Tensor:
    """Return mean f_joint − log mean exp f_marginal; scores …×B and …×K×B."""
    return joint.mean(-1) - _log_mean_exp(marginal)


def standard_error(joint: Tensor, marginal: Tensor, shifts: tuple[int, ...]) -> Tensor:
    """Return the standard error of ``donsker_varadhan`` over B independent pairs, from its scores.

    By the influence of pair i (the Hájek projection), which stands once among the joint scores and
    twice among the marginal ones: by its x (with y_{i+s}) and by its y (with x_{i−s}).
    """
    ratio = (marginal - _log_mean_exp(marginal)[..., None, None]).exp()  # mean 1
    by_y = torch.stack([ratio[..., k, :].roll(s, -1) for k, s in enumerate(shifts)], -2)
    influence = joint - ratio.mean(-2) - by_y.mean(-2)
    return influence.std(-1) / math.sqrt(joint.shape[-1])


class _Run(NamedTuple):
    """What one seed gave to J jobs."""

    values: list[float]
    errors: list[float]
    points: list[int]
    curve: Tensor  # points×J
    cap: float | None


def _run_seed(x: Tensor, ys: Sequence[Tensor], kind: str, settings: Settings, seed: int) -> _Run:
    """Split, train, and read the value as the protocol says."""
    parts = [rows.to(x.device) for rows in _split(len(x), settings, seed)]
    x, y = _prepare(x, ys, parts[0], kind, settings)
    trainer = _Trainer(x, y, kind, settings, seed, parts[0])
    held_out = settings.protocol == "held-out"
    every = max(1, settings.iterations // settings.evaluations)
    points = list(range(every, settings.iterations + 1, every))
    training, chosen, read = [], [], []
    for iteration in range(1, settings.iterations + 1):
        training.append(trainer.step())
        if iteration % every == 0:
            if held_out:
                chosen.append(trainer.evaluate(parts[1])[0])
                read.append(torch.stack(trainer.evaluate(parts[2])))
            if not bool(torch.isfinite(torch.stack([training[-1], *chosen[-1:]])).all()):
                raise ValueError(f"the critic diverged: no finite estimate at step {iteration}")
    if held_out:
        best = torch.stack(chosen).argmax(0, keepdim=True)  # 1×J, chosen without a look at part 2
        curve, errors = torch.stack(read).unbind(1)  # points×J each
        value, error = curve.gather(0, best)[0], errors.gather(0, best)[0]
        pairs = min(len(parts[2]), settings.evaluation_pairs)
    else:
        last = torch.stack(training[-WINDOW:])
        blocks = torch.stack([block.mean(0) for block in last.tensor_split(min(10, len(last)))])
        value, error = last.mean(0), blocks.std(0, correction=0) / math.sqrt(len(blocks))
        curve = torch.stack([training[point - 1] for point in points])
        pairs = len(parts[0])
    cap = math.log(min(trainer.batch, pairs)) if kind == "infonce" else None
    if not bool(torch.isfinite(value + error).all()):
        raise ValueError("the critic diverged: no finite estimate")
    return _Run(value.tolist(), error.tolist(), points, curve.cpu(), cap)


class _Trainer:
    """J critics, one Adam over their stacked weights, and one generator on the device."""

    def __init__(
        self, x: Tensor, y: Tensor, estimator: str, settings: Settings, seed: int, rows: Tensor
    ) -> None:
        self.x, self.y, self.rows = x, y, rows  # n×P, J×n×Q, the rows to train on
        self.estimator, self.settings = estimator, settings
        self.jobs, self.batch = len(y), min(settings.batch, len(rows))
        p, q = (s.shape[-1] if s.is_floating_point() else int(s.max()) + 1 for s in (x, y))
        kind = SeparableCritic if estimator == "infonce" else PairCritic
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.critic: Any = kind(p, q, settings).to(x.device)
        self.critic.alone = self.jobs == 1
        self.stacked, _ = stack_module_state([self.critic] * self.jobs)
        trained = self.stacked.values() if self.jobs > 1 else self.critic.parameters()
        self.optimiser = torch.optim.Adam(trained, lr=settings.lr, fused=True)
        self.schedule = CosineAnnealingLR(self.optimiser, settings.iterations)
        self.generator = torch.Generator(x.device).manual_seed(seed)
        self.log_average = torch.zeros(self.jobs, device=x.device)  # of E_q[exp f]; starts at 1

    def step(self) -> Tensor:
        """Take one step; return the bound on its own training pairs, J (not yet checked)."""
        order = torch.randperm(len(self.rows), generator=self.generator, device=self.x.device)
        # Distinct rows in random order: shifted by one they are a random pairing of strangers.
        loss, value = self._loss(self._scores(self.rows[order[: self.batch]], (1,)))
        self.optimiser.zero_grad()
        loss.sum().backward()
        self.optimiser.step()
        if self.settings.decay:
            self.schedule.step()
        return value.detach()

    @torch.no_grad()
    def evaluate(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bound and its standard error on the given pairs, J each."""
        rows = rows[: self.settings.evaluation_pairs]
        if self.estimator == "infonce":
            size = min(self.batch, len(rows))
            batches = rows[: len(rows) // size * size].split(size)
            gains = torch.cat([_infonce_gains(self._scores(b, ())[0]) for b in batches], -1)
            return gains.mean(-1), gains.std(-1) / math.sqrt(gains.shape[-1])
        draws = min(self.settings.marginal_draws, len(rows) - 1)
        shifts = tuple(1 + k * (len(rows) - 1) // draws for k in range(draws))
        joint, marginal = self._scores(rows, shifts)
        if self.estimator == "smile":
            marginal = marginal.clamp(-self.settings.clip, self.settings.clip)
        return donsker_varadhan(joint, marginal), standard_error(joint, marginal, shifts)

    def _scores(self, rows: Tensor, shifts: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Return each score tensor of the critic, with J in front."""
        x, y = self.x[rows], self.y[:, rows]
        more = () if self.estimator == "infonce" else (shifts,)
        low = self.settings.precision != "float32"
        with torch.autocast(x.device.type, PRECISIONS[self.settings.precision], enabled=low):
            if self.jobs == 1:
                return tuple(part[None] for part in self.critic(x, y[0], *more))
            return vmap(lambda w, side: functional_call(self.critic, w, (x, side, *more)))(
                self.stacked, y
            )

    def _loss(self, scores: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return each job's loss, and the bound that it stands for; J each."""
        if self.estimator == "infonce":
            gain = _infonce_gains(scores[0]).mean(-1)
            return -gain, gain
        joint, marginal, clip = *scores, self.settings.clip
        if self.estimator == "smile":
            loss = F.softplus(-joint).mean(-1) + F.softplus(marginal).mean((-2, -1))
            return loss, donsker_varadhan(joint, marginal.clamp(-clip, clip))
        log_mean, rate = _log_mean_exp(marginal), self.settings.ema_rate
        kept = self.log_average + math.log1p(-rate)
        self.log_average = torch.logaddexp(kept, log_mean.detach() + math.log(rate))
        # The debiased gradient: that of E_q[exp f] over its average.
        loss = (log_mean - self.log_average).exp() - joint.mean(-1)
        return loss, joint.mean(-1) - log_mean


def _infonce_gains(scores: Tensor) -> Tensor:
    """Return log N + log softmax of the true partner, …×N, from scores …×N×N."""
    diagonal = scores.diagonal(dim1=-2, dim2=-1)
    return diagonal - scores.logsumexp(-1) + math.log(scores.shape[-1])


def _log_mean_exp(marginal: Tensor) -> Tensor:
    """Return log mean exp over the last two axes (K and B)."""
    flat = marginal.flatten(-2)
    return flat.logsumexp(-1) - math.log(flat.shape[-1])


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, alone: bool) -> Tensor:
    """Return rows·weightᵀ + bias; large float32 products on a CPU as a 1×1 convolution.

    The same sums, but PyTorch gives products to MKL and convolutions to oneDNN, twice as fast on
    AMD processors. Under ``vmap`` (not ``alone``) it would be a slow grouped convolution.
    """
    if not alone or rows.is_cuda or rows.dtype != torch.float32 or rows.numel() < CONVOLVED:
        return F.linear(rows, weight, bias)
    pixels = rows[None, None].permute(0, 3, 1, 2)  # 1×P×1×B, channels last
    return F.conv2d(pixels, weight[:, :, None, None], bias)[0, :, 0].t()


def _tower(size: int, settings: Settings) -> nn.Sequential:
    """Return a three-layer MLP to E numbers."""
    hidden = settings.hidden
    layers = [nn.Linear(size, hidden), nn.Linear(hidden, hidden)]
    _initialise(layers, settings.init_std)
    last = nn.Linear(hidden, settings.embedding)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), last)


def _initialise(layers: Sequence[nn.Linear], std: float) -> None:
    for layer in layers if std else ():
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)


def _check(x: Tensor, y: Tensor) -> None:
    for name, side in (("x", x), ("y", y)):
        if side.is_floating_point():
            if side.ndim != 2 or side.shape[1] == 0:
                raise ValueError(f"{name} must be n×size, not {tuple(side.shape)}")
            if not bool(torch.isfinite(side).all()):
                raise ValueError(f"{name} holds values that are not finite")
        elif side.ndim != 1 or side.dtype != torch.int64 or bool((side < 0).any()):
            raise ValueError(f"{name} holds integers, so it must be n int64 labels from 0 on")
    if len(x) != len(y) or len(x) < 20:
        raise ValueError(
            f"x has {len(x)} rows and y {len(y)}: equal numbers are needed, 20 or more"
        )


def _split(n: int, settings: Settings, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows that train, choose and are read (all of them, where nothing is held out)."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    read, choose = (max(2, int(n * f)) for f in (settings.held_out, settings.validation))
    if settings.protocol == "released":
        return order, order, order
    return order[read + choose :], order[read : read + choose], order[:read]


def _prepare(x: Tensor, ys: Sequence[Tensor], rows: Tensor, kind: str, how: Settings) -> Any:
    """Standardise by the training rows, cast, and stack the jobs: x n×P, y J×n×Q."""

    def ready(side: Tensor) -> Tensor:
        if not side.is_floating_point():
            return side
        if how.standardise:
            known = side[rows.to(side.device)].float()
            spread = known.std(0)
            side = (side - known.mean(0)) / torch.where(spread > 0, spread, 1.0)
        return side.to(PRECISIONS[how.precision])

    sides = ready(x), torch.stack([ready(y).to(x.device) for y in ys])
    if kind == "infonce":  # its towers take rows alone
        return [s if s.is_floating_point() else F.one_hot(s).float() for s in sides]
    return sides
