"""CTC's losses against plain ways of computing them: time, memory, and that the values agree.

Shapes: B images, N bank rows, K negatives, D embedding.

Every pair is measured in turns, baseline and ours, and the fastest of each counts, so that a busy
machine slows both alike.
"""

import ctypes
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import amp
from models.resnet import create_model
from pretrain import losses
from pretrain.bank_loss import instance_loss
from pretrain.objectives import CTC, InstanceTerm, PreservationTerm
from pretrain.recipe import CTCConfig, StageConfig
from training.loop import Hooks, LoopConfig, Trainer

B, D, TAU, CLASSES = 64, 128, 0.1, 100
IMAGES, NEGATIVES = 50_000, 16_384  # N and K of stage 2: CIFAR-100's
Measured = tuple[float, float, list[str]]


def stage2(images: int = IMAGES, negatives: int = NEGATIVES, repeats: int = 9) -> Measured:
    """Forward, backward and bank update of L_IPS; negatives of each image's own."""
    return _stage2("per_sample", images, negatives, repeats)


def stage2_shared(images: int = IMAGES, negatives: int = NEGATIVES, repeats: int = 9) -> Measured:
    """The same with negatives that the batch shares; the baseline still gathers per image."""
    return _stage2("shared", images, negatives, repeats)


def _stage2(mode: str, images: int, negatives: int, repeats: int) -> Measured:
    """Baseline: each image's K + 1 rows gathered from both banks, as the released code does."""
    batch = Batch(CTCConfig(tau2=TAU, num_negatives=negatives, negatives=mode), images)
    listed = batch.term.draw(batch.labels, 0).listed()
    contrasted = torch.cat([batch.index[:, None], listed], dim=1)  # B×(K+1)
    batch.step()  # fixes Z
    ways = {
        "gathered": lambda: batch.step(plain_loss(batch.term, contrasted)),
        "B×N product": lambda: batch.step(plain_loss(batch.term, contrasted, multiply_all)),
        "ours": batch.step,
    }
    before = [bank.storage.clone() for bank in batch.banks]
    in_float64 = plain_loss(batch.term, contrasted, multiply_all)
    exact = float(in_float64(batch.v.double(), batch.t.double(), batch.labels, batch.index, 0))
    errors = []
    for name, way in ways.items():
        errors.append(f"{name} {abs(way() / exact - 1):.1e}")
        for bank, rows in zip(batch.banks, before, strict=True):  # undo the update
            bank.storage.copy_(rows)
    baseline, product, ours = in_turns(list(ways.values()), repeats, ours_times=3)
    lines = [
        f"L_IPS, nce, N {images}, K {negatives}, B {B}, D {D}, {mode} negatives, {threads()}",
        "baseline: rows gathered per image; its negatives are given, ours are drawn in the step",
        f"loss {exact:.6f} in float64; relative error in float32: {', '.join(errors)}",
        f"B×N product and a gather of its entries: {product:.3g} s, {baseline / product:.1f}×",
    ]
    return baseline, ours, lines


class Batch:
    """A stage-2 term with a batch of random embeddings."""

    def __init__(self, config: CTCConfig, images: int) -> None:
        torch.manual_seed(0)
        labels = torch.arange(images) % CLASSES
        stub: Any = nn.Linear(1, 1)
        stub.head_hidden_size = 1
        self.term = PreservationTerm(stub, labels, config)
        self.banks = (self.term.frozen_bank, self.term.bank)  # that v and t are contrasted with
        self.index = torch.randperm(images)[:B]
        self.labels = labels[self.index]
        self.v, self.t = unit(B), unit(B)

    def step(self, loss: Callable[..., Tensor] | None = None) -> float:
        """Do forward, backward and bank update of the term's or another loss; return its value."""
        v, t = self.v.clone().requires_grad_(), self.t.clone().requires_grad_()
        value = (loss or self.term.loss)(v, t, self.labels, self.index, 0)
        value.backward()
        self.term.update()
        return float(value.detach())


def gather_rows(embedding: Tensor, rows: Tensor, contrasted: Tensor) -> Tensor:
    """Gather B×(K+1) rows of D numbers, multiply each image with its own."""
    gathered = rows.index_select(0, contrasted.flatten()).view(B, -1, D)
    return torch.bmm(gathered, embedding[:, :, None])[:, :, 0]


def multiply_all(embedding: Tensor, rows: Tensor, contrasted: Tensor) -> Tensor:
    """Multiply with all rows, gather B×(K+1) numbers."""
    return (embedding @ rows.T).gather(1, contrasted)


def plain_loss(
    term: PreservationTerm, contrasted: Tensor, similarities: Any = gather_rows
) -> Callable[..., Tensor]:
    """Return a stand-in for ``term.loss`` in the released code's form, on given negatives."""

    def loss(v: Tensor, t: Tensor, labels: Tensor, index: Tensor, step: int) -> Tensor:
        share, total = (contrasted.shape[1] - 1) / term.images, torch.zeros(())
        banks = (term.frozen_bank, term.bank)
        for embedding, bank, z in zip((v, t), banks, term.log_z.to(v.dtype).exp(), strict=True):
            p = (similarities(embedding, bank.rows.to(v.dtype), contrasted) / TAU).exp() / z
            total = total - torch.log(p[:, 0] / (p[:, 0] + share + 1e-7)).mean()
            total = total - torch.log(share / (p[:, 1:] + share + 1e-7)).sum(dim=1).mean()
        term.seen = (index, v.detach(), t.detach())
        return total

    return loss


def stage1(images: int = 400_000, repeats: int = 5) -> Measured:
    """L_IAS and its gradient; baseline: B×N logits and autograd."""
    torch.manual_seed(0)
    rows, embedding, index = unit(images), unit(B), torch.randint(images, (B,))

    def run(loss: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        u = embedding.clone().requires_grad_()
        value = loss(u).mean()
        return float(value.detach()), torch.autograd.grad(value, u)[0]

    def ours() -> tuple[float, Tensor]:
        return run(lambda u: instance_loss(u, rows[index], rows, TAU))

    def materialised() -> tuple[float, Tensor]:
        return run(lambda u: losses.instance_loss(u, rows, index, TAU))

    instance_loss(embedding, rows[:B], rows[:1000], TAU)  # warms the libraries up
    our_peak, base_peak = peak_extra_bytes(ours), peak_extra_bytes(materialised)
    (value, gradient), (expected, expected_gradient) = ours(), materialised()
    error = float((gradient - expected_gradient).norm() / expected_gradient.norm())
    baseline, best = in_turns([materialised, ours], repeats, ours_times=2)
    lines = [
        f"L_IAS, N {images}, B {B}, D {D}, {threads()}",
        f"loss {value:.6f}, materialised {expected:.6f}; gradient differs by {error:.1e}",
        f"peak extra memory: baseline {base_peak / 2**20:.0f} MiB, ours {our_peak / 2**20:.1f} MiB "
        f"({100 * our_peak / max(base_peak, 1):.1f}%)",
    ]
    return baseline, best, lines


def stage1_imagenet() -> Measured:
    """``stage1`` with ImageNet's 1,281,167 images."""
    return stage1(1_281_167, 3)


def whole_step(images: int = IMAGES, repeats: int = 5) -> Measured:
    """A training step of stage 2: ResNet-18 with the CIFAR stem, the loop's own code.

    Baseline: the same step, whose L_IPS gathers rows per image. Both in the precision and memory
    format that the loop chooses on this machine.
    """
    precision = amp.resolve("auto", torch.device("cpu"))
    step, term = _step_of(images, precision)
    in_float32, _ = _step_of(images, "none", channels_last=False)
    step()  # fixes Z
    in_float32()
    kernel, named = term.loss, torch.randint(images, (B, NEGATIVES + 1))

    def baseline() -> None:
        term.loss = plain_loss(term, named)
        step()
        term.loss = kernel

    baseline()
    slow, fast, float32 = in_turns([baseline, step, in_float32], repeats)
    lines = [
        f"ResNet-18 (CIFAR stem), B {B} at 32 px, N {images}, K {NEGATIVES}, {precision}, "
        f"channels_last, {threads()}",
        f"our step in float32, without channels_last: {float32:.3g} s, {float32 / fast:.1f}×",
    ]
    return slow, fast, lines


def _step_of(
    images: int, precision: str, channels_last: bool = True
) -> tuple[Callable[[], Any], Any]:
    """Return a stage-2 step of the training loop, and its L_IPS."""
    torch.manual_seed(0)
    labels = torch.arange(images) % CLASSES
    short = StageConfig(1, 0.005, 5e-4)
    objective = CTC(create_model("resnet18_cifar", CLASSES), labels, CTCConfig(short, short))
    config = LoopConfig(amp=precision, channels_last=channels_last)
    trainer = Trainer(objective, config, Path(), 0, torch.device("cpu"))
    position = trainer.begin(Hooks())
    position.epoch = 1
    trainer.enter(position, Hooks(batches=lambda: iter(())))
    batch, index = torch.randn(B, 3, 32, 32), torch.randperm(images)[:B]
    return lambda: trainer.step(batch, labels[index], index, 0.005, position), objective.term


def bank_dtype(images: int = IMAGES, repeats: int = 5) -> Measured:
    """L_IAS and L_IPS with the bank in bf16 and fp16: the change of the loss, and of the time.

    The ratio is float32's time for L_IPS over bf16's.
    """
    lines = [f"N {images}, K {NEGATIVES}, B {B}, D {D}; loss, its change, seconds of L_IPS"]
    seconds: dict[str, float] = {}
    reference: list[float] = []
    for dtype in ("fp32", "bf16", "fp16"):
        batch = Batch(CTCConfig(bank_dtype=dtype), images)
        instance, filled = InstanceTerm(1, images, batch.term.config), unit(images)
        for bank in (*batch.banks, instance.bank):
            bank.rows.copy_(filled)
        values = [float(instance.loss(batch.v, batch.index)), batch.step()]
        reference = reference or values
        (seconds[dtype],) = in_turns([batch.step], repeats)
        changes = [f"{x:.5f} ({x - r:+.1e})" for x, r in zip(values, reference, strict=True)]
        lines.append(f"{dtype}: L_IAS {changes[0]}, L_IPS {changes[1]}, {seconds[dtype]:.3g} s")
    return seconds["fp32"], seconds["bf16"], lines


def in_turns(functions: list[Callable[[], Any]], repeats: int, ours_times: int = 1) -> list[float]:
    """Return the fastest seconds of each function, run in turns; the last more often."""
    fastest = [math.inf] * len(functions)
    for _ in range(repeats):
        for number, function in enumerate(functions):
            for _ in range(ours_times if number == len(functions) - 1 else 1):
                started = time.perf_counter()
                function()
                fastest[number] = min(fastest[number], time.perf_counter() - started)
    return fastest


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


def threads() -> str:
    """Return how many threads torch computes with."""
    return f"{torch.get_num_threads()} threads"


def unit(count: int) -> Tensor:
    """Return random rows of length 1, count×D."""
    rows = torch.randn(count, D)
    return rows.div_(rows.norm(dim=1, keepdim=True))
