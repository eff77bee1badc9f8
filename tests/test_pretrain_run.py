"""A pretraining from its recipe to its run folder, and the published recipes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.survey import schedule_of
from core.config import CONFIG_DIR, InputError, load_config, to_dict
from core.files import locked
from core.identity import announced
from core.results import ResultRow, append_rows, read_rows
from models import checkpoint
from pretrain.plan import disk, plan, trained_seconds
from pretrain.recipe import PretrainConfig
from pretrain.run import is_recorded, make_ready, pretrain
from tests.faults import COMMON, STAGES


def _config(data: Path, method: str, *overrides: str) -> PretrainConfig:
    values = ["method", method, "data.root", str(data), *COMMON, *STAGES[method], *overrides]
    return load_config(PretrainConfig, None, values)


@pytest.mark.parametrize(("method", "epochs"), [("random", 0), ("ce", 2), ("ctc", 4)])
def test_a_run_folder_holds_what_the_next_steps_read(
    tmp_path: Path, tiny_npz: Path, method: str, epochs: int
) -> None:
    config = _config(tiny_npz, method, "init", "name", "recipe", "mine")
    path = pretrain(config, tmp_path / "run")
    assert sorted(p.name for p in path.parent.iterdir()) == [
        f"epoch_{epoch:04d}.pth" for epoch in range(epochs + 1)
    ]
    facts = checkpoint.load_checkpoint(path).facts
    assert (facts.arch, facts.method, facts.epoch) == ("resnet18_cifar_w16", method, epochs)
    assert (facts.num_classes, facts.dataset, facts.image_size) == (3, tiny_npz.stem, 16)
    assert load_config(PretrainConfig, tmp_path / "run/config.yaml") == config
    if epochs:
        (row,) = read_rows(tmp_path / "run/results.jsonl")
        assert (row.metric, row.split, row.epoch) == ("top1", "test", epochs)
        assert (row.init, row.protocol) == ("name", "mine")
        assert row.weights_path == str(path)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["ce", "ctc"])
def test_a_run_on_a_gpu_ends_with_its_row(tmp_path: Path, tiny_npz: Path, method: str) -> None:
    pretrain(_config(tiny_npz, method, "loop.device", "cuda"), tmp_path / "run")
    (row,) = read_rows(tmp_path / "run/results.jsonl")
    assert row.details["device"] == "cuda"
    assert 0.0 <= (row.value or 0.0) <= 100.0


def test_the_end_of_stage_1_is_saved_whatever_the_period(tmp_path: Path, tiny_npz: Path) -> None:
    """It is the information bank's network, which no other file holds."""
    config = _config(tiny_npz, "ctc", "loop.save_every", "3")
    path = pretrain(config, tmp_path / "run")
    saved = sorted(p.name for p in path.parent.iterdir())
    assert saved == [f"epoch_{epoch:04d}.pth" for epoch in (0, 2, 3, 4)]
    assert schedule_of(to_dict(config)).saved == (0, 2, 3, 4)
    dataset, _, objective = make_ready(config)
    assert disk(config, tmp_path, objective, len(dataset)).files[0].count == 4


def test_the_initialisation_is_the_same_for_every_method(tmp_path: Path, tiny_npz: Path) -> None:
    """Else a table would compare seeds, not methods."""
    first = []
    for method in ("random", "ce", "ctc"):
        stages = {"ce": ["ce.stage"], "ctc": ["ctc.stage1", "ctc.stage2"], "random": []}[method]
        none = [word for stage in stages for word in (f"{stage}.epochs", "0")]
        config = _config(tiny_npz, method, *none)
        pretrain(config, tmp_path / method)
        first.append(checkpoint.load_checkpoint(tmp_path / method / "checkpoints/epoch_0000.pth"))
    for other in first[1:]:
        assert all(torch.equal(v, other.model[k]) for k, v in first[0].model.items())


def test_a_fresh_start_wants_an_empty_folder_and_a_resume_its_own_recipe(
    tmp_path: Path, tiny_npz: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(InputError, match="nothing to resume"):
        pretrain(_config(tiny_npz, "ce"), run, resume_run=True)
    pretrain(_config(tiny_npz, "ce"), run)
    before = sorted(p.stat().st_mtime_ns for p in run.rglob("*"))
    with pytest.raises(InputError, match="not empty"):
        pretrain(_config(tiny_npz, "ce"), run)
    with pytest.raises(InputError, match=r"begun with ce.stage.lr = 0.05, not 1.0"):
        pretrain(_config(tiny_npz, "ce", "ce.stage.lr", "1"), run, resume_run=True)
    assert sorted(p.stat().st_mtime_ns for p in run.rglob("*")) == before
    pretrain(_config(tiny_npz, "ce", "loop.log_every", "3"), run, resume_run=True)  # no effect
    assert len(read_rows(run / "results.jsonl")) == 1


def test_a_run_folder_in_use_is_refused_at_the_beginning_and_again_before_the_first_write(
    tmp_path: Path, tiny_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    pretrain(_config(tiny_npz, "ce"), run)
    for resume_run, folder in ((True, run), (False, tmp_path / "new")):
        with locked(folder), pytest.raises(InputError, match=f"{folder.name} is in use by another"):
            pretrain(_config(tiny_npz, "ce"), folder, resume_run)

    def begun_meanwhile(*_: Any) -> Any:
        (tmp_path / "new" / "config.yaml").touch()
        return make_ready(_config(tiny_npz, "ce"))

    monkeypatch.setattr("pretrain.run.make_ready", begun_meanwhile)
    with pytest.raises(InputError, match="new is not empty"):
        pretrain(_config(tiny_npz, "ce"), tmp_path / "new")


def test_a_plan_writes_nothing(tmp_path: Path, tiny_npz: Path) -> None:
    said = plan(_config(tiny_npz, "ctc"), tmp_path / "run", False)
    assert "4 epochs = 12 steps of 16 images" in said
    assert "# time: not known" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["random", "ce", "ctc"])
def test_a_plan_knows_the_disk_and_the_time_of_a_run_like_one_before(
    tmp_path: Path, tiny_npz: Path, method: str
) -> None:
    pretrain(_config(tiny_npz, method), tmp_path / "first")
    config, folder = _config(tiny_npz, method, "seed", "5"), tmp_path / "second"
    dataset, _, objective = make_ready(config)
    epochs = sum(stage.epochs for stage in objective.stages())
    told = {f.what: f for f in disk(config, folder, objective, len(dataset)).files}
    written = [path.stat().st_size for path in (tmp_path / "first/checkpoints").iterdir()]
    assert told["checkpoint"].count == len(written)
    assert told["checkpoint"].each == pytest.approx(max(written), rel=0.05)
    if not epochs:
        return
    state = (tmp_path / "first/resume.pth").stat().st_size
    assert told["resume state"].each == pytest.approx(state, rel=0.1)
    assert f"as {tmp_path / 'first'} took" in plan(config, folder, False)
    (row,) = read_rows(tmp_path / "first/results.jsonl")
    identity = {"config": [row.config], "data": [row.data], "version": [row.version]}
    assert announced(plan(config, folder, False)) == identity
    assert row.details["read_from"] == [str(tiny_npz)]
    other = _config(tiny_npz, method, "loop.momentum", "0.5")
    assert "# time: not known" in plan(other, folder, False)
    (tmp_path / "first/log.jsonl").write_text('{"iteration": 3, "images_per')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/results.jsonl").write_text("no row\n")
    assert "# time: not known" in plan(config, folder, False)


def test_the_time_of_a_run_is_that_of_its_steps(tmp_path: Path) -> None:
    lines = [(300, 64.0), (400, 16.0), (400, None)]  # images a second since the line before
    text = "".join(
        json.dumps({"iteration": n, "images_per_second": rate} if rate else {"iteration": n}) + "\n"
        for n, rate in lines
    )
    (tmp_path / "log.jsonl").write_text(text)
    assert trained_seconds(tmp_path / "log.jsonl", 64) == 300 + 400


def test_every_recipe_loads_and_the_released_ones_have_the_released_values() -> None:
    recipes = {
        path.stem: load_config(PretrainConfig, path)
        for path in sorted((CONFIG_DIR / "pretrain").glob("*.yaml"))
    }
    for name, config in recipes.items():
        assert name.startswith(config.method), name
    vanilla, transferable = recipes["ce_cifar100"], recipes["ctc_cifar100_transferability"]
    discriminable = recipes["ctc_cifar100_discriminability"]
    assert recipes["ctc_cifar100"] == transferable
    for config in (vanilla, transferable, discriminable):
        assert (config.arch, config.loop.batch_size) == ("resnext32_16x4d", 64)
        assert config.loop.momentum == 0.9
    stage = vanilla.ce.stage
    assert (stage.epochs, stage.lr, stage.weight_decay) == (200, 0.05, 5e-4)
    assert (stage.warmup_epochs, stage.end_factor) == (5, 0.1)
    for config, alpha, tau1, tau2 in (
        (transferable, 0.5, 0.1, 0.1),
        (discriminable, 0.1, 0.5, 0.4),
    ):
        ctc = config.ctc
        assert (ctc.alpha, ctc.beta, ctc.tau1, ctc.tau2) == (alpha, 1.0, tau1, tau2)
        assert (ctc.m1, ctc.m2, ctc.dim1, ctc.dim2, ctc.num_negatives) == (
            0.9,
            0.9,
            128,
            128,
            16384,
        )
        assert (ctc.stage1.epochs, ctc.stage1.lr, ctc.stage1.weight_decay) == (200, 0.05, 1e-3)
        assert (ctc.stage2.epochs, ctc.stage2.lr, ctc.stage2.weight_decay) == (100, 0.005, 5e-4)
    assert recipes["ce_cifar100_300"].ce.stage.epochs == 300
    assert recipes["ctc_cifar100_beta0"].ctc.beta == 0.0
    for name in ("ce_cifar100", "ctc_cifar100", "ce_imagenet", "ctc_imagenet"):  # "+AA"
        plain, with_aa = recipes[name], recipes[f"{name}_aa"]
        augmentation = f"{plain.data.augmentation}_aa"
        assert with_aa == dataclasses.replace(
            plain,
            data=dataclasses.replace(plain.data, augmentation=augmentation),
            version=with_aa.version,
        )
    for name in ("ce_imagenet", "ctc_imagenet"):
        assert (recipes[name].arch, recipes[name].data.augmentation) == ("resnet50", "imagenet")
        assert "own choice" in (CONFIG_DIR / f"pretrain/{name}.yaml").read_text().lower()
    imagenet = recipes["ctc_imagenet"].ctc
    matched = recipes["ce_imagenet_120"].ce.stage.epochs
    assert imagenet.stage1.epochs + imagenet.stage2.epochs == matched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ce", "loop.bach_size", "3"], "did you mean 'loop.batch_size'"),
        (["ce", "loop.batch_size", "many"], "loop.batch_size"),
        (["ce", "--config", "nothing.yaml"], "nothing.yaml"),
        (["ce", "--config", "pretrain/ctc_shapes.yaml"], "a recipe for ctc"),
        (["ce", "arch", "resnet51"], "did you mean 'resnet50'"),
        (["ce", "data.name", "cifar100", "data.root", "/nowhere"], "/nowhere"),
        (["ctc", "ctc.estimator", "nca"], "ctc.estimator 'nca' is not one of"),
        (["ce", "--resume"], "nothing to resume"),
        (["ce", "loop.device", "cuda:99"], "cuda:99"),
    ],
)
def test_bad_input_is_one_sentence_status_2_and_leaves_nothing(
    tmp_path: Path, call_tool: Callable[..., Any], arguments: list[str], message: str
) -> None:
    output = tmp_path / "run"
    status, _, said = call_tool("run_pretrain.py", *arguments, "--output", output)
    assert status == 2, said
    assert said.startswith("error: ")
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not output.exists()


def test_input_that_is_bad_for_several_processes_is_one_sentence_of_them_all(
    tmp_path: Path, tiny_npz: Path, run_tool: Callable[..., Any]
) -> None:
    words = [*COMMON, *STAGES["ce"], "data.root", tiny_npz, "loop.batch_size", "15"]
    done = run_tool("run_pretrain.py", "ce", "--output", tmp_path / "run", *words, ranks=2)
    assert done.returncode == 2
    sentence = "error: loop.batch_size 15 must be a multiple of the 2 processes\n"
    assert (done.stdout, done.stderr) == ("", sentence)
    assert not (tmp_path / "run").exists()


def test_rows_of_an_analysis_in_the_run_folder_do_not_pass_for_its_own(tmp_path: Path) -> None:
    row = ResultRow(
        "analysis", "timeline", "d", "test", "nmi", 0.5, "1", "ce", 1, epoch=3
    )  # measured beside the training
    append_rows(tmp_path / "results.jsonl", [row])
    assert not is_recorded(tmp_path, 3)
    own = dataclasses.replace(row, step="pretrain", metric="top1")
    append_rows(tmp_path / "results.jsonl", [own])
    assert is_recorded(tmp_path, 3)
