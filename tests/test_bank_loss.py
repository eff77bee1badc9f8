"""The chunked losses against the plain formulas: values, gradients, any chunk size and dtype.

B images, N bank rows, K negatives, E embedding.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain import bank_loss, losses, negatives
from pretrain.bank_loss import instance_loss, preservation_losses, times_transposed
from pretrain.negatives import Drawer, Negatives
from pretrain.recipe import CTCConfig

B, N, E, TAU = 9, 70, 8, 0.2
LABELS = torch.arange(N) % 5


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape).double(), dim=-1)


@pytest.fixture(params=[1, 16, 4096], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Whatever the chunks, the results are the same."""
    monkeypatch.setattr(bank_loss, "ALL_ROWS_CHUNK", request.param)
    monkeypatch.setattr(bank_loss, "DRAWN_ROWS_CHUNK", request.param)
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


DRAWERS = {
    "per_sample": {"num_negatives": 8},  # K, of a pool of 32
    "shared": {"num_negatives": 20, "negatives": "shared"},
    "replaced": {"num_negatives": 90},
    "all": {"num_negatives": 0},
    "wide": {"num_negatives": 20, "pool": 70},
}


def drawn(batch: dict[str, Tensor], how: str = "wide") -> Negatives:
    drawer = Drawer(CTCConfig(**DRAWERS[how]), LABELS, seed=1)
    return drawer.draw(3, batch["labels"], LABELS.to(torch.int32))


def problem(batch: dict[str, Tensor], chosen: Negatives, tau2: float = TAU) -> tuple:
    banks = (batch["bank_t"], batch["bank_v"])
    own = (banks[0][batch["index"]], banks[1][batch["index"]])
    return (batch["v"], batch["t"]), own, banks, chosen, N, tau2


def plain(
    batch: dict[str, Tensor], chosen: Negatives, log_z: Tensor | None, tau2: float = TAU
) -> Tensor:
    listed = chosen.listed()
    contrasted = torch.cat([batch["index"][:, None], listed], dim=1)
    values = []
    for number, (e, rows) in enumerate([("v", "bank_t"), ("t", "bank_v")]):
        how = {"estimator": "infonce"} if log_z is None else {"log_z": log_z[number]}
        values.append(
            losses.preservation_loss(
                batch[e], batch[rows], contrasted, tau2, share=listed.shape[1] / N, **how
            )
        )
    return torch.stack(values)


def gradients(batch: dict[str, Tensor], value: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)
    return torch.autograd.grad((value * weights).sum(), (batch["v"], batch["t"]))


def narrow(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: x.float() if x.is_floating_point() else x for k, x in batch.items()}


LOG_Z = torch.tensor([5.0, 6.5]).double()


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("log_z", [LOG_Z, None], ids=["nce", "infonce"])
@pytest.mark.parametrize("how", DRAWERS)
def test_losses_and_gradients_are_those_of_the_listed_negatives(
    batch: dict[str, Tensor],
    how: str,
    log_z: Tensor | None,
    on_host: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also as on a GPU, where every chunk meets every image."""
    if not on_host:
        monkeypatch.setattr(negatives, "ON_HOST", ())
    chosen = drawn(batch, how)
    quick = torch.stack(preservation_losses(*problem(batch, chosen), log_z))
    slow = plain(batch, chosen, log_z)
    torch.testing.assert_close(quick, slow)
    for ours, theirs in zip(gradients(batch, quick), gradients(batch, slow), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("labels", [LABELS, (LABELS == 3).long(), (torch.arange(N) == 7).long()])
@pytest.mark.parametrize("images", [1, N])
def test_batches_of_one_image_and_of_all_on_uneven_classes(images: int, labels: Tensor) -> None:
    """Of two classes, one may be a single image, against which 60 negatives are drawn again."""
    torch.manual_seed(1)
    index = torch.randperm(N)[:images]
    batch = {key: unit(images, E).requires_grad_() for key in ("v", "t")}
    batch |= {key: unit(N, E) for key in ("bank_v", "bank_t")} | {"index": index}
    for k in (1, 12, 60):
        drawer = Drawer(CTCConfig(num_negatives=k), labels, seed=2)
        chosen = drawer.draw(0, labels[index], labels.to(torch.int32))
        assert chosen.count.tolist() == [k] * images
        assert (labels[chosen.listed()] != labels[index, None]).all()
        quick = torch.stack(preservation_losses(*problem(batch, chosen), LOG_Z))
        torch.testing.assert_close(quick, plain(batch, chosen, LOG_Z))


def test_first_z_is_the_mean_over_positives_and_negatives(batch: dict[str, Tensor]) -> None:
    chosen = drawn(batch)
    embeddings, _, banks, *_ = problem(batch, chosen)
    log_z = bank_loss.first_log_z(*problem(batch, chosen))
    contrasted = torch.cat([batch["index"][:, None], chosen.listed()], dim=1)
    for value, embedding, rows in zip(log_z, embeddings, banks, strict=True):
        similarity = losses.contrast_similarity(embedding, rows, contrasted) / TAU
        assert float(value) == pytest.approx(math.log(N * float(similarity.detach().exp().mean())))


@pytest.mark.parametrize("log_z", [LOG_Z, None], ids=["nce", "infonce"])
@pytest.mark.parametrize("tau2", [1e-3, 0.049, 0.083, 0.084, 1e6])
def test_extreme_temperatures_neither_overflow_nor_lose_precision(
    batch: dict[str, Tensor], tau2: float, log_z: Tensor | None
) -> None:
    """On both sides of the temperature below which the odds are capped."""
    batch["bank_t"] *= math.sqrt(3)  # the longest rows that there are
    chosen, single = drawn(batch), narrow(batch)
    values = torch.stack(preservation_losses(*problem(single, chosen, tau2), log_z))
    slow = plain(batch, chosen, log_z, tau2)
    torch.testing.assert_close(values.double(), slow, rtol=1e-5, atol=1e-3)
    for ours, theirs in zip(gradients(single, values), gradients(batch, slow), strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("log_z", [LOG_Z, None], ids=["nce", "infonce"])
def test_float32_loses_nothing_that_matters(batch: dict[str, Tensor], log_z: Tensor | None) -> None:
    chosen = drawn(batch)
    exact = torch.stack(preservation_losses(*problem(batch, chosen), log_z))
    value = torch.stack(preservation_losses(*problem(narrow(batch), chosen), log_z))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


def test_rounding_does_not_add_up_over_many_small_odds() -> None:
    """Of 20,000 negatives, each far less likely than the noise."""
    torch.manual_seed(0)
    embedding, rows = unit(64, 128).float(), unit(20_000, 128).float()
    shift = torch.full((64,), 9.0)
    sums = bank_loss.Sums(embedding, 0.1, shift)
    for part in rows.split(4096):
        sums.add(part)
    similar = embedding.double() @ rows.double().T / 0.1
    exact = F.softplus(similar - 9.0).sum(dim=1)
    torch.testing.assert_close(sums.nce()[0].double().mean(), exact.mean(), rtol=3e-7, atol=0)


def test_instance_loss_equals_the_materialised_one(batch: dict[str, Tensor]) -> None:
    u, rows, index = batch["v"], batch["bank_v"] * 1.3, batch["index"]
    quick = instance_loss(u, rows[index], rows, TAU)
    slow = losses.instance_loss(u, rows, index, TAU)
    torch.testing.assert_close(quick, slow)
    weights = torch.linspace(-1, 2, B).double()
    (ours,) = torch.autograd.grad((quick * weights).sum(), u)
    (theirs,) = torch.autograd.grad((slow * weights).sum(), u)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tau1", [1 / 3000, 1e6])
def test_instance_loss_survives_logits_far_beyond_exp(
    batch: dict[str, Tensor], tau1: float
) -> None:
    u, rows, index = batch["v"], batch["bank_v"], batch["index"]
    single = u.detach().float().requires_grad_()
    quick = instance_loss(single, rows[index].float(), rows.float(), tau1)
    slow = losses.instance_loss(u, rows, index, tau1)
    torch.testing.assert_close(quick.double(), slow, rtol=1e-5, atol=1e-3)
    (ours,) = torch.autograd.grad(quick.sum() * tau1, single)
    (theirs,) = torch.autograd.grad(slow.sum() * tau1, u)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_cost_only_their_own_rounding(
    batch: dict[str, Tensor], dtype: torch.dtype
) -> None:
    u, rows, index = batch["v"].detach().float(), batch["bank_v"].to(dtype), batch["index"]
    quick = instance_loss(u, rows[index].float(), rows, TAU)
    torch.testing.assert_close(quick, losses.instance_loss(u, rows.float(), index, TAU))
    rounded, chosen = narrow(batch), drawn(batch)
    rounded |= {key: batch[key].to(dtype) for key in ("bank_v", "bank_t")}
    wide = rounded | {key: rounded[key].float() for key in ("bank_v", "bank_t")}
    own = problem(wide, chosen)[1]
    embeddings, _, banks, *rest = problem(rounded, chosen)
    quick = torch.stack(preservation_losses(embeddings, own, banks, *rest, LOG_Z))
    torch.testing.assert_close(quick, plain(wide, chosen, LOG_Z.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 300, 128), (0, 4, 3), (5, 0, 3)])
def test_the_fast_matrix_product_is_the_plain_one(shape: tuple[int, int, int]) -> None:
    rows, columns, inner = shape
    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    torch.testing.assert_close(times_transposed(left, right), left @ right.T, rtol=1e-5, atol=1e-5)
    turned = torch.randn(inner, columns).T  # not contiguous
    torch.testing.assert_close(
        times_transposed(left, turned), left @ turned.T, rtol=1e-5, atol=1e-5
    )
