"""The loss formulas against the released code's numbers and against loops written out.

B images, N bank rows, K negatives, D features, E embedding.
"""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain import losses
from pretrain.memory import MemoryBank
from pretrain.negatives import Negatives
from pretrain.objectives import InstanceTerm, PreservationTerm
from pretrain.recipe import CTCConfig

DATA = Path(__file__).parent / "data"


@pytest.fixture
def golden_folder() -> Path | None:
    """Where the vectors lie that the repository does not hold."""
    root = Path(__file__).resolve().parent.parent.parent
    data = Path(os.environ.get("TRANSFER_SUITE_DATA", root / "shared" / "data"))
    folder = data.parent / "golden"
    return folder if folder.is_dir() else None


def vectors(path: Path) -> dict[str, Tensor]:
    """Return a file of golden vectors; temperature and momentum as the float32 they were there."""
    with np.load(path) as file:
        read = {key: torch.from_numpy(np.array(file[key])) for key in file}
    for key in ("temperature", "momentum"):
        read[key] = read[key].float().double()
    return read


def golden(folder: Path | None, name: str) -> dict[str, Tensor]:
    if (DATA / name).exists():
        return vectors(DATA / name)
    if folder is None:
        pytest.skip(f"{name} is held outside the repository, and not found")
    return vectors(folder / name)


def embed(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.normalize(features @ weight.T + bias, dim=1)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def bank_of(rows: Tensor, momentum: float) -> MemoryBank:
    bank = MemoryBank(*rows.shape, momentum, dtype="fp64")
    bank.rows.copy_(rows)
    return bank


def close(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value.double(), expected.reshape(value.shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ias_a.npz", "ias_b.npz"])
def test_instance_loss_gradients_and_bank_equal_the_released_code(
    name: str, golden_folder: Path | None
) -> None:
    g = golden(golden_folder, name)
    bank = bank_of(g["memory_before"], float(g["momentum"]))
    for call in ("1", "2"):
        f, w, b = leaf(g["feat"]), leaf(g["weight"]), leaf(g["bias"])
        u = embed(f, w, b)
        loss = losses.instance_loss(u, bank.rows, g["index"], float(g["temperature"])).mean()
        loss.backward()
        bank.update(g["index"], u)
        close(loss, g[f"loss_{call}"])
        for gradient, key in ((f.grad, "feat"), (w.grad, "weight"), (b.grad, "bias")):
            close(gradient, g[f"grad_{key}_{call}"])
        close(bank.rows, g[f"memory_after_{call}"])


@pytest.mark.parametrize("name", ["ips_a.npz", "ips_b.npz"])
def test_preservation_loss_gradients_z_and_banks_equal_the_released_code(
    name: str, golden_folder: Path | None
) -> None:
    g = golden(golden_folder, name)
    n, tau, momentum = int(g["n_data"]), float(g["temperature"]), float(g["momentum"])
    student_bank = bank_of(g["memory_student_before"], momentum)
    frozen_bank = bank_of(g["memory_bank_before"], momentum)
    log_z: list[Tensor] = []
    for call in ("1", "2"):
        leaves = [
            leaf(g[key])
            for key in (
                "student_feat",
                "student_weight",
                "student_bias",
                "bank_weight",
                "bank_bias",
            )
        ]
        f, ws, bs, wt, bt = leaves
        v, t = embed(f, ws, bs), embed(g["bank_feat"], wt, bt)
        directions = [(v, frozen_bank.rows), (t, student_bank.rows)]
        if not log_z:
            for embedding, rows in directions:
                similar = losses.contrast_similarity(embedding, rows, g["contrast_index"]) / tau
                log_z.append((losses.log_mean_exp(similar) + math.log(n)).detach())
        loss = torch.zeros((), dtype=torch.float64)
        for (embedding, rows), z in zip(directions, log_z, strict=True):
            share = int(g["num_negatives"]) / n
            loss = (
                loss
                + losses.preservation_loss(
                    embedding, rows, g["contrast_index"], tau, log_z=z, share=share
                ).mean()
            )
        loss.backward()
        student_bank.update(g["index"], v)
        frozen_bank.update(g["index"], t)
        close(loss, g[f"loss_{call}"])
        names = ("student_feat", "student_weight", "student_bias", "bank_weight", "bank_bias")
        for parameter, key in zip(leaves, names, strict=True):
            close(parameter.grad, g[f"grad_{key}_{call}"])
        close(student_bank.rows, g[f"memory_student_after_{call}"])
        close(frozen_bank.rows, g[f"memory_bank_after_{call}"])
    close(log_z[0].exp(), g["Z_bank_memory_vs_student"])
    close(log_z[1].exp(), g["Z_student_memory_vs_bank"])


def load(projection: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    projection.load_state_dict({"weight": weight, "bias": bias})


@pytest.mark.parametrize("name", ["ias_a.npz", "ias_b.npz"])
def test_the_stage_1_term_equals_the_released_code(name: str, golden_folder: Path | None) -> None:
    """The chunked loss with projection and bank, as training calls it."""
    g = golden(golden_folder, name)
    images, dim = g["memory_before"].shape
    config = CTCConfig(
        tau1=float(g["temperature"]), m1=float(g["momentum"]), dim1=dim, bank_dtype="fp64"
    )
    term = InstanceTerm(g["feat"].shape[1], images, config).double()
    load(term.projection, g["weight"], g["bias"])
    term.bank.rows.copy_(g["memory_before"])
    for call in ("1", "2"):
        f = leaf(g["feat"])
        term.zero_grad()
        loss = term(f, g["index"])
        loss.backward()
        term.update()
        close(loss, g[f"loss_{call}"])
        for gradient, key in (
            (f.grad, "feat"), (term.projection.weight.grad, "weight"),
            (term.projection.bias.grad, "bias"),
        ):  # fmt: skip
            close(gradient, g[f"grad_{key}_{call}"])
        close(term.bank.rows, g[f"memory_after_{call}"])


def negatives_of(listed: Tensor) -> Negatives:
    """Return negatives that are listed for each image, B×K: stretches laid end to end."""
    size, k = listed.shape
    position = torch.arange(size * k, dtype=torch.float32)
    start = torch.arange(size) * float(k)
    count = torch.full((size,), k)
    return Negatives(
        listed.flatten(), torch.ones(size * k), position, torch.zeros(size), start, count.float(),
        count, size * k,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["ips_a.npz", "ips_b.npz"])
def test_the_stage_2_term_equals_the_released_code(
    name: str, golden_folder: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunked loss with projections, banks and Z, as training calls it, on given negatives."""
    g = golden(golden_folder, name)
    images, dim = g["memory_student_before"].shape
    config = CTCConfig(
        tau2=float(g["temperature"]), m2=float(g["momentum"]), dim2=dim,
        num_negatives=int(g["num_negatives"]), bank_dtype="fp64",
    )  # fmt: skip
    network = nn.Linear(1, 1)
    network.head_hidden_size = g["student_feat"].shape[1]  # type: ignore[assignment]
    term = PreservationTerm(network, torch.arange(images) % 5, config).double()
    load(term.projection, g["student_weight"], g["student_bias"])
    load(term.frozen_projection, g["bank_weight"], g["bank_bias"])
    term.bank.rows.copy_(g["memory_student_before"])
    term.frozen_bank.rows.copy_(g["memory_bank_before"])
    monkeypatch.setattr(term, "frozen_features", lambda _: g["bank_feat"])
    monkeypatch.setattr(term, "draw", lambda *_: negatives_of(g["contrast_index"][:, 1:]))
    for call in ("1", "2"):
        f = leaf(g["student_feat"])
        term.zero_grad()
        loss = term(f, f, torch.zeros(len(f)), g["index"], int(call))
        loss.backward()
        term.update()
        close(loss, g[f"loss_{call}"])
        for gradient, key in (
            (f.grad, "student_feat"),
            (term.projection.weight.grad, "student_weight"),
            (term.projection.bias.grad, "student_bias"),
            (term.frozen_projection.weight.grad, "bank_weight"),
            (term.frozen_projection.bias.grad, "bank_bias"),
        ):
            close(gradient, g[f"grad_{key}_{call}"])
        close(term.bank.rows, g[f"memory_student_after_{call}"])
        close(term.frozen_bank.rows, g[f"memory_bank_after_{call}"])
    close(term.log_z[0].exp(), g["Z_bank_memory_vs_student"])
    close(term.log_z[1].exp(), g["Z_student_memory_vs_bank"])


def test_refreshed_banks_equal_the_released_code() -> None:
    g = vectors(DATA / "ips_a.npz")
    for side, name in (("student", "student"), ("bank", "bank")):
        bank = bank_of(g[f"memory_{side}_after_2"], float(g["momentum"]))
        projected = embed(g["student_feat"], g[f"{name}_weight"], g[f"{name}_bias"])
        bank.update(g["index"], projected, momentum=0.0)
        close(bank.rows, g[f"memory_{side}_refreshed"])


def test_nce_equals_the_sum_written_out() -> None:
    """−log[P⁺/(P⁺+c+ε)] − Σ log[c/(P+c+ε)], image by image and negative by negative."""
    torch.manual_seed(0)
    positive, negatives = torch.randn(3).double(), torch.randn(3, 5).double()
    z, share = 7.3, 5 / 40
    for i in range(3):
        p = math.exp(positive[i]) / z
        expected = -math.log(p / (p + share + 1e-7))
        for j in range(5):
            q = math.exp(negatives[i, j]) / z
            expected -= math.log(share / (q + share + 1e-7))
        value = losses.nce_loss(positive, negatives, math.log(z), share)[i]
        assert float(value) == pytest.approx(expected, rel=1e-12)


def test_infonce_is_the_instance_loss_when_the_negatives_are_all_other_rows() -> None:
    torch.manual_seed(0)
    u, rows = F.normalize(torch.randn(4, 8).double(), dim=1), torch.randn(6, 8).double()
    index = torch.tensor([5, 0, 2, 2])
    others = [[j for j in range(6) if j != i] for i in index.tolist()]
    contrast = torch.cat([index[:, None], torch.tensor(others)], dim=1)
    infonce = losses.preservation_loss(u, rows, contrast, 0.2, estimator="infonce")
    torch.testing.assert_close(infonce, losses.instance_loss(u, rows, index, 0.2))


def test_nce_stays_finite_where_exp_overflows() -> None:
    positive, negatives = torch.tensor([200.0]), torch.tensor([[300.0, -300.0]])
    value = losses.nce_loss(positive, negatives, 0.0, 0.5)
    assert float(value) == pytest.approx(300.0 - math.log(0.5), rel=1e-6)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="infonce"):
        losses.preservation_loss(
            torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([[0, 1]]), 0.1, estimator="nec"
        )
