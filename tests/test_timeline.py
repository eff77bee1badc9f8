"""A timeline over tiny checkpoints: complete rows, nothing skipped unsaid, nothing redone."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from analysis import timeline as timeline_module
from analysis.features import Extraction
from analysis.mutual_information import RELEASED_XT, Settings
from analysis.quantities import Information, measure_information
from analysis.retrieval import recall_at_1
from analysis.survey import schedule_of, survey
from analysis.timeline import Timeline, TimelineConfig, summary
from core.config import load_config
from core.errors import InputError
from core.files import locked
from core.results import ResultRow, read_rows
from data.datasets import DataConfig
from models.checkpoint import Facts, save_checkpoint
from models.resnet import create_model
from report.timeline import gather
from transfer.linear import LinearConfig

ARCH = "resnet18_cifar_w16"
SHORT = Settings(
    hidden=16, iterations=12, batch=16, lr=1e-3, evaluations=3, embedding=4, marginal_draws=2
)


def pretrain_config(data: Path, method: str = "ctc") -> dict[str, Any]:
    """What a checkpoint keeps of its recipe: epochs 0, 1, 2, 3; stage 1 ends with 2."""
    return {
        "method": method,
        "data": {"name": "npz", "root": str(data), "image_size": 16},
        "ce": {"stage": {"epochs": 3}},
        "ctc": {"stage1": {"epochs": 2}, "stage2": {"epochs": 1}},
        "loop": {"save_every": 1},
    }


def write_epoch(run: Path, epoch: int, data: Path, claimed: int | None = None) -> Path:
    """Save an untrained network of its own seed as an epoch."""
    torch.manual_seed(epoch)
    number = epoch if claimed is None else claimed
    facts = Facts(
        ARCH, 3, "ctc", number, 4, "tiny", 16, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2),
        config=pretrain_config(data),
    )  # fmt: skip
    path = run / "checkpoints" / f"epoch_{epoch:04d}.pth"
    save_checkpoint(path, create_model(ARCH, 3).state_dict(), facts)
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def target(tmp_path: Path, tiny_npz: Path) -> Path:
    copy = tmp_path / "elsewhere.npz"
    copy.write_bytes(tiny_npz.read_bytes())
    return copy


def quick(target: Path, **changes: Any) -> TimelineConfig:
    information = Information(seeds=[0, 1], split="all", side=4, xt=SHORT, ty=SHORT, ht=SHORT)
    config = TimelineConfig(
        targets=[DataConfig(name="npz", root=str(target))],
        clustering_seeds=[0, 1],
        information=information,
        linear=LinearConfig(c_values=3, sweep_iterations=20, iterations=50),
        features=Extraction(cache=False),
        device="cpu",
    )
    return dataclasses.replace(config, **changes)


def work(timeline: Timeline) -> list[ResultRow]:
    return [row for rows in timeline.work() for row in rows]


def test_every_quantity_of_every_readable_epoch_and_the_truncated_one_named(
    tmp_path: Path, tiny_npz: Path, target: Path
) -> None:
    run = tmp_path / "run"
    for epoch in (0, 1, 2):
        write_epoch(run, epoch, tiny_npz)
    truncate(run / "checkpoints" / "epoch_0001.pth")
    timeline = Timeline(run, quick(target), "tiny")
    said = "\n".join(summary(timeline, timeline.todo()))
    assert "1 epoch unreadable: epoch_0001.pth (is truncated" in said
    assert "1 epoch not written yet: 3" in said
    rows = work(timeline)
    written = read_rows(run / "results.jsonl")
    assert [(r.metric, r.value) for r in rows] == [(r.metric, r.value) for r in written]
    found = {(row.epoch, row.dataset, row.split, row.metric) for row in rows}
    assert len(found) == len(rows)  # nothing twice
    expected = set()
    for epoch in (0, 2):
        for split in ("train", "test"):
            for metric in ("recall@1", "nmi", "effective_rank", "feature_norm", "linear/top1"):
                expected.add((epoch, "tiny", split, metric))
        for metric in ("recall@1", "nmi", "effective_rank", "feature_norm"):
            expected.add((epoch, "elsewhere", "test", metric))
        for split in ("train", "test"):
            expected.add((epoch, "elsewhere", split, "linear/top1"))
        for name in ("tiny", "elsewhere"):
            for metric in ("mi_xt", "mi_ty", "h_t_bound"):
                expected.add((epoch, name, "all", metric))
    assert found == expected
    first = {(r.metric, r.split): r for r in rows if (r.epoch, r.dataset) == (0, "tiny")}
    assert first["mi_xt", "all"].unit == "nat"
    assert first["mi_xt", "all"].details["pairs"] == 72
    assert len(first["mi_xt", "all"].details["values"]) == 2
    assert first["nmi", "train"].details["normalisation"] == "arithmetic"
    bound = first["h_t_bound", "all"]
    assert bound.details["reference_epoch"] == 2  # the end of stage 1
    assert bound.value is not None
    assert bound.value <= bound.details["cap"]
    row = first["recall@1", "train"]
    assert (row.step, row.init, row.seed, row.protocol) == ("analysis", "ctc", 4, "tiny")
    assert row.details["boundary"] == 2
    features = timeline._features(timeline.survey.epochs[0], 0, "train", {})
    labels = timeline.labels(0, "train")
    assert row.value == pytest.approx(100 * recall_at_1(features, labels), abs=1e-6)


def test_done_epochs_are_skipped_and_new_ones_and_changed_weights_are_not(
    tmp_path: Path, tiny_npz: Path, target: Path
) -> None:
    run, config = tmp_path / "run", quick(target, quantities=["companions"])
    write_epoch(run, 0, tiny_npz)
    write_epoch(run, 1, tiny_npz)
    first = Timeline(run, config, "tiny")
    next(first.work())  # interrupted after one measurement
    assert len(Timeline(run, config, "tiny").todo()) == 5
    work(Timeline(run, config, "tiny"))
    assert Timeline(run, config, "tiny").todo() == []
    other = Timeline(run, dataclasses.replace(config, every=7, device="cpu"), "tiny")
    assert other.todo() == []
    write_epoch(run, 2, tiny_npz)  # a training beside us has gone on
    assert {epoch.number for epoch, _ in Timeline(run, config, "tiny").todo()} == {2}
    torch.manual_seed(99)
    facts = Facts(ARCH, 3, "ctc", 1, 4, "tiny", 16, (0.4,) * 3, (0.2,) * 3)
    path = run / "checkpoints" / "epoch_0001.pth"
    save_checkpoint(path, create_model(ARCH, 3).state_dict(), facts)
    assert {epoch.number for epoch, _ in Timeline(run, config, "tiny").todo()} == {1, 2}


def test_a_changed_setting_redoes_what_depends_on_it_and_nothing_else(
    tmp_path: Path, tiny_npz: Path, target: Path
) -> None:
    run = tmp_path / "run"
    write_epoch(run, 0, tiny_npz)
    config = quick(target, quantities=["companions", "mi_ty"])
    work(Timeline(run, config, "tiny"))
    longer = dataclasses.replace(config.information, ty=dataclasses.replace(SHORT, iterations=13))
    changed = dataclasses.replace(config, information=longer)
    redone = {unit.quantity for _, unit in Timeline(run, changed, "tiny").todo()}
    assert redone == {"mi_ty"}


def test_done_depends_on_the_content_of_the_data_and_not_on_workers_or_folders(
    tmp_path: Path, tiny_npz: Path, target: Path
) -> None:
    run = tmp_path / "run"
    write_epoch(run, 0, tiny_npz)
    config = quick(target, quantities=["companions"])
    work(Timeline(run, config, "tiny"))
    (tmp_path / "moved").mkdir()
    target = target.rename(tmp_path / "moved" / target.name)
    moved = quick(
        target,
        quantities=["companions"],
        source=DataConfig(name="npz", root=str(tiny_npz), workers=1, image_size=16),
        features=Extraction(cache=False, workers=1, batch_size=7),
    )
    assert Timeline(run, moved, "tiny").todo() == []
    with np.load(target) as content:
        arrays = dict(content)
    arrays["y_test"] = np.roll(arrays["y_test"], 1)
    np.savez(target, **arrays)
    assert {unit.place for _, unit in Timeline(run, moved, "tiny").todo()} == {1}


def test_a_quick_look_with_other_settings_neither_counts_as_done_nor_replaces_what_is(
    tmp_path: Path, tiny_npz: Path, target: Path
) -> None:
    run = tmp_path / "run"
    for epoch in (0, 1, 2, 3):
        write_epoch(run, epoch, tiny_npz)
    real = quick(target, quantities=["probe"])
    look = dataclasses.replace(real, every=2, linear=dataclasses.replace(real.linear, c_values=2))
    work(Timeline(run, look, "tiny", recipe=real))
    assert len(Timeline(run, real, "tiny", recipe=real).todo()) == 8  # 4 epochs, source and target
    work(Timeline(run, real, "tiny", recipe=real))
    work(Timeline(run, look, "tiny", recipe=real))  # all done
    gathered = gather(read_rows(run / "results.jsonl"))
    assert [name.partition("+")[0] for name in gathered] == ["tiny", "tiny"]
    assert not any("left out" in note for note in gathered["tiny"].notes)
    rows = [row for row in gathered["tiny"].rows if row.metric == "linear/top1"]
    assert {row.epoch for row in rows} == {0, 1, 2, 3}
    assert len({(row.config, row.dataset) for row in rows}) == 2
    (other,) = gathered.keys() - {"tiny"}
    assert gathered[other].rows[0].details["overrides"] == {"linear.c_values": 2}


def test_epochs_missing_in_the_middle_are_named_and_later_ones_are_only_not_written(
    tmp_path: Path, tiny_npz: Path
) -> None:
    for epoch in (0, 2):
        write_epoch(tmp_path, epoch, tiny_npz)
    found = survey(tmp_path)
    assert (found.missing, found.unwritten, found.unreadable) == ([1], [3], [])
    assert "1 epoch missing: 1" in " ".join(found.sentences())


def test_a_file_that_holds_another_epoch_is_unreadable(tmp_path: Path, tiny_npz: Path) -> None:
    write_epoch(tmp_path, 0, tiny_npz)
    write_epoch(tmp_path, 2, tiny_npz, claimed=1)
    found = survey(tmp_path)
    assert [path.name for path, _ in found.unreadable] == ["epoch_0002.pth"]
    assert "epoch 1" in found.unreadable[0][1]


def test_every_keeps_first_boundary_and_last(tmp_path: Path, tiny_npz: Path) -> None:
    for epoch in (0, 1, 2, 3):
        write_epoch(tmp_path, epoch, tiny_npz)
    assert [epoch.number for epoch in survey(tmp_path, every=10).epochs] == [0, 2, 3]


def test_schedules_are_read_from_recipes(tiny_npz: Path) -> None:
    ctc = schedule_of(pretrain_config(tiny_npz))
    assert (ctc.saved, ctc.boundary) == ((0, 1, 2, 3), 2)
    ce = pretrain_config(tiny_npz, "ce")
    ce["loop"]["save_every"] = 2
    assert (schedule_of(ce).saved, schedule_of(ce).boundary) == ((0, 2, 3), None)
    assert schedule_of(pretrain_config(tiny_npz, "random")).saved == (0,)
    assert schedule_of({"method": "ce"}).saved == ()


def test_a_nan_ends_the_work_naming_epoch_and_data(
    tmp_path: Path, tiny_npz: Path, target: Path
) -> None:
    run = tmp_path / "run"
    write_epoch(run, 0, tiny_npz)
    wild = dataclasses.replace(SHORT, lr=1e30, evaluations=12)
    config = quick(target, quantities=["mi_xt"])
    information = dataclasses.replace(config.information, xt=wild)
    timeline = Timeline(run, dataclasses.replace(config, information=information), "tiny")
    with pytest.raises(InputError, match=r"mi_xt of epoch 0 on tiny/all: the critic diverged"):
        work(timeline)
    assert not (run / "results.jsonl").exists()


def test_images_and_labels_are_paired_with_their_own_features(
    tmp_path: Path, tiny_npz: Path, target: Path
) -> None:
    """Row i of X and of Y is the image whose features are row i, over both splits."""
    run = tmp_path / "run"
    write_epoch(run, 0, tiny_npz)
    timeline = Timeline(run, quick(target), "tiny")
    unit = next(u for u in timeline.units if u.quantity == "mi_xt" and u.place == 0)
    rows = torch.tensor([3, 47, 48, 71])  # two of train, two of test
    pixels = timeline._side(unit, rows).view(4, 3, 4, 4)
    labels = timeline.labels(0, "all")[rows]
    assert labels.tolist() == [0, 2, 0, 2]
    # Each class has a colour: the mean of that channel is the highest.
    assert pixels.mean((2, 3)).argmax(1).tolist() == labels.tolist()


def test_more_pairs_than_allowed_are_spread_over_the_split(
    tmp_path: Path, tiny_npz: Path, target: Path
) -> None:
    run = tmp_path / "run"
    write_epoch(run, 0, tiny_npz)
    config = quick(target)
    information = dataclasses.replace(config.information, pairs=24)
    timeline = Timeline(run, dataclasses.replace(config, information=information), "tiny")
    rows = timeline._pairs(72)
    assert (len(rows), int(rows[0]), int(rows[-1])) == (24, 0, 71)
    assert len(rows.unique()) == 24


def test_several_epochs_at_once_give_what_each_gives_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (90,), generator=draw)
    first = F.one_hot(labels, 3) + 0.1 * torch.randn(90, 3, generator=draw)
    second = torch.randn(90, 3, generator=draw)
    how = Information(estimators=["mine", "smile"], seeds=[0], ty=SHORT)
    both = measure_information("mi_ty", labels, [first, second], how)
    assert [[m.metric for m in one] for one in both] == [["mi_ty", "mi_ty/smile"]] * 2
    for features, found in zip((first, second), both, strict=True):
        (alone,) = measure_information("mi_ty", labels, [features], how)
        assert [m.value for m in found] == pytest.approx([m.value for m in alone], abs=2e-4)


def test_the_expected_time_is_that_of_the_epochs_measured_so_far(
    tmp_path: Path, tiny_npz: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    for epoch in (0, 1, 2):
        write_epoch(run, epoch, tiny_npz)
    timeline = Timeline(run, quick(target, quantities=["companions"]), "tiny")
    assert timeline.expected_seconds(timeline.todo()) is None
    assert summary(timeline, timeline.todo())[-1] == "expected time: known after the first epoch"
    clock = iter(range(0, 10_000, 5))
    monkeypatch.setattr(timeline_module.time, "monotonic", lambda: float(next(clock)))
    work = timeline.work()
    for _ in timeline.units:  # of the first epoch: source train, source test, target
        next(work)
    todo = timeline.todo()
    assert len(todo) == 6  # of two epochs
    seconds = {(row.dataset, row.split): row.details["seconds"] for row in timeline._rows()}
    assert min(seconds.values()) > 0
    assert timeline.expected_seconds(todo) == 2 * sum(seconds.values())
    assert summary(timeline, todo)[-1].startswith("expected time: ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantities": ["recall"]}, "quantities names"),
        ({"information": Information(split="val")}, "information.split"),
        ({"information": Information(estimators=["ksg"])}, "information.estimators"),
        ({"targets": [DataConfig(name="npz", root="{data}")]}, "must differ"),
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(
    tmp_path: Path, tiny_npz: Path, target: Path, changes: dict[str, Any], words: str
) -> None:
    run = tmp_path / "run"
    write_epoch(run, 0, tiny_npz)
    if "targets" in changes:
        changes = {"targets": [DataConfig(name="npz", root=str(tiny_npz))]}
    with pytest.raises(InputError, match=words):
        Timeline(run, quick(target, **changes), "tiny")
    assert not (run / "results.jsonl").exists()


def test_a_probe_is_not_judged_on_what_it_was_fitted_to(tmp_path: Path, tiny_npz: Path) -> None:
    run = tmp_path / "run"
    write_epoch(run, 0, tiny_npz)
    for name in "ab":
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (8, 8), (i, 9, 9)).save(tmp_path / "pictures" / name / f"{i}.png")
    alone = DataConfig(name="folder", root=str(tmp_path / "pictures"), image_size=8)
    config = quick(tiny_npz, targets=[alone], quantities=["probe"])
    with pytest.raises(InputError, match="has a train split only"):
        Timeline(run, config, "tiny")
    held_out = dataclasses.replace(alone, val_fraction=0.5)
    timeline = Timeline(run, dataclasses.replace(config, targets=[held_out]), "tiny")
    assert list(timeline.datasets[1]) == ["train", "val"]


def test_no_run_and_no_readable_epoch_are_said(tmp_path: Path, tiny_npz: Path) -> None:
    with pytest.raises(InputError, match=r"holds no epoch_XXXX\.pth"):
        survey(tmp_path)
    truncate(write_epoch(tmp_path, 0, tiny_npz))
    with pytest.raises(InputError, match="none of 1 checkpoints"):
        survey(tmp_path)


def test_the_tool_walks_draws_and_reports_what_was_unreadable(
    tmp_path: Path, tiny_npz: Path, target: Path, call_tool: Callable[..., tuple[int, str, str]]
) -> None:
    run = tmp_path / "run"
    for epoch in (0, 1):
        write_epoch(run, epoch, tiny_npz)
    truncate(write_epoch(run, 2, tiny_npz))
    truncate(write_epoch(run, 3, tiny_npz))
    config = tmp_path / "tiny.yaml"
    config.write_text(
        f"targets: [{{name: npz, root: {target}}}]\nquantities: [retrieval, companions]\n"
        "features: {cache: false}\ndevice: cpu\n"
    )
    os.environ.setdefault("MPLCONFIGDIR", str(tmp_path))
    command = ("run_analysis.py", "--run", run, "--config", config)
    with locked(run, name=".analysis.lock"):
        status, _, told = call_tool(*command)
    assert (status, "run is in use by another analysis" in told) == (2, True)
    with locked(run):  # a training still writes
        status, said, told = call_tool(*command, "--figures", tmp_path / "drawn")
    assert status == 1, told
    assert "2 epochs unreadable: epoch_0002.pth (" in told
    assert "); epoch_0003.pth (" in told
    assert "expected time" in said
    assert "epoch 1  tiny/train  recall@1" in told
    assert (tmp_path / "drawn" / "tradeoff_ctc.svg").exists()
    assert {row.epoch for row in read_rows(run / "results.jsonl")} == {0, 1}
    assert not (run / "figures").exists()
    status, said, _ = call_tool(*command)
    assert (status, "0 measurements to do of 12" in said) == (1, True)
    assert (run / "figures" / "tradeoff_ctc.png").exists()
    status, _, told = call_tool(*command, "information.xt.batch", "1")
    assert (status, "batch" in told) == (2, True)


def test_the_released_recipe_has_the_released_codes_settings() -> None:
    """No split, no standardising, a constant rate: a key left out would be ours."""
    name = "analysis/timeline_cifar100_released.yaml"
    information = load_config(TimelineConfig, name).information
    assert information.xt == RELEASED_XT
    assert information.ty == dataclasses.replace(RELEASED_XT, lr=1e-5, iterations=20_000)
    ours = load_config(TimelineConfig, name.replace("_released", "")).information
    assert (ours.xt, ours.ty, ours.ht) == (Information().xt, Information().ty, Information().ht)
