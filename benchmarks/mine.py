"""One MINE estimate of I(X;T) at the released code's size, against the plain way of writing it.

Shapes: n pairs, B pairs a step, P and Q the sizes of x and y, H hidden units.

Baseline: rows drawn on the host with NumPy, joint and marginal pairs concatenated and copied into
tensors, the whole MLP on 5,000 joint and on 5,000 marginal pairs. Ours draws on the device, keeps
the data in place, and computes the first layer once for both kinds of pairs. The critic, its
initialisation, optimiser, rate, iterations and batch are the same.
"""

import dataclasses
import itertools
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.mutual_information import RELEASED_XT, Settings, estimate

LATENT, CORRELATION = 8, 0.6  # Gaussian dimensions behind x and y: −8/2·log(1−0.6²) = 1.79 nat


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the measurement runs on: the released code's, with fewer iterations."""

    pairs: int = 10_000
    x: int = 3072
    y: int = 512
    hidden: int = 1024
    batch: int = 5000
    iterations: int = 16
    repeats: int = 3  # the fastest counts, on both sides
    checked_hidden: int = 256  # the smaller critic whose converged estimates are compared
    checked_batch: int = 1000
    checked_iterations: int = 300


def mine(sizes: Sizes | None = None) -> tuple[float, float, list[str]]:
    """Return the baseline's seconds, ours with bfloat16 hidden layers, and further lines."""
    return _measure(sizes or Sizes(), "bfloat16")


def mine_fp32(sizes: Sizes | None = None) -> tuple[float, float, list[str]]:
    """Return the baseline's seconds, ours in float32, and further lines."""
    return _measure(sizes or Sizes(), "float32")


def _measure(sizes: Sizes, precision: str) -> tuple[float, float, list[str]]:
    x, y = _pairs(sizes)
    settings = dataclasses.replace(
        RELEASED_XT, hidden=sizes.hidden, batch=sizes.batch, iterations=sizes.iterations,
        precision=precision,
    )  # fmt: skip
    baseline, ours = float("inf"), float("inf")
    for _ in range(sizes.repeats):  # in turns, so that a busy machine hits both
        baseline = min(baseline, _timed(lambda: _plain(x, y, settings, 0)))
        ours = min(ours, _timed(lambda: estimate(x, y, "mine", settings)))
    held_out = Settings(
        hidden=sizes.checked_hidden, batch=sizes.checked_batch, lr=5e-4, evaluations=15,
        iterations=sizes.checked_iterations, decay=False,
    )  # fmt: skip
    found = {
        name: estimate(x, y, "mine", dataclasses.replace(held_out, precision=name), (0, 1, 2))
        for name in ("float32", "bfloat16")
    }
    lines = [
        f"{sizes.pairs} pairs of {sizes.x} + {sizes.y} dimensions, H = {sizes.hidden}, "
        f"{sizes.iterations} steps of {sizes.batch} joint and {sizes.batch} marginal pairs, "
        f"{torch.get_num_threads()} threads; ours in {precision}",
        f"a step: baseline {baseline / sizes.iterations:.3f} s, "
        f"ours {ours / sizes.iterations:.3f} s",
        f"held-out estimate, H = {sizes.checked_hidden}, its best of {sizes.checked_iterations} "
        f"steps of {sizes.checked_batch}, mean ± std of three seeds: "
        + ", ".join(f"{name} {e.nats:.3f} ± {e.std:.3f} nat" for name, e in found.items()),
    ]
    return baseline, ours, lines


def _plain(x: Tensor, y: Tensor, settings: Settings, seed: int) -> float:
    """Estimate I(x; y) the plain way; return the mean of the last values, nat."""
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    data = np.concatenate([x.numpy(), y.numpy()], 1)
    split, n = x.shape[1], len(x)
    sizes = [data.shape[1], settings.hidden, settings.hidden, settings.hidden]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=settings.init_std)
        nn.init.zeros_(layer.bias)
    last = nn.Linear(settings.hidden, 1)

    def critic(rows: Tensor) -> Tensor:
        for layer in layers:
            rows = F.relu(layer(rows))
        return last(rows)

    optimizer = torch.optim.Adam(nn.ModuleList([*layers, last]).parameters(), settings.lr)
    average, values = 1.0, []
    for _ in range(settings.iterations):
        joint = data[draw.choice(n, settings.batch, replace=False)]
        left = data[draw.choice(n, settings.batch, replace=False)][:, :split]
        right = data[draw.choice(n, settings.batch, replace=False)][:, split:]
        marginal = np.concatenate([left, right], 1)
        scores = critic(torch.tensor(joint))
        weight = torch.exp(critic(torch.tensor(marginal))).mean()
        average = (1 - settings.ema_rate) * average + settings.ema_rate * weight.item()
        loss = weight / average - scores.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append((scores.mean() - weight.log()).item())
    return float(np.mean(values[-500:]))


def _pairs(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return x and y of correlated latents, as images and their features; I(x; y) ≤ 1.8 nat."""
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    latent = noise(sizes.pairs, LATENT)
    other = CORRELATION * latent + (1 - CORRELATION**2) ** 0.5 * noise(sizes.pairs, LATENT)
    x = latent @ noise(LATENT, sizes.x) / LATENT**0.5 + 0.5 * noise(sizes.pairs, sizes.x)
    y = (other @ noise(LATENT, sizes.y)).relu() / LATENT**0.5 + 0.1 * noise(sizes.pairs, sizes.y)
    return x, y


def _timed(function: object) -> float:
    started = time.perf_counter()
    function()  # type: ignore[operator]
    return time.perf_counter() - started
