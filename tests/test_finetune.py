"""Fine-tuning: all weights, exact steps, chosen on held-out images, resumed exactly."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.errors import InputError
from data.datasets import DataConfig, EpochSampler, open_dataset
from models.checkpoint import load_checkpoint
from models.features import InputSpec
from models.resnet import create_model
from training.loop import LoopConfig, NonFiniteLoss, Stage, Trainer
from transfer import finetune as module
from transfer.backbone import Backbone
from transfer.data import Splits, SteppedDataset, fit_and_held_out, open_splits
from transfer.finetune import FineTune, FinetuneConfig, Job, finetune

ARCH = "resnet18_cifar_w16"
INPUTS = InputSpec((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture
def job(tiny_npz: Path) -> Job:
    torch.manual_seed(0)
    backbone = Backbone(create_model(ARCH, 1), INPUTS, "random", 0, 0, "0" * 64, "weights.pth")
    return Job(
        backbone,
        FinetuneConfig(steps=4, lr=[0.02], weight_decay=[1e-4]),
        LoopConfig(batch_size=8),
        DataConfig(name="npz", root=str(tiny_npz), image_size=8),
        seed=0,
        device=torch.device("cpu"),
        fingerprint="test",
        resume=False,
    )


def splits(job: Job) -> Splits:
    return open_splits(job.data, job.seed)


def test_the_optimiser_holds_every_weight_and_the_head_has_its_own_rate(
    job: Job, tmp_path: Path
) -> None:
    model = create_model(ARCH, 3)
    objective = FineTune(model, Stage("finetune", 1, 0.01, 1e-4), head_lr_factor=10)
    trainer = Trainer(objective, job.loop, tmp_path, 0, job.device)
    trainer._build_stage(0)
    assert trainer.optimizer is not None
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    factors = {id(p): g["lr_factor"] for g in trainer.optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert factors[id(parameter)] == (10 if name.startswith("fc.") else 1)


def test_the_loss_is_cross_entropy_or_one_sigmoid_a_class() -> None:
    model = create_model(ARCH, 3)
    objective = FineTune(model.eval(), Stage("finetune", 1, 0.01, 0), 1)
    images = torch.randn(4, 3, 8, 8)
    logits = model(images)
    labels = torch.tensor([0, 2, 1, 1])
    loss = objective(images, labels, labels)["loss_ce"]
    expected = -torch.log_softmax(logits, 1)[torch.arange(4), labels].mean()
    assert torch.allclose(loss, expected)
    targets = torch.tensor([[1, 0, -1], [0, 0, 1], [1, 1, 0], [-1, 0, 0]])
    loss = objective(images, targets, labels)["loss_ce"]
    terms = [
        -torch.log(torch.sigmoid(logits[i, k] if targets[i, k] == 1 else -logits[i, k]))
        for i in range(4) for k in range(3) if targets[i, k] >= 0
    ]  # fmt: skip
    assert torch.allclose(loss, torch.stack(terms).sum() / 4)


@pytest.mark.parametrize("batch_size", [5, 7])
def test_stretched_epochs_pass_through_the_images_evenly(tiny_npz: Path, batch_size: int) -> None:
    """Over all epochs, each image comes equally often (±1) and each pass has a new augmentation."""
    dataset = open_dataset(DataConfig(name="npz", root=str(tiny_npz), limit=9), "train", True)
    stretched = SteppedDataset(dataset, steps=4, batch_size=batch_size)
    sampler = EpochSampler(len(stretched), batch_size, seed=1)
    assert sampler.steps_per_epoch == 4
    seen: list[int] = []
    for epoch in range(9):
        sampler.set_epoch(epoch)
        seen += [stretched[key][2] for keys in sampler for key in keys]
    counts = torch.bincount(torch.tensor(seen), minlength=9)
    assert len(seen) == 36 * batch_size
    assert counts.max() - counts.min() <= 1
    assert stretched.order(0).tolist() != stretched.order(1).tolist() != list(range(9))
    places = [stretched.order(n).tolist().index(3) + n * 9 for n in (0, 1)]
    first, second = (stretched[divmod(place, len(stretched))] for place in places)
    assert first[2] == second[2] == 3
    assert not torch.equal(first[0], second[0])


def test_every_stretch_of_a_sorted_data_set_shows_all_classes(tmp_path: Path) -> None:
    content: dict[str, np.ndarray] = {"classes": np.array(list("abcd"))}
    for split in ("train", "test"):
        content[f"x_{split}"] = np.zeros((200, 8, 8, 3), np.uint8)
        content[f"y_{split}"] = np.arange(200) // 50
    np.savez(tmp_path / "sorted.npz", **content)  # type: ignore[arg-type]
    data = DataConfig(name="npz", root=str(tmp_path / "sorted.npz"))
    dataset = open_dataset(data, "train", True, seed=2)
    stretched = SteppedDataset(dataset, steps=2, batch_size=25)  # a quarter of the images
    for epoch in range(8):
        labels = torch.tensor([int(stretched[epoch, i][1]) for i in range(50)])
        assert labels.bincount(minlength=4).min() >= 3


def test_a_recipe_makes_exactly_its_steps(job: Job) -> None:
    train = splits(job).train
    for steps in (1, 7, 20, 30, 5000):
        config = dataclasses.replace(job.config, steps=steps)
        dataset, epochs = module._stretched(dataclasses.replace(job, config=config), train)
        assert epochs * (len(dataset) // job.loop.batch_size) == steps
    by_epochs = dataclasses.replace(job.config, epochs=3)
    dataset, epochs = module._stretched(dataclasses.replace(job, config=by_epochs), train)
    assert (epochs, len(dataset)) == (3, 48)


def test_it_trains_every_weight_of_a_copy_and_leaves_the_backbone(job: Job, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in job.backbone.model.state_dict().items()}
    finetune(job, splits(job), tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in job.backbone.model.state_dict().items())
    tuned = load_checkpoint(tmp_path / "final" / "finetuned.pth")
    assert tuned.facts.num_classes == 3
    assert tuned.facts.mean == INPUTS.mean
    weights = [k for k in before if k.endswith("weight") and not k.startswith("fc")]
    assert all(not torch.equal(tuned.model[k], before[k]) for k in weights)


def test_images_are_normalised_as_the_weights_were_trained(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and in testing, by the checkpoint's mean and std, not the data set's."""
    seen: list[Tensor] = []
    model = job.backbone.model
    monkeypatch.setattr(
        type(model),
        "forward_features",
        lambda self, x: seen.append(x.detach()) or features(self, x),
    )
    features = lambda self, x: self.forward_stages(x)["res5"]  # noqa: E731
    black = splits(job)
    assert isinstance(black.train.source.images, Tensor)
    for part in (black.train, black.test):
        part.source.images.zero_()  # type: ignore[union-attr]
    finetune(job, black, tmp_path)
    assert {round(float(x.max()), 5) for x in seen} == {-2.0}


def test_the_grid_is_judged_on_held_out_images_and_the_test_split_once(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(job.config, steps=2, lr=[0.02, 1e30], weight_decay=[0.0])
    judged: list[tuple[str, int]] = []
    predict = module.predict

    def recording(model: Any, dataset: Any, job: Job) -> Tensor:
        judged.append((dataset.split, len(dataset)))
        return predict(model, dataset, job)

    monkeypatch.setattr(module, "predict", recording)
    tuned = finetune(dataclasses.replace(job, config=config), splits(job), tmp_path)
    assert judged[0][0] == "train"
    assert judged[-1] == ("test", 24)
    assert [split for split, _ in judged].count("test") == 1
    assert tuned.lr == 0.02
    assert tuned.images == 48
    assert [t["held_out"] is None for t in tuned.tried] == [False, True]


def test_what_is_held_out_is_no_part_of_what_is_learnt(job: Job) -> None:
    both = splits(job)
    fit, held = fit_and_held_out(both, 0.25, job.data)
    images = [
        {dataset[i][0].numpy().tobytes() for i in range(len(dataset))} for dataset in (fit, held)
    ]
    assert (len(fit), len(held)) == (36, 12)
    assert not images[0] & images[1]
    assert fit.augmentation == "crop_flip"


def test_a_cut_training_goes_on_to_the_same_weights(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut in the test at the end: the whole state is there, and the last epoch is done again."""
    finetune(job, splits(job), tmp_path / "whole")

    def cut(*_: object) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "predict", cut)
        finetune(job, splits(job), tmp_path / "cut")
    resumed = finetune(dataclasses.replace(job, resume=True), splits(job), tmp_path / "cut")
    first, second = (
        load_checkpoint(tmp_path / name / "final" / "finetuned.pth").model
        for name in ("whole", "cut")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    again = finetune(dataclasses.replace(job, resume=True), splits(job), tmp_path / "cut")
    assert again == resumed
    other = dataclasses.replace(job, resume=True, fingerprint="of other weights")
    with pytest.raises(InputError, match="finished training of other weights"):
        finetune(other, splits(job), tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "final" / "score.json").read_text())["lr"] == 0.02


def test_a_final_training_that_diverges_is_no_number(job: Job, tmp_path: Path) -> None:
    config = dataclasses.replace(job.config, lr=[1e30])
    with pytest.raises(NonFiniteLoss, match="diverged at lr 1e\\+30"):
        finetune(dataclasses.replace(job, config=config), splits(job), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", []),
        ("lr", [0.0]),
        ("weight_decay", [-1.0]),
        ("steps", 0),
        ("schedule", "stairs"),
        ("milestones", [3]),
        ("held_out", 0.0),
    ],
)
def test_recipes_that_cannot_be_run_are_named(key: str, value: object) -> None:
    config = dataclasses.replace(FinetuneConfig(), **{key: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"finetune.{key}"):
        module.check(config)
