"""A network that no line of the suite names, from its pretraining to its features."""

import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from analysis.features import network_of
from core.config import InputError, load_config
from core.results import sha256_of
from data.datasets import DataConfig, open_dataset
from models.checkpoint import load_checkpoint
from models.features import InputSpec, extract
from pretrain.recipe import PretrainConfig
from pretrain.run import pretrain
from tests.faults import COMMON, STAGES
from training.loop import LoopConfig, Stopped, Trainer
from transfer.backbone import from_checkpoint
from transfer.data import open_splits
from transfer.finetune import FinetuneConfig, Job, finetune

USER = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.ReLU())
"""
CASES = [("ce", "timm/test_convnext"), ("ctc", "timm/test_vit"), ("ce", "mine.py:net")]


def recipe(data: Path, method: str, arch: str, *overrides: str) -> PretrainConfig:
    adamw = ["loop.optimizer", "adamw", "loop.decay_norm_and_bias", "false"]
    rate = {"ce": ["ce.stage.lr", "1e-3"], "ctc": ["ctc.stage1.lr", "1e-3"]}.get(method, [])
    values = [*STAGES[method], "data.image_size", "32", *adamw, *rate]
    if not arch.startswith("/"):
        values += ["drop_path_rate", "0.2"]
    values = [*COMMON, "arch", arch, "method", method, "data.root", str(data), *values, *overrides]
    return load_config(PretrainConfig, None, values)


def cut_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a signal come in one step of a training."""
    original = Trainer.step

    def wrapped(self: Trainer, *arguments: Any) -> Any:
        if arguments[-1].iteration + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "step", wrapped)


@pytest.fixture(params=CASES, ids=[f"{method} {arch}" for method, arch in CASES])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    method, arch = request.param
    if arch.startswith("mine.py"):
        (tmp_path / "mine.py").write_text(USER)
        arch = f"{tmp_path}/{arch}"
    return method, arch


def test_it_pretrains_resumes_bit_exactly_and_gives_features(
    case: tuple[str, str], tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(tiny_npz, *case)
    path = pretrain(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        cut_at(5, patch)
        pretrain(config, tmp_path / "cut")
    resumed = load_checkpoint(pretrain(config, tmp_path / "cut", resume_run=True))
    whole = load_checkpoint(path)
    for key, value in whole.model.items():
        assert torch.equal(value, resumed.model[key]), key

    backbone = from_checkpoint(whole, sha256_of(path))
    dataset = open_dataset(DataConfig("npz", str(tiny_npz), image_size=32), "test")
    rows = [
        extract(backbone.model, dataset, batch_size=24, inputs=backbone.inputs).features,
        extract(backbone.model, dataset, batch_size=5, inputs=backbone.inputs).features,
        extract(network_of(whole), dataset, inputs=backbone.inputs).features,
    ]
    assert rows[0].shape == (24, backbone.model.head_hidden_size)
    for other in rows[1:]:
        torch.testing.assert_close(rows[0], other, atol=1e-5, rtol=1e-5)
    if case[1].startswith("timm/"):  # timm alone makes the same of the file
        name = case[1].removeprefix("timm/")
        options = {"dynamic_img_size": True} if "vit" in name else {}
        network = timm.create_model(name, num_classes=3, **options).eval()
        network.load_state_dict(whole.model)
        images = torch.stack([dataset[i][0] for i in range(24)])
        spec = InputSpec(whole.facts.mean, whole.facts.std)
        with torch.inference_mode():
            maps = network.forward_features(spec.apply(images))
            expected = network.forward_head(maps, pre_logits=True)
        torch.testing.assert_close(rows[0], expected, atol=1e-5, rtol=1e-5)


def test_it_is_fine_tuned_and_its_file_holds_the_new_classifier(
    tiny_npz: Path, tmp_path: Path
) -> None:
    config = recipe(tiny_npz, "random", "timm/test_convnext")
    path = pretrain(config, tmp_path / "run")
    backbone = from_checkpoint(load_checkpoint(path), sha256_of(path))
    data = DataConfig("npz", str(tiny_npz), image_size=32)
    job = Job(
        backbone, FinetuneConfig(steps=2, lr=[0.01], weight_decay=[0.0], head_lr_factor=10),
        LoopConfig(batch_size=8), data, 0, torch.device("cpu"), "test", resume=False,
    )  # fmt: skip
    finetune(job, open_splits(data, 0), tmp_path / "tuned")
    tuned = load_checkpoint(tmp_path / "tuned/final/finetuned.pth")
    assert tuned.facts.arch == "timm/test_convnext"
    before = load_checkpoint(path).model
    network_of(tuned)
    moved = {k for k, v in tuned.model.items() if not torch.equal(v, before[k])}
    assert {"head.fc.weight", "stem.0.weight"} <= moved


@pytest.mark.parametrize(
    ("arch", "sentence"),
    [
        ("timm/hiera_tiny_224", "does not take images of 32×32 pixels"),
        ("resnet18", "drop_path_rate"),
        ("timm/test_vi", "did you mean 'timm/test_vit'"),
    ],
)
def test_what_a_network_cannot_is_refused_before_anything_is_written(
    tiny_npz: Path, tmp_path: Path, arch: str, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        pretrain(recipe(tiny_npz, "ce", arch), tmp_path / "run")
    assert not (tmp_path / "run").exists()
