"""The fast kernels against the plain formulas: values, gradients, any chunk size and dtype.

B images, N bank rows, K negatives, E embedding.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain import attention, contrast, losses
from pretrain.attention import attend, bank_instance_loss
from pretrain.contrast import Settings, contrast_losses, first_log_z
from pretrain.negatives import Drawer, Windows, make_drawer

B, N, E, TAU = 9, 70, 8, 0.2
LABELS = torch.arange(N, dtype=torch.int32) % 5


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape).double(), dim=-1)


@pytest.fixture(params=[1, 16, 4096], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Whatever the chunks, the results are the same."""
    monkeypatch.setattr(attention, "CHUNK", request.param)
    monkeypatch.setattr(contrast, "CHUNK", request.param)
    return int(request.param)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    index = torch.randperm(N)[:B]
    return {
        "v": unit(B, E).requires_grad_(),
        "t": unit(B, E).requires_grad_(),
        "bank_v": unit(N, E),
        "bank_t": unit(N, E),
        "index": index,
        "labels": LABELS[index],
    }


def windows_of(batch: dict[str, Tensor], drawer: Drawer) -> list[Windows]:
    return drawer.draw(3, batch["index"], batch["labels"], LABELS)


def fast(
    batch: dict[str, Tensor], windows: list[Windows], settings: Settings, log_z: Tensor
) -> Tensor:
    banks = (batch["bank_t"], batch["bank_v"])
    own = (banks[0][batch["index"]], banks[1][batch["index"]])
    embeddings = (batch["v"], batch["t"])
    first, second, _ = contrast_losses(embeddings, own, banks, windows, settings, log_z)
    return torch.stack([first, second])


def plain(
    batch: dict[str, Tensor], windows: list[Windows], estimator: str, log_z: Tensor
) -> Tensor:
    listed = torch.cat([part.listed() for part in windows], dim=1)
    contrasted = torch.cat([batch["index"][:, None], listed], dim=1)
    share = listed.shape[1] / N
    pairs = ((batch["v"], batch["bank_t"], log_z[0]), (batch["t"], batch["bank_v"], log_z[1]))
    return torch.stack(
        [
            losses.preservation_loss(
                embedding, rows, contrasted, TAU, estimator=estimator, log_z=z, share=share
            )
            for embedding, rows, z in pairs
        ]
    )


def gradients(batch: dict[str, Tensor], value: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)
    return torch.autograd.grad((value * weights).sum(), (batch["v"], batch["t"]))


DRAWERS = {
    "per_sample": make_drawer(1, 20, LABELS),
    "shared": make_drawer(1, 20, LABELS, shared=True),
    "replaced": make_drawer(1, 90, LABELS),
    "all": make_drawer(1, 0, LABELS),
    "strata": make_drawer(1, 20, LABELS, strata=3),
}


@pytest.mark.parametrize("estimator", losses.ESTIMATORS)
@pytest.mark.parametrize("drawer", DRAWERS)
def test_windows_give_the_loss_and_gradient_of_the_listed_negatives(
    batch: dict[str, Tensor], estimator: str, drawer: str
) -> None:
    windows, log_z = windows_of(batch, DRAWERS[drawer]), torch.tensor([5.0, 6.5]).double()
    quick = fast(batch, windows, Settings(TAU, N, estimator), log_z)
    slow = plain(batch, windows, estimator, log_z)
    torch.testing.assert_close(quick, slow)
    for ours, theirs in zip(gradients(batch, quick), gradients(batch, slow), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_first_z_is_the_mean_over_positives_and_negatives(batch: dict[str, Tensor]) -> None:
    windows = windows_of(batch, DRAWERS["per_sample"])
    banks = (batch["bank_t"], batch["bank_v"])
    own = (banks[0][batch["index"]], banks[1][batch["index"]])
    embeddings = (batch["v"], batch["t"])
    log_z = first_log_z(embeddings, own, banks, windows, Settings(TAU, N))
    contrasted = torch.cat([batch["index"][:, None], windows[0].listed()], dim=1)
    for value, embedding, rows in zip(log_z, embeddings, banks, strict=True):
        similarity = losses.contrast_similarity(embedding, rows, contrasted) / TAU
        assert float(value) == pytest.approx(math.log(N * float(similarity.detach().exp().mean())))
    tracked = Settings(TAU, N, track_z=True)
    again = contrast_losses(embeddings, own, banks, windows, tracked, torch.tensor([1.0, 2.0]))[2]
    torch.testing.assert_close(again.double(), log_z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.001, 0.049, 0.05, 0.079, 0.08])
def test_very_low_temperatures_do_not_overflow(
    batch: dict[str, Tensor], temperature: float
) -> None:
    """Whichever of the three kernels the temperature calls for."""
    narrow = {k: x.float() if x.is_floating_point() else x for k, x in batch.items()}
    windows, log_z = windows_of(batch, DRAWERS["per_sample"]), torch.tensor([3.0, 2.0])
    tracked = Settings(temperature, N, track_z=True)
    banks = (narrow["bank_t"], narrow["bank_v"])
    own = (banks[0][batch["index"]], banks[1][batch["index"]])
    embeddings = (narrow["v"], narrow["t"])
    *values, z = contrast_losses(embeddings, own, banks, windows, tracked, log_z)
    torch.testing.assert_close(z, first_log_z(embeddings, own, banks, windows, tracked))
    contrasted = torch.cat([batch["index"][:, None], windows[0].listed()], dim=1)
    for value, embedding, rows, one_z in zip(values, embeddings, banks, log_z, strict=True):
        plain = losses.preservation_loss(
            embedding.double(), rows.double(), contrasted, temperature, log_z=one_z, share=20 / N
        )
        torch.testing.assert_close(value.double(), plain, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("estimator", losses.ESTIMATORS)
def test_float32_loses_nothing_that_matters(batch: dict[str, Tensor], estimator: str) -> None:
    windows, log_z = windows_of(batch, DRAWERS["per_sample"]), torch.tensor([5.0, 6.5]).double()
    exact = fast(batch, windows, Settings(TAU, N, estimator), log_z)
    narrow = {k: x.float() if x.is_floating_point() else x for k, x in batch.items()}
    value = fast(narrow, windows, Settings(TAU, N, estimator), log_z)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


def test_instance_loss_equals_the_materialised_one(batch: dict[str, Tensor]) -> None:
    u, rows, index = batch["v"], batch["bank_v"] * 1.3, batch["index"]
    quick = bank_instance_loss(u, rows[index], rows, TAU)
    slow = losses.instance_loss(u, rows, index, TAU)
    torch.testing.assert_close(quick, slow)
    weights = torch.linspace(-1, 2, B).double()
    (ours,) = torch.autograd.grad((quick * weights).sum(), u)
    (theirs,) = torch.autograd.grad((slow * weights).sum(), u)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("heads", [1, 3])
def test_the_fused_kernel_equals_the_chunks(
    batch: dict[str, Tensor], heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "HEADS", heads)
    queries, rows = batch["v"].detach(), unit(64 * 3 + 5, E)  # 5 rows do not divide by 3
    ours, theirs = (attend(queries, rows, 5.0, kernel) for kernel in ("chunks", "fused"))
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])


def test_attention_survives_logits_far_beyond_exp(batch: dict[str, Tensor]) -> None:
    queries, rows = batch["v"].detach().float(), batch["bank_v"].float()
    lse, mean = attend(queries, rows, 3000.0)
    logits = queries.double() @ rows.double().T * 3000.0
    torch.testing.assert_close(lse.double(), torch.logsumexp(logits, dim=1), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        mean.double(), torch.softmax(logits, dim=1) @ rows.double(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_cost_only_their_own_rounding(
    batch: dict[str, Tensor], dtype: torch.dtype
) -> None:
    u, rows, index = batch["v"].detach().float(), batch["bank_v"].to(dtype), batch["index"]
    quick = bank_instance_loss(u, rows[index].float(), rows, TAU)
    torch.testing.assert_close(quick, losses.instance_loss(u, rows.float(), index, TAU))
