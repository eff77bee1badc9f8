"""CTC's losses against plain ways of computing them: time, memory, and that the values agree.

Shapes: B images, N bank rows, K negatives, D embedding.

Every pair is measured in turns, baseline and ours, and the fastest of each counts, so that a busy
machine slows both alike.
"""

import ctypes
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import amp
from models.resnet import create_model
from pretrain import losses
from pretrain.attention import bank_instance_loss
from pretrain.memory import MemoryBank
from pretrain.objectives import CTC
from pretrain.recipe import CTCConfig, StageConfig
from pretrain.terms import BankOptions, PreservationOptions, PreservationTerm
from training.loop import Hooks, LoopConfig, Trainer

B, D, TAU, CLASSES = 64, 128, 0.1, 100
Measured = tuple[float, float, list[str]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a stage-2 measurement: CIFAR-100's."""

    images: int = 50_000  # N
    negatives: int = 16_384  # K
    repeats: int = 9


def stage2(sizes: Sizes | None = None) -> Measured:
    """Forward, backward and bank update of L_IPS; negatives of each image's own."""
    return _stage2(sizes or Sizes(), shared=False)


def stage2_shared(sizes: Sizes | None = None) -> Measured:
    """The same with negatives that the batch shares; the baseline still gathers per image."""
    return _stage2(sizes or Sizes(), shared=True)


def _stage2(sizes: Sizes, shared: bool) -> Measured:
    """Baseline: each image's K + 1 rows gathered from both banks, as the released code does."""
    problem = Preservation(sizes, shared)
    exact = problem.exact_loss()
    values = []
    for way in (lambda: problem.ours(0), problem.gathered, problem.dense):
        problem.restore()
        values.append(way())
    seconds = in_turns(
        [problem.gathered, problem.dense, lambda: problem.ours(0)], sizes.repeats, ours_times=3
    )
    (baseline, _), (dense, _), (ours, _) = seconds
    names = ("ours", "gathered", "B×N product")
    errors = ", ".join(
        f"{name} {abs(value / exact - 1):.1e}" for name, value in zip(names, values, strict=True)
    )
    lines = [
        f"L_IPS, nce, N {sizes.images}, K {sizes.negatives}, B {B}, D {D}, "
        f"{'shared' if shared else 'per-sample'} negatives, {torch.get_num_threads()} threads",
        "baseline: rows gathered per image; its negatives are given, ours are drawn in the step",
        f"loss {exact:.6f} in float64; relative error in float32: {errors}",
        f"B×N product and a gather of its entries: {dense:.3g} s, {baseline / dense:.1f}×",
        f"medians: baseline {seconds[0][1]:.3g} s, ours {seconds[2][1]:.3g} s",
    ]
    return baseline, ours, lines


class Preservation:
    """One stage-2 step on random embeddings, computed three ways."""

    def __init__(self, sizes: Sizes, shared: bool) -> None:
        torch.manual_seed(0)
        self.sizes = sizes
        labels = torch.arange(sizes.images) % CLASSES
        stub: Any = nn.Linear(1, 1)
        stub.num_features = 1
        options = PreservationOptions(TAU, negatives=sizes.negatives, shared=shared)
        self.term = PreservationTerm(stub, labels, options, BankOptions(sizes.images))
        self.index = torch.randperm(sizes.images)[:B]
        self.labels = labels[self.index]
        self.v, self.t = (F.normalize(torch.randn(B, D), dim=1) for _ in range(2))
        self.banks = (self.term.frozen_bank, self.term.bank)  # that v and t are contrasted with
        self.before = [bank.storage.clone() for bank in self.banks]
        (windows,) = self.term.drawer.draw(0, self.index, self.labels, self.term.groups)
        self.contrast = torch.cat([self.index[:, None], windows.listed()], dim=1)  # B×(K+1)
        self.ours(0)  # fixes Z
        self.restore()

    def restore(self) -> None:
        """Undo the bank updates."""
        for bank, rows in zip(self.banks, self.before, strict=True):
            bank.storage.copy_(rows)

    def ours(self, step: int) -> float:
        v, t = self.v.clone().requires_grad_(), self.t.clone().requires_grad_()
        loss = self.term.contrast(v, t, self.labels, self.index, step)
        loss.backward()
        self.term.update()
        return float(loss.detach())

    def gathered(self) -> float:
        """Gather B×(K+1) rows of D numbers, multiply each image with its own."""
        return self._plain(
            lambda e, rows: torch.bmm(
                rows.index_select(0, self.contrast.flatten()).view(B, -1, D), e[:, :, None]
            )[:, :, 0]
        )

    def dense(self) -> float:
        """Multiply with all rows, gather B×(K+1) numbers."""
        return self._plain(lambda e, rows: (e @ rows.T).gather(1, self.contrast))

    def _plain(self, similarities: Callable[[Tensor, Tensor], Tensor]) -> float:
        v, t = self.v.clone().requires_grad_(), self.t.clone().requires_grad_()
        share, total = self.sizes.negatives / self.sizes.images, torch.zeros(())
        for embedding, bank, log_z in zip((v, t), self.banks, self.term.log_z, strict=True):
            p = (similarities(embedding, bank.rows) / TAU).exp() / log_z.exp()
            positive = -torch.log(p[:, 0] / (p[:, 0] + share + 1e-7))
            negative = -torch.log(share / (p[:, 1:] + share + 1e-7)).sum(dim=1)
            total = total + (positive + negative).mean()
        total.backward()
        self.banks[1].update(self.index, v)
        self.banks[0].update(self.index, t)
        return float(total.detach())

    def exact_loss(self) -> float:
        """Return the loss in float64, image by image."""
        share, total = self.sizes.negatives / self.sizes.images, 0.0
        for embedding, bank, log_z in zip(
            (self.v, self.t), self.banks, self.term.log_z, strict=True
        ):
            for image in range(B):
                rows = bank.rows[self.contrast[image]].double()
                similar = (rows @ embedding[image].double() / TAU)[None]
                value = losses.nce_loss(similar[:, 0], similar[:, 1:], log_z.double(), share)
                total += float(value) / B
        return total


def stage1(images: int = 400_000, repeats: int = 5) -> Measured:
    """L_IAS and its gradient; baseline: B×N logits and autograd."""
    torch.manual_seed(0)
    rows, embedding = _unit(images), _unit(B)
    index = torch.randint(images, (B,))

    def ours() -> tuple[float, Tensor]:
        u = embedding.clone().requires_grad_()
        loss = bank_instance_loss(u, rows[index], rows, TAU).mean()
        return float(loss.detach()), torch.autograd.grad(loss, u)[0]

    def materialised() -> tuple[float, Tensor]:
        u = embedding.clone().requires_grad_()
        loss = losses.instance_loss(u, rows, index, TAU).mean()
        return float(loss.detach()), torch.autograd.grad(loss, u)[0]

    bank_instance_loss(embedding, rows[:B], rows[:1000], TAU)  # warms the libraries up
    our_peak, base_peak = peak_extra_bytes(ours), peak_extra_bytes(materialised)
    (value, gradient), (expected, expected_gradient) = ours(), materialised()
    error = float((gradient - expected_gradient).norm() / expected_gradient.norm())
    (baseline, base_median), (best, median) = in_turns([materialised, ours], repeats, ours_times=2)
    lines = [
        f"L_IAS, N {images}, B {B}, D {D}, {torch.get_num_threads()} threads",
        f"loss {value:.6f}, materialised {expected:.6f}; gradient differs by {error:.1e}",
        f"peak extra memory: baseline {base_peak / 2**20:.0f} MiB, ours {our_peak / 2**20:.1f} MiB "
        f"({100 * our_peak / max(base_peak, 1):.1f}%)",
        f"medians: baseline {base_median:.3g} s, ours {median:.3g} s",
    ]
    return baseline, best, lines


def stage1_imagenet() -> Measured:
    """``stage1`` with ImageNet's 1,281,167 images."""
    return stage1(1_281_167, 3)


def whole_step(images: int = 50_000, repeats: int = 5) -> Measured:
    """A training step of stage 2: ResNet-18 with the CIFAR stem, the loop's own code.

    Baseline: the same step, whose L_IPS gathers rows per image. Both in the precision and memory
    format that the loop chooses on this machine.
    """
    precision = amp.resolve("auto", torch.device("cpu"))
    step, term, seconds = _step_of(images, precision)
    in_float32, _, _ = _step_of(images, "none", channels_last=False)
    step()  # fixes Z
    in_float32()
    kernel = term.contrast
    plain = gathering_contrast(term, images)

    def baseline() -> None:
        term.contrast = plain  # type: ignore[method-assign]
        step()
        term.contrast = kernel  # type: ignore[method-assign]

    baseline()
    (slow, _), (fast, _), (float32, _) = in_turns([baseline, step, in_float32], repeats)
    seconds.clear()
    for _ in range(repeats):
        step()
    parts = {name: min(values) for name, values in seconds.items()}
    shares = ", ".join(f"{name} {value:.3g} s" for name, value in parts.items())
    lines = [
        f"ResNet-18 (CIFAR stem), B {B} at 32 px, N {images}, K 16384, {precision}, channels_last, "
        f"{torch.get_num_threads()} threads",
        f"of our step: {shares}; the rest is the student's backward pass and the optimiser",
        f"our step in float32, without channels_last: {float32:.3g} s, {float32 / fast:.1f}×",
    ]
    return slow, fast, lines


def _step_of(
    images: int, precision: str, channels_last: bool = True
) -> tuple[Callable[[], None], PreservationTerm, dict[str, list[float]]]:
    """Return a stage-2 step of the training loop, its L_IPS, and where parts are timed."""
    torch.manual_seed(0)
    labels = torch.arange(images) % CLASSES
    short = StageConfig(1, 0.005, 5e-4)
    objective = CTC(create_model("resnet18_cifar", CLASSES), labels, CTCConfig(short, short))
    config = LoopConfig(amp=precision, channels_last=channels_last)
    trainer = Trainer(objective, config, Path(), 0, torch.device("cpu"))
    position = trainer.begin(Hooks())
    position.epoch = 1
    trainer.enter(position, Hooks(batches=lambda: iter(())))
    term: Any = objective.term
    batch, index = torch.randn(B, 3, 32, 32), torch.randperm(images)[:B]
    seconds: dict[str, list[float]] = {}
    _time(term, "_frozen_features", "frozen network", seconds)
    _time(objective.model, "forward_features", "student forward", seconds)
    _time(term, "contrast", "L_IPS", seconds)
    _time(term, "update", "bank update", seconds)
    return lambda: _do(trainer, batch, labels[index], index, position), term, seconds


def _do(trainer: Trainer, *step: Any) -> None:
    images, labels, index, position = step
    trainer.step(images, labels, index, 0.005, position)


def _time(owner: Any, name: str, label: str, seconds: dict[str, list[float]]) -> None:
    function = getattr(owner, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments, **options)
        seconds.setdefault(label, []).append(time.perf_counter() - started)
        return result

    setattr(owner, name, timed)


def gathering_contrast(term: Any, images: int) -> Callable[..., Tensor]:
    """Return a stand-in for ``term.contrast`` that gathers K + 1 rows per image."""
    negatives = term.options.negatives
    others = torch.randint(images, (B, negatives))

    def contrast(v: Tensor, t: Tensor, labels: Tensor, index: Tensor, step: int) -> Tensor:
        contrasted = torch.cat([index[:, None], others], dim=1)
        total = torch.zeros(())
        for embedding, bank, log_z in zip(
            (v, t), (term.frozen_bank, term.bank), term.log_z, strict=True
        ):
            rows = bank.rows.index_select(0, contrasted.flatten()).view(B, -1, D)
            similar = torch.bmm(rows, embedding[:, :, None])[:, :, 0] / TAU
            p = similar.exp() / log_z.exp()
            share = negatives / images
            total = total - torch.log(p[:, 0] / (p[:, 0] + share + 1e-7)).mean()
            total = total - torch.log(share / (p[:, 1:] + share + 1e-7)).sum(dim=1).mean()
        term._seen = (index, v.detach(), t.detach())
        return total

    return contrast


def bank_dtype(images: int = 50_000, repeats: int = 5) -> Measured:
    """L_IAS and L_IPS with the bank in bf16 and fp16: the change of the loss, and of the time.

    The ratio is float32's time for L_IPS over bf16's.
    """
    torch.manual_seed(0)
    labels = torch.arange(images) % CLASSES
    index = torch.randperm(images)[:B]
    filled, u, v, t = _unit(images), *(_unit(B) for _ in range(3))
    lines = [f"N {images}, K 16384, B {B}, D {D}; loss, its change against fp32, seconds of L_IPS"]
    seconds: dict[str, float] = {}
    reference: tuple[float, float] | None = None
    for dtype in ("fp32", "bf16", "fp16"):
        stub: Any = nn.Linear(1, 1)
        stub.num_features = 1
        options, bank_options = PreservationOptions(TAU), BankOptions(images, dtype)
        term = PreservationTerm(stub, labels, options, bank_options)
        for bank in (term.bank, term.frozen_bank):
            bank.rows.copy_(filled)
        instance = MemoryBank(images, D, 0.9, dtype=dtype)
        instance.rows.copy_(filled)
        ias = bank_instance_loss(u, instance.sample(index), instance.rows, TAU).mean()
        run = _contrast_of(term, (v, t), labels[index], index)
        ips = run()
        values = (float(ias), ips)
        reference = reference or values
        ((seconds[dtype], _),) = in_turns([run], repeats)
        changes = [f"{x:.5f} ({x - r:+.1e})" for x, r in zip(values, reference, strict=True)]
        lines.append(f"{dtype}: L_IAS {changes[0]}, L_IPS {changes[1]}, {seconds[dtype]:.3g} s")
    return seconds["fp32"], seconds["bf16"], lines


def _contrast_of(
    term: PreservationTerm, embeddings: tuple[Tensor, Tensor], labels: Tensor, index: Tensor
) -> Callable[[], float]:
    def run() -> float:
        v, t = (e.clone().requires_grad_() for e in embeddings)
        loss = term.contrast(v, t, labels, index, 0)
        loss.backward()
        return float(loss.detach())

    return run


def in_turns(
    functions: list[Callable[[], Any]], repeats: int, ours_times: int = 1
) -> list[tuple[float, float]]:
    """Return (fastest, median) seconds of each function, run in turns; the last more often."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, values in zip(functions, seconds, strict=True):
            for _ in range(ours_times if values is seconds[-1] else 1):
                started = time.perf_counter()
                function()
                values.append(time.perf_counter() - started)
    return [(min(values), statistics.median(values)) for values in seconds]


def peak_extra_bytes(function: Callable[[], Any]) -> float:
    """Return how far a call raises the process's resident memory (Linux; NaN elsewhere)."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return math.nan

    def field(name: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, so that its reuse is seen
    before = field("VmRSS:")
    reset.write_text("5")  # the peak begins anew
    function()
    return float(field("VmHWM:") - before)


def _unit(count: int) -> Tensor:
    rows = torch.randn(count, D)
    return rows.div_(rows.norm(dim=1, keepdim=True))
