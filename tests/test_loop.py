"""The loop: an uninterrupted run is the truth; every other way must end at the same weights."""

import dataclasses
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import InputError
from data.datasets import DataConfig, open_dataset
from training import loop, resume
from training.loop import (
    Hooks,
    LoopConfig,
    NonFiniteLoss,
    Objective,
    Stage,
    Stopped,
    Trainer,
    train,
)


class TwoStages(Objective):
    """Cross-entropy, then cross-entropy of a new head on features kept in a momentum bank."""

    def __init__(self, images: int = 48, batch_norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = [nn.BatchNorm2d(4)] if batch_norm else []
        self.model = nn.Sequential(
            nn.Conv2d(3, 4, 3), *norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head: nn.Module = nn.Linear(4, 3)
        self.register_buffer("bank", torch.zeros(images, 4))
        self.events: list[str] = []
        self.fail_at = -1

    def stages(self) -> list[Stage]:
        return [Stage("one", 2, 0.1, 1e-3), Stage("two", 2, 0.05, 1e-4, "cosine_step")]

    def enter_stage(self, number: int) -> None:
        self.events.append(f"enter {number}")
        if number == 1:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                self.head = nn.Linear(4, 3)

    def start_stage(self, number: int, batches: Callable[[], Iterator[Any]]) -> None:
        self.events.append(f"start {number}")

    def set_step(self, iteration: int) -> None:
        self.iteration = iteration

    def forward(self, images: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        features = self.model(images)
        self.pending = (index, features.detach())
        loss = nn.functional.cross_entropy(self.head(features), labels)
        near = (features - self.bank[index]).square().sum(1).mean()
        if self.iteration + 1 == self.fail_at:
            near = near * float("nan")
        return {"loss_ce": loss, "loss_near": 0.1 * near}

    def after_step(self) -> None:
        index, features = map(loop.dist.gather_rows, self.pending)
        self.bank[index] = 0.5 * self.bank[index] + 0.5 * features


CONFIG = LoopConfig(batch_size=16, resume_every=1, log_every=1, save_every=1)  # 3 steps an epoch


def _run(
    folder: Path,
    data: Path,
    objective: TwoStages | None = None,
    resume_run: bool = False,
    config: LoopConfig = CONFIG,
    **hooks: Any,
) -> TwoStages:
    objective = objective or TwoStages()
    dataset = open_dataset(DataConfig("npz", str(data)), "train", train=True, seed=3)
    device = torch.device("cpu")
    train(
        objective, dataset, config, folder, Hooks(**hooks), seed=3, device=device,
        resume_run=resume_run, recipe={"arch": "tiny"},
    )  # fmt: skip
    return objective


def test_a_skipped_fp16_step_moves_neither_weights_nor_banks(tmp_path: Path) -> None:
    """The scaler skips a step whose gradients overflow; the next step moves both."""
    config = LoopConfig(amp="fp16")
    objective = TwoStages()
    trainer = Trainer(objective, config, tmp_path, 0, torch.device("cpu"))
    position = trainer.begin(Hooks())
    batch = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]), torch.arange(4)
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    overflow = objective.head.register_forward_hook(lambda *_: 100.0 * _[-1].float())
    losses = trainer.step(*batch, 0.1, position)
    assert all(value.isfinite() for value in losses.values())
    overflow.remove()
    same = {k for k, v in objective.state_dict().items() if torch.equal(v, before[k])}
    assert {"bank", "head.weight", "model.0.weight"} <= same
    trainer.step(*batch, 0.1, position)
    assert not any(
        torch.equal(objective.state_dict()[key], before[key]) for key in ("bank", "head.weight")
    )


class StopAt(TwoStages):
    """Sends itself a signal in the forward pass of one step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def forward(self, images: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        if self.iteration + 1 == self.step:
            signal.raise_signal(signal.SIGTERM)
        return super().forward(images, labels, index)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6, 7, 11])
def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(
    tmp_path: Path, tiny_npz: Path, step: int
) -> None:
    whole = _run(tmp_path / "whole", tiny_npz)
    with pytest.raises(Stopped):
        _run(tmp_path / "cut", tiny_npz, StopAt(step))
    torch.rand(5)  # what else the process draws must not matter
    resumed = _run(tmp_path / "cut", tiny_npz, resume_run=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    steps = [json.loads(line)["iteration"] for line in (tmp_path / "cut/log.jsonl").open()]
    assert sorted(set(steps)) == list(range(1, 13))
    assert len(steps) == 13  # each step once, and the evaluation at the end


def test_a_damaged_resume_state_falls_back_to_the_one_before_it(
    tmp_path: Path, tiny_npz: Path
) -> None:
    whole = _run(tmp_path / "whole", tiny_npz)
    with pytest.raises(Stopped):
        _run(tmp_path / "cut", tiny_npz, StopAt(8))
    newest = tmp_path / "cut" / resume.FILE
    newest.write_bytes(newest.read_bytes()[:-50])
    resumed = _run(tmp_path / "cut", tiny_npz, resume_run=True)
    assert torch.equal(whole.bank, resumed.bank)
    (tmp_path / "cut" / resume.PREVIOUS).unlink()
    newest.write_bytes(b"PK")
    with pytest.raises(InputError, match="damaged"):
        _run(tmp_path / "cut", tiny_npz, resume_run=True)


def test_a_resume_needs_a_state_and_the_same_recipe(tmp_path: Path, tiny_npz: Path) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        _run(tmp_path, tiny_npz, resume_run=True)
    _run(tmp_path, tiny_npz)
    (tmp_path / "other").mkdir()
    content = resume.load(tmp_path)[1] | {"recipe": {"arch": "large"}}
    torch.save(content, tmp_path / "other" / resume.FILE)
    with pytest.raises(InputError, match="was begun with arch = large, not tiny"):
        _run(tmp_path / "other", tiny_npz, resume_run=True)


def test_a_non_finite_loss_stops_naming_step_and_losses_and_saves_nothing_of_it(
    tmp_path: Path, tiny_npz: Path
) -> None:
    objective = TwoStages()
    objective.fail_at = 5
    with pytest.raises(NonFiniteLoss, match=r"step 5: .*loss_ce \d.*loss_near nan"):
        _run(tmp_path, tiny_npz, objective)
    saved = resume.load(tmp_path)[1]
    assert saved["position"]["iteration"] == 4
    assert all(torch.isfinite(value).all() for value in saved["objective"].values())


def test_a_stage_is_entered_once_and_started_once_also_over_a_resume(
    tmp_path: Path, tiny_npz: Path
) -> None:
    with pytest.raises(Stopped):
        _run(tmp_path, tiny_npz, StopAt(8))
    resumed = _run(tmp_path, tiny_npz, resume_run=True)
    assert resumed.events == ["enter 1"]
    assert _run(tmp_path / "b", tiny_npz).events == ["enter 0", "start 0", "enter 1", "start 1"]


def test_weights_are_saved_at_the_start_and_after_each_due_epoch(
    tmp_path: Path, tiny_npz: Path
) -> None:
    saved: list[int] = []
    _run(tmp_path, tiny_npz, save_weights=saved.append)
    assert saved == [0, 1, 2, 3, 4]


def test_the_optimiser_holds_exactly_the_trainable_parameters_and_momentum_survives_a_stage(
    tmp_path: Path,
) -> None:
    objective = TwoStages()
    objective.model[0].bias.requires_grad_(False)
    trainer = Trainer(objective, CONFIG, tmp_path, 0, torch.device("cpu"))
    position = trainer.begin(Hooks())
    images = torch.randn(16, 3, 16, 16)
    trainer.step(images, torch.zeros(16, dtype=torch.long), torch.arange(16), 0.1, position)
    assert trainer.optimizer is not None
    weight = objective.model[0].weight
    momentum = trainer.optimizer.state[weight]["momentum_buffer"]
    old_head = objective.head.weight
    position.epoch = 2
    trainer.enter(position, Hooks())
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in objective.parameters() if p.requires_grad}
    assert len(held) == len({id(p) for p in held})
    assert torch.equal(trainer.optimizer.state[weight]["momentum_buffer"], momentum)
    assert old_head not in trainer.optimizer.state


def test_weight_decay_spares_one_dimensional_parameters_when_told(tmp_path: Path) -> None:
    config = LoopConfig(decay_norm_and_bias=False)
    trainer = Trainer(TwoStages(), config, tmp_path, 0, torch.device("cpu"))
    trainer.begin(Hooks())
    assert trainer.optimizer is not None
    decay = {p.ndim: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert decay == {4: 1e-3, 2: 1e-3, 1: 0.0}


def test_a_networks_own_no_weight_decay_is_spared_too(tmp_path: Path) -> None:
    objective = TwoStages()
    objective.model.no_weight_decay = lambda: {"0.weight"}  # type: ignore[assignment]
    for everything, expected in ((False, {0.0}), (True, {1e-3})):
        config = LoopConfig(decay_norm_and_bias=everything)
        trainer = Trainer(objective, config, tmp_path, 0, torch.device("cpu"))
        trainer.begin(Hooks())
        assert trainer.optimizer is not None
        named = objective.model[0].weight
        groups = trainer.optimizer.param_groups
        found = {g["weight_decay"] for g in groups for p in g["params"] if p is named}
        assert found == expected


def test_adamw_steps_as_torchs_own_and_resumes_bit_exactly(tmp_path: Path, tiny_npz: Path) -> None:
    config = dataclasses.replace(CONFIG, optimizer="adamw", betas=[0.8, 0.95])
    objective, twin = TwoStages(batch_norm=False), TwoStages(batch_norm=False)
    trainer = Trainer(objective, config, tmp_path, 0, torch.device("cpu"))
    position = trainer.begin(Hooks())
    reference = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.8, 0.95), weight_decay=1e-3)
    images, labels, index = torch.randn(16, 3, 9, 9), torch.arange(16) % 3, torch.arange(16)
    for _ in range(3):
        trainer.step(images, labels, index, 0.01, position)
        twin.iteration = 0
        reference.zero_grad()
        sum(twin(images, labels, index).values()).backward()  # type: ignore[union-attr]
        reference.step()
        twin.after_step()
    for key, value in twin.state_dict().items():
        assert torch.allclose(value, objective.state_dict()[key], atol=1e-6), key

    whole = _run(tmp_path / "whole", tiny_npz, config=config)
    with pytest.raises(Stopped):
        _run(tmp_path / "cut", tiny_npz, StopAt(8), config=config)
    resumed = _run(tmp_path / "cut", tiny_npz, resume_run=True, config=config)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amp": "fp8"}, "loop.amp 'fp8'"),
        ({"batch_size": 481}, "480"),
        ({"batch_size": 0}, "loop.batch_size 0"),
        ({"save_every": 0}, "loop.save_every"),
        ({"momentum": 1.0}, "loop.momentum"),
        ({"sync_bn": True, "device": "cpu"}, "loop.sync_bn"),
        ({"optimizer": "adam"}, "loop.optimizer 'adam' is not one of sgd, adamw"),
        ({"betas": [0.9]}, "loop.betas"),
    ],
)
def test_what_cannot_be_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        loop.check(LoopConfig(**changes), 480)


RANKS = """
from pathlib import Path
import torch
from core import dist
from data.datasets import DataConfig, open_dataset
from training.loop import Hooks, LoopConfig, NonFiniteLoss, Stopped, train
import importlib.util
spec = importlib.util.spec_from_file_location("test_loop", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
device = dist.init("cpu")
data, folder, mode = sys.argv[2], Path(sys.argv[3]), sys.argv[4]
dataset = open_dataset(DataConfig("npz", data), "train", train=True, seed=3)
objective = module.StopAt(8) if mode == "cut" else module.TwoStages(batch_norm=False)
if mode == "cut":
    objective.model[1] = torch.nn.Identity()
    if dist.rank() == 1:
        objective.step = -1  # only the first rank gets the signal
if mode == "nan" and dist.rank() == 1:
    objective.fail_at = 5  # the loss of the other rank stays finite
try:
    train(objective, dataset, module.CONFIG, folder, Hooks(), seed=3, device=device,
          resume_run=mode == "resume", recipe={"arch": "tiny"})
except Stopped:
    assert mode == "cut"
except NonFiniteLoss as error:
    assert mode == "nan" and "step 5: " in str(error), error
else:
    assert mode in ("whole", "resume")
if dist.is_main():
    torch.save(dict(objective.state_dict()), folder / "final.pth")
dist.shutdown()
"""


def test_two_ranks_give_one_processs_weights_also_cut_and_resumed(
    tmp_path: Path, tiny_npz: Path, run_ranks: Callable[..., None]
) -> None:
    """One signal stops both; resumed, they end at the bits of two that were not cut."""
    for ranks, folder, mode in ((1, "one", "whole"), (2, "two", "whole"), (2, "cut", "cut")):
        run_ranks(RANKS, ranks, __file__, tiny_npz, tmp_path / folder, mode)
    run_ranks(RANKS, 2, __file__, tiny_npz, tmp_path / "cut", "resume")
    one, two, cut = (torch.load(tmp_path / d / "final.pth") for d in ("one", "two", "cut"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(two[key], cut[key]), key


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_and_is_not_saved(
    tmp_path: Path, tiny_npz: Path, run_ranks: Callable[..., None]
) -> None:
    run_ranks(RANKS, 2, __file__, tiny_npz, tmp_path / "nan", "nan")
    saved = resume.load(tmp_path / "nan")[1]
    assert saved["position"]["iteration"] == 4
    assert all(torch.isfinite(value).all() for value in saved["objective"].values())


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    trainer = Trainer(TwoStages(), CONFIG, tmp_path, 0, torch.device("cpu"))
    position = trainer.begin(Hooks())
    trainer.save(position)
    before = (tmp_path / resume.FILE).read_bytes()
    trainer.objective.bank[3, 1] = float("inf")
    with pytest.raises(NonFiniteLoss, match="bank is not finite; nothing was saved"):
        trainer.save(position)
    assert (tmp_path / resume.FILE).read_bytes() == before
