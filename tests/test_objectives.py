"""The objectives: what they compute, train, keep and refuse; one process against many.

B images, N training images, K negatives.
"""

import dataclasses
import importlib
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import InputError
from pretrain import negatives as draws
from pretrain.memory import DTYPES
from pretrain.objectives import CTC, CrossEntropy, InstanceTerm, PreservationTerm
from pretrain.recipe import CEConfig, CTCConfig, StageConfig
from training.schedule import learning_rate

sys.path.insert(0, str(Path(__file__).parent))
toy: Any = importlib.import_module("ctc_on_ranks")

IMAGES, LABELS = toy.data()
INDEX = torch.tensor([3, 17, 8, 30, 21])


def small(**changes: Any) -> CTCConfig:
    return dataclasses.replace(toy.SMALL, **changes)


def at_stage(number: int, config: CTCConfig = toy.SMALL) -> CTC:
    """Return a CTC objective in float64 with a stage begun."""
    objective = toy.build(config)
    assert isinstance(objective, CTC)
    for stage in range(number + 1):
        objective.enter_stage(stage)
        objective.start_stage(stage, no_batches)
    return objective.train()


def no_batches() -> Iterator[Any]:
    return iter(())


def forward(objective: Any, index: Tensor = INDEX, step: int = 0) -> dict[str, Tensor]:
    objective.set_step(step)
    return objective(IMAGES[index], LABELS[index], index)


def features(network: Any) -> Tensor:
    with torch.no_grad():
        return network.forward_head(network.forward_features(IMAGES[INDEX]), pre_logits=True)


def embedding(projection: torch.nn.Linear, pooled: Tensor) -> list[list[float]]:
    """W f + b over its length, number by number."""
    rows = []
    for f in pooled.tolist():
        weights, biases = projection.weight.tolist(), projection.bias.tolist()
        row = [
            b + sum(x * y for x, y in zip(w, f, strict=True))
            for w, b in zip(weights, biases, strict=True)
        ]
        length = math.sqrt(sum(x * x for x in row))
        rows.append([x / length for x in row])
    return rows


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_stage_one_equals_a_loop_over_images_and_rows() -> None:
    objective = at_stage(0)
    term = objective.term
    assert isinstance(term, InstanceTerm)
    bank = term.bank.rows.tolist()
    expected = 0.0
    for i, u in zip(INDEX.tolist(), embedding(term.projection, features(objective.model))):
        scores = [math.exp(dot(u, row) / 0.2) for row in bank]
        expected -= math.log(scores[i] / sum(scores)) / len(INDEX)
    losses = forward(objective)
    assert float(losses["loss_ias"].detach()) == pytest.approx(0.5 * expected, rel=1e-9)
    logits = objective.model(IMAGES[INDEX])
    plain = torch.nn.functional.cross_entropy(logits, LABELS[INDEX])
    torch.testing.assert_close(losses["loss_ce"], plain)


STAGE_TWO: list[dict[str, Any]] = [
    {},
    {"estimator": "infonce"},
    {"negatives": "shared"},
    {"negatives": "shared", "estimator": "infonce"},
    {"num_negatives": 30},  # as many as there are
    {"num_negatives": 60},  # more than there are: with replacement
    {"num_negatives": 0},
    {"num_negatives": 0, "estimator": "infonce"},
    {"pool": 20},
]


def contrast_by_hand(scores: list[list[float]], z: float, estimator: str) -> float:
    """ℓ of exp(·/τ) of [positive, negatives…] per image, averaged, term by term."""
    total = 0.0
    for positive, *others in scores:
        share = len(others) / toy.N
        if estimator == "infonce":
            total -= math.log(positive / (positive + sum(others)))
            continue
        p = positive / z
        total -= math.log(p / (p + share + 1e-7))
        for other in others:
            total -= math.log(share / (other / z + share + 1e-7))
    return total / len(scores)


@pytest.mark.parametrize("changes", STAGE_TWO, ids=lambda changes: str(changes or "released"))
def test_stage_two_equals_a_loop_over_images_and_negatives(changes: dict[str, Any]) -> None:
    """Three times in a row: the first batch fixes Z, the others use it with the banks as moved."""
    config = small(**changes)
    objective = at_stage(1, config)
    term = objective.term
    assert isinstance(term, PreservationTerm)
    z = [0.0, 0.0]
    for step in (0, 1, 2):
        negatives = term.draw(LABELS[INDEX], step).listed()
        assert (LABELS[negatives] != LABELS[INDEX, None]).all()
        assert negatives.shape == (len(INDEX), config.num_negatives or 30)
        if config.num_negatives <= 30:
            assert all(len(set(row)) == len(row) for row in negatives.tolist())
        if config.negatives == "shared":
            same = LABELS[INDEX] == LABELS[INDEX[0]]
            assert len({tuple(row) for row in negatives[same].tolist()}) == 1
        v = embedding(term.projection, features(objective.model))
        t = embedding(term.frozen_projection, features(term.frozen))
        expected = 0.0
        for number, (side, bank) in enumerate(((v, term.frozen_bank), (t, term.bank))):
            rows = bank.rows.tolist()
            scores = [
                [math.exp(dot(e, rows[j]) / 0.3) for j in [i, *others]]
                for e, i, others in zip(side, INDEX.tolist(), negatives.tolist(), strict=True)
            ]
            of_batch = toy.N * sum(map(sum, scores)) / sum(map(len, scores))
            z[number] = z[number] if step else of_batch
            expected += contrast_by_hand(scores, z[number], config.estimator)
        losses = forward(objective, step=step)
        assert float(losses["loss_ips"].detach()) == pytest.approx(expected, rel=1e-9)
        objective.after_step()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_bank_of_any_dtype_gives_the_loss_of_its_rows(dtype: str, number: int) -> None:
    """The rows are rounded as they are stored; nothing else is."""
    both = []
    for rows_dtype in (dtype, "fp32"):
        objective = CTC(toy.ToyNetwork(), LABELS, small(bank_dtype=rows_dtype), seed=3)
        for stage in range(number + 1):
            objective.enter_stage(stage)
            objective.start_stage(stage, no_batches)
        both.append(objective.train())
    rounded, wide = both
    state = rounded.state_dict()
    assert {v.dtype for k, v in state.items() if k.endswith("bank.rows")} == {DTYPES[dtype]}
    wide.load_state_dict(state)
    batch = (IMAGES[INDEX].float(), LABELS[INDEX], INDEX)
    torch.testing.assert_close(rounded(*batch), wide(*batch), rtol=1e-5, atol=1e-6)


class NoHostReads(TorchDispatchMode):
    """Refuses what makes a host wait for its device: reading a value, or a size it decides."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.READS, f"{func} reads from the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", STAGE_TWO, ids=lambda changes: str(changes or "released"))
def test_on_a_device_a_step_reads_nothing_back_and_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """As on a GPU, where the host does not know which images a chunk of rows meets."""
    here = at_stage(1, small(**changes))
    for step in (0, 1):
        expected = forward(here, step=step)
        here.after_step()
    there = at_stage(1, small(**changes))
    forward(there, step=0)  # Z is known from here on
    there.after_step()
    monkeypatch.setattr(draws, "ON_HOST", ())
    with NoHostReads():
        losses = forward(there, step=1)
        sum(losses.values(), torch.zeros(())).backward()
        there.after_step()
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("changes", STAGE_TWO, ids=lambda changes: str(changes or "released"))
def test_on_a_device_no_tensor_of_a_step_is_the_hosts(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], number: int
) -> None:
    """Fake CUDA tensors need no GPU; they refuse to meet a host's, and have no value to be read."""
    monkeypatch.setattr(draws, "seeded", lambda *_: None)
    objective = CTC(toy.ToyNetwork(), LABELS, small(**changes), seed=3)
    for stage in range(number + 1):
        objective.enter_stage(stage)
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        objective.to("cuda")
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        index = INDEX.to("cuda")
        for step in (0, 1):
            objective.set_step(step)
            losses = objective(torch.zeros(5, 3, 4, 4, device="cuda"), index % 3, index)
            objective.after_step()
    assert {value.device.type for value in losses.values()} == {"cuda"}


def test_stage_one_reads_nothing_back() -> None:
    objective = at_stage(0)
    with NoHostReads():
        sum(forward(objective).values(), torch.zeros(())).backward()
        objective.after_step()


@pytest.mark.gpu
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_gpu_gives_the_losses_of_a_cpu(number: int, dtype: str) -> None:
    """On as many negatives as there are: each device draws its own."""
    losses = []
    for device in ("cpu", "cuda"):
        config = small(bank_dtype=dtype, num_negatives=0)
        objective = CTC(toy.ToyNetwork(), LABELS, config, seed=3)
        for stage in range(number + 1):
            objective.enter_stage(stage)
            objective.to(device)
            objective.start_stage(stage, no_batches)
        batch = (IMAGES[INDEX].float(), LABELS[INDEX], INDEX)
        losses.append(objective.train()(*(part.to(device) for part in batch)))
    for key, value in losses[0].items():
        torch.testing.assert_close(losses[1][key].cpu(), value, rtol=1e-4, atol=1e-4)


def test_after_a_step_the_banks_hold_what_was_seen() -> None:
    objective = at_stage(1)
    term = objective.term
    assert isinstance(term, PreservationTerm)
    before = [term.bank.rows.clone(), term.frozen_bank.rows.clone()]
    v = embedding(term.projection, features(objective.model))
    t = embedding(term.frozen_projection, features(term.frozen))
    forward(objective)
    objective.after_step()
    for bank, old, seen in zip((term.bank, term.frozen_bank), before, (v, t), strict=True):
        expected = old.clone()
        moved = 0.9 * old[INDEX] + 0.1 * torch.tensor(seen).double()
        expected[INDEX] = moved / moved.norm(dim=1, keepdim=True)
        torch.testing.assert_close(bank.rows, expected)


def test_a_bank_of_one_batch_is_no_bank() -> None:
    """With N = B and momentum 0, stage 1 contrasts the batch with itself."""
    objective = CTC(toy.ToyNetwork(), LABELS[:6], small(m1=0.0))
    objective.enter_stage(0)
    objective.double()
    index = torch.randperm(6)
    forward(objective, index)
    objective.after_step()
    losses = forward(objective, index)
    term = objective.term
    assert isinstance(term, InstanceTerm)
    pooled = objective.model.forward_features(IMAGES[index]).mean(dim=(2, 3))
    u = torch.nn.functional.normalize(term.projection(pooled), dim=1)
    plain = torch.nn.functional.cross_entropy(u @ u.T / 0.2, torch.arange(6))
    torch.testing.assert_close(losses["loss_ias"], 0.5 * plain)


def trained(objective: CTC) -> set[str]:
    return {name for name, p in objective.named_parameters() if p.requires_grad}


def test_each_stage_trains_exactly_its_own_parameters() -> None:
    network = {f"model.{name}" for name, _ in toy.ToyNetwork().named_parameters()}
    first = {"term.projection.weight", "term.projection.bias"}
    second = first | {"term.frozen_projection.weight", "term.frozen_projection.bias"}
    assert trained(at_stage(0)) == network | first
    assert trained(at_stage(0, small(train_projection=False))) == network
    assert trained(at_stage(1)) == network | second
    assert trained(at_stage(1, small(alpha=0.0))) == network | second
    for objective in (at_stage(0), at_stage(1)):
        sum(forward(objective).values(), torch.zeros(())).backward()
        given = {name for name, p in objective.named_parameters() if p.grad is not None}
        assert given == trained(objective)


@pytest.mark.parametrize("number", [0, 1])
def test_a_weight_of_zero_is_plain_cross_entropy(number: int) -> None:
    objective = at_stage(number, small(alpha=0.0, beta=0.0))
    assert trained(objective) == {f"model.{n}" for n, _ in toy.ToyNetwork().named_parameters()}
    plain = CrossEntropy(toy.ToyNetwork(), CEConfig()).double()
    assert forward(objective).keys() == {"loss_ce"}
    torch.testing.assert_close(forward(objective), forward(plain))
    assert objective.stages()[1].lr == objective.config.stage2.lr


def test_the_information_bank_stays_as_it_was_frozen() -> None:
    """A network with BatchNorm learns on; its frozen copy keeps every weight and statistic."""
    from models.resnet import create_model

    objective = CTC(create_model("resnet18_cifar_w16", toy.CLASSES), LABELS, toy.SMALL)
    images = torch.randn(4, 3, 8, 8)
    objective.enter_stage(0)
    objective.train()
    objective(images, LABELS[:4], torch.arange(4))  # moves the running statistics
    objective.enter_stage(1)
    objective.start_stage(1, no_batches)
    objective.train()
    term = objective.term
    assert isinstance(term, PreservationTerm)
    student = {k: v.clone() for k, v in objective.model.state_dict().items()}
    assert all(torch.equal(v, student[k]) for k, v in term.frozen.state_dict().items())
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], 0.1)
    sum(objective(images, LABELS[:4], torch.arange(4)).values(), torch.zeros(())).backward()
    optimizer.step()
    assert all(torch.equal(v, student[k]) for k, v in term.frozen.state_dict().items())
    assert any(not torch.equal(v, student[k]) for k, v in objective.model.state_dict().items())


def test_bank_refresh_fills_both_banks_with_projected_frozen_features() -> None:
    objective = at_stage(0, small(bank_refresh=True))
    objective.enter_stage(1)
    objective.start_stage(1, lambda: iter([(IMAGES[INDEX], LABELS[INDEX], INDEX)]))
    term = objective.term
    assert isinstance(term, PreservationTerm)
    pooled = features(objective.model)
    for projection, bank in (
        (term.projection, term.bank),
        (term.frozen_projection, term.frozen_bank),
    ):
        expected = torch.tensor(embedding(projection, pooled)).double()
        torch.testing.assert_close(bank.rows[INDEX], expected)


def test_stages_are_built_from_the_seed_alone() -> None:
    """What a resume builds has the keys and first values of what the first run built."""
    for number in (0, 1):
        fresh, later = toy.build(toy.SMALL), toy.build(toy.SMALL)
        torch.manual_seed(5)
        fresh.enter_stage(number)
        torch.manual_seed(6)
        torch.rand(3)
        before = torch.get_rng_state()
        later.enter_stage(number)
        assert torch.equal(torch.get_rng_state(), before)
        first, second = fresh.state_dict(), later.state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("changes", [{}, {"estimator": "infonce"}])
def test_the_state_dict_is_all_that_the_next_step_depends_on(changes: dict[str, Any]) -> None:
    objective = at_stage(1, small(**changes))
    forward(objective)
    objective.after_step()
    resumed = toy.build(small(**changes))
    resumed.enter_stage(1)
    resumed.load_state_dict(objective.state_dict())
    resumed.train()
    for step in (1, 2):
        other = torch.tensor([1, 2, 40])
        expected, value = forward(objective, other, step), forward(resumed, other, step)
        assert all(torch.equal(value[key], expected[key]) for key in expected)
        objective.after_step()
        resumed.after_step()


def test_under_autocast_the_losses_stay_in_float32() -> None:
    for number in (0, 1):
        objective = CTC(toy.ToyNetwork(), LABELS, toy.SMALL)
        for stage in range(number + 1):
            objective.enter_stage(stage)
            objective.start_stage(stage, no_batches)
        with torch.autocast("cpu", torch.bfloat16):
            losses = objective(IMAGES[INDEX].float(), LABELS[INDEX], INDEX)
        assert {value.dtype for value in losses.values()} == {torch.float32}
    term = objective.term
    assert isinstance(term, PreservationTerm)
    v, t = torch.nn.functional.normalize(torch.randn(2, 5, 5), dim=-1)
    plain = term.loss(v, t, LABELS[INDEX], INDEX, 0)
    pooled = torch.randn(5, toy.ToyNetwork.num_features)
    first = at_stage(0, toy.SMALL).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = first.term(pooled, INDEX)
    assert torch.equal(inside, first.term(pooled, INDEX))
    assert plain.dtype == torch.float32


@pytest.mark.parametrize(
    ("key", "length", "stage2_start"), [("ctc_cifar", 300, 200), ("ctc_short", 30, 20)]
)
def test_ctc_schedule_is_the_released_one(key: str, length: int, stage2_start: int) -> None:
    golden = np.load(Path(__file__).parent / "data" / "lr_schedules.npz")[key]
    config = CTCConfig()
    config = dataclasses.replace(
        config,
        stage1=dataclasses.replace(config.stage1, epochs=stage2_start),
        stage2=dataclasses.replace(config.stage2, epochs=length - stage2_start),
    )
    stages = CTC(toy.ToyNetwork(), LABELS, config).stages()
    rates = [learning_rate(stage, epoch) for stage in stages for epoch in range(stage.epochs)]
    np.testing.assert_allclose(rates, golden, rtol=1e-9)
    assert [stage.weight_decay for stage in stages] == [1e-3, 5e-4]


def test_ce_schedule_is_the_released_one() -> None:
    golden = np.load(Path(__file__).parent / "data" / "lr_schedules.npz")["ce_cifar"]
    stage = dataclasses.replace(CEConfig().stage, epochs=300)
    (named,) = CrossEntropy(toy.ToyNetwork(), CEConfig(stage)).stages()
    rates = [learning_rate(named, epoch) for epoch in range(300)]
    np.testing.assert_allclose(rates, golden, rtol=1e-9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"estimator": "nec"}, "ctc.estimator 'nec' is not one of nce, infonce"),
        ({"bank_dtype": "int8"}, "bank_dtype"),
        ({"tau2": 0.0}, "ctc.tau2 0.0 must be above 0"),
        ({"m1": 1.0}, "ctc.m1"),
        ({"pool": 5}, "ctc.pool 5 is smaller"),
        ({"num_negatives": 2_000_000_000}, "ctc.num_negatives 2000000000"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        CTC(toy.ToyNetwork(), LABELS, small(**changes))
    with pytest.raises(InputError, match="cosine"):
        CrossEntropy(toy.ToyNetwork(), CEConfig(StageConfig(schedule="cosin"))).stages()


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """The results of ctc_on_ranks.py by (number of ranks, rank)."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(Path(toy.__file__).resolve()), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        (ranks, rank): torch.load(folder / f"world{ranks}_rank{rank}.pt")
        for ranks in toy.WORLDS
        for rank in range(ranks)
    }


@pytest.mark.parametrize("run", toy.RUNS)
def test_many_ranks_equal_one_process_on_the_joined_batch(
    on_ranks: dict[tuple[int, int], dict[str, Any]], run: str
) -> None:
    """Losses of every step; weights, projections, banks and Z at the end of every stage."""
    alone = on_ranks[1, 0][run]["history"]
    for ranks, rank in ((2, 0), (4, 0), (2, 1), (4, 3)):
        for expected, value in zip(alone, on_ranks[ranks, rank][run]["history"], strict=True):
            assert expected.keys() == value.keys()
            for key in expected:
                if rank and key.endswith("bank.rows") and "sharded" in run:
                    assert len(value[key]) == 0  # the first rank alone saves
                    continue
                torch.testing.assert_close(
                    value[key], expected[key], rtol=1e-9, atol=1e-9, msg=f"{run} {key} {ranks}"
                )


@pytest.mark.parametrize("run", [run for run in toy.RUNS if "sharded" not in run])
def test_every_ranks_bank_is_identical_bit_for_bit(
    on_ranks: dict[tuple[int, int], dict[str, Any]], run: str
) -> None:
    for ranks in (2, 4):
        state = on_ranks[ranks, 0][run]["history"][-1]
        for rank in range(1, ranks):
            other = on_ranks[ranks, rank][run]["history"][-1]
            assert all(torch.equal(other[key], state[key]) for key in state)


@pytest.mark.parametrize("run", [name for name, config in toy.RUNS.items() if config])
def test_every_number_of_ranks_draws_the_same_negatives(
    on_ranks: dict[tuple[int, int], dict[str, Any]], run: str
) -> None:
    """Together the shards hold what the whole bank's draw lists, K for each image; no other row."""
    expected = on_ranks[1, 0][run]["checks"]["negatives"]
    assert expected.shape == (toy.B, toy.RUNS[run].num_negatives or 30)
    for results in on_ranks.values():
        assert torch.equal(results[run]["checks"]["negatives"], expected)


@pytest.mark.parametrize("run", [name for name, config in toy.RUNS.items() if config])
def test_negatives_of_many_ranks_make_the_loss_of_the_formula(
    on_ranks: dict[tuple[int, int], dict[str, Any]], run: str
) -> None:
    for results in on_ranks.values():
        checks = results[run]["checks"]
        torch.testing.assert_close(checks["kernel"], checks["formula"], rtol=1e-9, atol=1e-9)


def test_a_shard_of_a_large_pool_has_room_for_all_its_rows(
    on_ranks: dict[tuple[int, int], dict[str, Any]],
) -> None:
    """Its size is bounded without asking the device, and no negative is lost by that."""
    for results in on_ranks.values():
        assert torch.equal(results["large pool"], torch.full((2,), toy.LARGE.num_negatives))
