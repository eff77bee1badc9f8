"""Whole runs of a tiny detector: refusals, exact resume, result rows, evaluation alone."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import InputError, NonFiniteLoss, Stopped
from core.files import locked
from core.results import read_rows
from detection.checkpointer import Checkpointer
from detection.run import run
from tests.detection_tiny import request, write_backbone, write_pair


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_pair(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("weights") / "ce_d2.pth")


@pytest.fixture(scope="module")
def finished(data: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four iterations that was never interrupted."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert run(request(data, output, weights=str(weights), seed=7)) == 0
    return output


def _model(folder: Path) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "model_final.pth", weights_only=True)
    return dict(content["model"])


def _die() -> None:
    raise KeyboardInterrupt


def _interrupted(
    data: Path,
    weights: Path,
    output: Path,
    after: int,
    by: Callable[[], None] = _die,
    error: type[BaseException] = KeyboardInterrupt,
) -> BaseException:
    """Leave a folder as a run that died after ``after`` iterations leaves it."""
    from detectron2.engine import HookBase

    from detection import run as running

    class Stop(HookBase):
        def after_step(self) -> None:
            if self.trainer.iter + 1 == after:
                by()

    original = running.add_hooks

    def with_stop(trainer: Any, *rest: Any) -> None:
        original(trainer, *rest)
        trainer.register_hooks([Stop()])

    running.add_hooks = with_stop
    try:
        with pytest.raises(error) as raised:
            run(request(data, output, weights=str(weights), seed=7))
    finally:
        running.add_hooks = original
    return raised.value


def test_the_rows_say_all_that_a_table_needs(finished: Path, weights: Path) -> None:
    rows = read_rows(finished / "results.jsonl")
    assert {row.metric for row in rows} == {
        f"{task}/{metric}"
        for task in ("bbox", "segm")
        for metric in ("AP", "AP50", "AP75", "APs", "APm", "APl")
    }
    row = rows[0]
    assert (row.step, row.init, row.seed, row.epoch) == ("detection", "ce", 7, 3)
    assert (row.dataset, row.split, row.unit) == ("tiny", "val", "%")
    assert row.protocol.startswith("mask_rcnn_R18_FPN_shapes+")  # keys were overridden
    assert row.details["overrides"]["SOLVER.MAX_ITER"] == 4
    assert (row.details["world_size"], row.details["bn"]) == (1, "BN")
    assert row.weights_path == str(weights)
    assert len(row.weights) == 64
    assert len(row.config) == 12
    train, val = row.data.split("/")
    assert (len(train), len(val)) == (12, 12)


def test_detectron2s_usual_files_are_there(finished: Path) -> None:
    for name in ("log.txt", "metrics.json", "config.yaml", "last_checkpoint", "model_final.pth"):
        assert (finished / name).is_file()
    assert list(finished.glob("events.out.tfevents.*"))
    assert isinstance(
        json.loads((finished / "inference" / "coco_instances_results.json").read_text()), list
    )
    dataset = json.loads((finished / "dataset.json").read_text())
    assert dataset["classes"] == ["square", "bar"]
    assert Path(dataset["images"]).is_dir()
    lines = [json.loads(line) for line in (finished / "metrics.json").read_text().splitlines()]
    assert "bbox/AP" in lines[-1]


@pytest.mark.parametrize("after", [2, 3])  # at a checkpoint, and one iteration beyond it
def test_a_resumed_run_ends_with_the_same_bits(
    data: Path, weights: Path, finished: Path, tmp_path: Path, after: int
) -> None:
    _interrupted(data, weights, tmp_path / "r", after)
    assert run(request(data, tmp_path / "r", seed=7, resume=True)) == 0
    one, other = _model(finished), _model(tmp_path / "r")
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []
    values = [
        {row.metric: row.value for row in read_rows(folder / "results.jsonl")}
        for folder in (finished, tmp_path / "r")
    ]
    assert values[0] == values[1]
    lines = (tmp_path / "r" / "metrics.json").read_text().splitlines()
    iterations = [json.loads(line)["iteration"] for line in lines]
    assert len(set(iterations)) == len(iterations)


def test_sigterm_saves_at_the_end_of_its_iteration(
    data: Path, weights: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "r"

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    ended = _interrupted(data, weights, output, 2, terminate, Stopped)
    assert "model_0000002.pth is saved: go on with --resume" in str(ended)
    assert signal.getsignal(signal.SIGTERM) == before
    saved = sorted(path.name for path in output.glob("model_*.pth"))
    assert saved == ["model_0000001.pth", "model_0000002.pth"]  # the signal came after its hook
    assert run(request(data, output, seed=7, resume=True)) == 0
    assert all(torch.equal(v, _model(output)[k]) for k, v in _model(finished).items())


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    data: Path, weights: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "r"
    _interrupted(data, weights, output, 3)
    whole = output / "model_0000001.pth"
    (output / "model_0000002.pth").write_bytes(whole.read_bytes()[:-1000])
    (output / "last_checkpoint").write_text("model_0000002.pth")
    assert run(request(data, output, seed=7, resume=True)) == 0
    one, other = _model(finished), _model(output)
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_that_died_before_its_first_checkpoint_starts_over(
    data: Path, weights: Path, finished: Path, tmp_path: Path
) -> None:
    _interrupted(data, weights, tmp_path / "r", 1)
    assert run(request(data, tmp_path / "r", seed=7, resume=True)) == 0
    assert all(torch.equal(v, _model(tmp_path / "r")[k]) for k, v in _model(finished).items())


def test_a_finished_run_resumed_does_nothing_and_says_so(
    data: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.glob("*.pth")}
    rows = len(read_rows(finished / "results.jsonl"))
    assert run(request(data, finished, seed=7, resume=True)) == 0
    assert "finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in finished.glob("*.pth")} == before
    assert len(read_rows(finished / "results.jsonl")) == rows


def test_rows_of_other_data_do_not_finish_a_run(data: Path, finished: Path, tmp_path: Path) -> None:
    """As where somebody has copied the rows of another run into its folder."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    own = read_rows(copy / "results.jsonl")
    text = (copy / "results.jsonl").read_text()
    (copy / "results.jsonl").write_text(text.replace(own[0].data, "0" * 12 + "/" + "1" * 12))
    assert run(request(data, copy, seed=7, resume=True)) == 0
    again = read_rows(copy / "results.jsonl")[len(own) :]
    assert [(row.data, row.metric, row.value) for row in again] == [
        (row.data, row.metric, row.value) for row in own
    ]


def test_a_trained_detector_is_evaluated_alone_under_its_own_name(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "judged"
    detector = str(finished / "model_final.pth")
    assert run(request(data, output, weights=detector, eval_only=True)) == 0
    trained, judged = (read_rows(f / "results.jsonl") for f in (finished, output))
    assert [(r.metric, r.value) for r in judged] == [(r.metric, r.value) for r in trained]
    assert {(r.protocol, r.init, r.seed, r.weights, r.data) for r in judged} == {
        (r.protocol, r.init, r.seed, r.weights, r.data) for r in trained
    }


def test_a_detector_of_the_zoo_is_evaluated_from_its_pickle(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    arrays = {name: value.numpy() for name, value in _model(finished).items()}
    arrays["pixel_mean"] = np.array([123.675, 116.28, 103.53], np.float32).reshape(3, 1, 1)
    detector, output = tmp_path / "model_final_f10217.pkl", tmp_path / "judged"
    detector.write_bytes(
        pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, protocol=4)
    )
    asked = request(data, output, weights=str(detector), eval_only=True)
    _refused(asked, "does not say which mean", "--assume-convention")
    assert run(dataclasses.replace(asked, assume_convention=True)) == 0
    trained, judged = (read_rows(f / "results.jsonl") for f in (finished, output))
    assert [(r.metric, r.value) for r in judged] == [(r.metric, r.value) for r in trained]
    _refused(request(data, tmp_path / "new", weights=str(detector)), "is a whole detector")


def test_two_trials_of_one_seed_agree_and_another_seed_differs(
    data: Path, weights: Path, finished: Path, tmp_path: Path
) -> None:
    for name, seed in (("same", 7), ("other", 8)):
        assert run(request(data, tmp_path / name, weights=str(weights), seed=seed)) == 0
    head = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(_model(finished)[head], _model(tmp_path / "same")[head])
    assert not torch.equal(_model(finished)[head], _model(tmp_path / "other")[head])


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(
    data: Path, weights: Path, tmp_path: Path
) -> None:
    wild = ["SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0"]
    with pytest.raises(NonFiniteLoss, match=r"not finite at iteration \d+ \(.*loss_cls"):
        run(request(data, tmp_path / "r", weights=str(weights), overrides=wild))
    assert not (tmp_path / "r" / "model_final.pth").exists()
    assert not (tmp_path / "r" / "results.jsonl").exists()


def _refused(asked: Any, *words: str) -> None:
    output = Path(asked.output)
    before = sorted(output.rglob("*")) if output.exists() else None
    with pytest.raises(InputError) as error:
        run(asked)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
    assert (sorted(output.rglob("*")) if output.exists() else None) == before


def test_what_cannot_go_well_is_refused_before_anything_is_written(
    data: Path, weights: Path, finished: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    _refused(request(data, finished), "not empty", "--resume")
    _refused(request(data, new, resume=True), "--resume", "no run")
    gpus = torch.cuda.device_count()
    _refused(request(data, new, num_gpus=gpus + 1), f"--num-gpus {gpus + 1}", f"has {gpus}")
    _refused(request(data, new, num_processes=3), "IMS_PER_BATCH 2", "3 processes")
    _refused(request(data, new, num_machines=2), "--dist-url")
    _refused(request(data, new, weights=str(finished / "model_final.pth")), "whole detector")
    _refused(request(data, new, weights=str(weights), eval_only=True), "without heads")
    _refused(request(data, new, eval_only=True), "--weights")
    _refused(request(data, new, seed=-1), "SEED")
    _refused(request(data, new, val_json=""), "--val-json and --val-images")
    _refused(request(data, new, weights=str(tmp_path / "none.pth")), "none.pth does not exist")
    _refused(request(data, finished, seed=8, resume=True), "SEED")
    longer = ["SOLVER.MAX_ITER", "9"]
    _refused(request(data, finished, seed=7, resume=True, overrides=longer), "SOLVER.MAX_ITER")


def test_a_run_is_resumed_with_its_own_weights_and_data_only(
    data: Path, weights: Path, finished: Path, tmp_path: Path
) -> None:
    other = write_backbone(tmp_path / "ctc_d2.pth", method="ctc")
    _refused(request(data, finished, seed=7, resume=True, weights=str(other)), "ce_d2", "ctc_d2")
    renamed = shutil.copy(weights, tmp_path / "renamed.pth")
    assert run(request(data, finished, seed=7, resume=True, weights=str(renamed))) == 0
    content = json.loads((data / "instances.json").read_text())
    fewer = tmp_path / "few.json"
    fewer.write_text(json.dumps(content | {"annotations": content["annotations"][:8]}))
    for split in ("train", "val"):
        asked = request(data, finished, seed=7, resume=True)
        asked = dataclasses.replace(asked, **{f"{split}_json": str(fewer)})
        _refused(asked, "--resume", f"{split} annotations")


def test_a_damaged_record_of_a_run_is_named_and_advice_leads_on(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    """--resume must not advise what a start without it refuses."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    whole = json.loads((folder / "run.json").read_text())
    torn = [[], {"facts": 3}, {k: v for k, v in whole.items() if k != "weights_file"}]
    torn += [whole | {"identity": whole["identity"] | {"data": 5}}]
    for text in ("", "{", *map(json.dumps, torn)):
        (folder / "run.json").write_text(text)
        _refused(request(data, folder, seed=7, resume=True), "run.json is damaged", "--eval-only")
    evaluated = request(
        data, tmp_path / "eval", weights=str(folder / "model_final.pth"), eval_only=True
    )
    assert run(evaluated) == 0


def test_a_checkpoint_that_lacks_something_is_passed_over_or_named(
    data: Path, weights: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "r"
    _interrupted(data, weights, output, 3)
    whole = output / "model_0000001.pth"
    content = torch.load(whole, weights_only=True)
    trainer = {k: v for k, v in content["trainer"].items() if k != "hooks"}  # no schedule
    for lacking in (content | {"world_size": None}, content | {"trainer": trainer}):
        torch.save(lacking, output / "model_0000002.pth")
        found = Checkpointer(output).newest()
        assert found is not None
        assert found[0] == whole
    asked = request(data, output, seed=7, resume=True)
    assert run(asked) == 0  # from the one before
    one, other = _model(finished), _model(output)
    assert all(torch.equal(one[k], other[k]) for k in one)
    for path in output.glob("model_*.pth"):
        path.unlink()
    partly = {k: v for k, v in content["model"].items() if "fpn" not in k}
    torch.save(content | {"model": partly}, whole)
    (output / "results.jsonl").unlink()
    with pytest.raises(InputError, match=r"does not fit the run: .*fpn_lateral"):
        run(asked)


def test_weights_that_disagree_with_the_config_are_refused(data: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    stride = write_backbone(tmp_path / "stride.pth", stride_in_1x1=True)
    _refused(request(data, new, weights=str(stride)), "STRIDE_IN_1X1", "stride.pth")
    foreign = write_backbone(tmp_path / "bgr.pth", channel_order="BGR")
    _refused(request(data, new, weights=str(foreign)), "INPUT.FORMAT")
    none = write_backbone(tmp_path / "none.pth", {"stem.conv1.weight": torch.zeros(64, 3, 7, 7)})
    _refused(request(data, new, weights=str(none)), "1 of the 100")


def test_the_convention_of_the_weights_can_be_taken(data: Path, tmp_path: Path) -> None:
    foreign = write_backbone(tmp_path / "bgr.pth", channel_order="BGR", std=[1.0, 1.0, 1.0])
    taken = request(
        data,
        tmp_path / "new",
        weights=str(foreign),
        convention_from_weights=True,
        overrides=["SOLVER.MAX_ITER", "1", "TEST.PRECISE_BN.ENABLED", "False"],
    )
    assert run(taken) == 0
    from detection.cfg import load_cfg

    cfg = load_cfg(tmp_path / "new" / "config.yaml")
    assert cfg.INPUT.FORMAT == "BGR"
    assert pytest.approx([103.53, 116.28, 123.675]) == cfg.MODEL.PIXEL_MEAN
    assert cfg.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]


def test_two_ranks_train_with_shared_statistics(data: Path, weights: Path, tmp_path: Path) -> None:
    asked = request(data, tmp_path / "r", weights=str(weights), num_processes=2, seed=7)
    assert run(asked) == 0
    rows = read_rows(tmp_path / "r" / "results.jsonl")
    assert (rows[0].details["world_size"], rows[0].details["bn"]) == (2, "naiveSyncBN")
    assert (tmp_path / "r" / "log.txt.rank1").stat().st_size > 0


def test_a_run_folder_in_use_is_refused(
    data: Path, weights: Path, finished: Path, tmp_path: Path
) -> None:
    with locked(finished):
        _refused(request(data, finished, seed=7, resume=True), "whole is in use by another run")
    with locked(tmp_path / "new"):
        _refused(request(data, tmp_path / "new", weights=str(weights)), "new is in use by another")


NOT_FINITE = """
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import detection
from core import dist
from core.errors import NonFiniteLoss
from detectron2.utils import comm
from detection.trainer import Trainer, agree_on_finite

dist.init("cpu", 60)
comm.create_local_process_group(2)

class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {"loss_cls": self.weight * (float("nan") if batch == (1, 2) else 1.0)}

loader = [(dist.rank(), iteration) for iteration in range(4)]  # the second rank's third is bad
model = DistributedDataParallel(Loss())
trainer = Trainer(model, loader, torch.optim.SGD(model.parameters(), lr=0.1), None)
try:
    trainer.train(0, 4)
except NonFiniteLoss as error:
    assert "not finite at iteration 2" in str(error), error
    assert abs(model.module.weight.item() - 0.8) < 1e-6  # two steps
else:
    raise AssertionError("no error")

head = nn.Identity()
head.register_forward_hook(agree_on_finite)
bad = torch.tensor([float("inf") if dist.rank() else 0.0])
try:
    head(([bad], [torch.zeros(1)]))
except FloatingPointError:
    dist.shutdown()
else:
    raise AssertionError("no error")
"""


def test_a_loss_that_is_not_finite_on_one_rank_ends_both(run_ranks: Any) -> None:
    run_ranks(NOT_FINITE, 2)


NAIVE_SYNC = """
import sys
import torch
import torch.distributed as td
from core import dist
import detection
from detectron2.layers import get_norm
from detectron2.utils import comm

dist.init("cpu")
comm.create_local_process_group(dist.world_size())
torch.manual_seed(0)
batch = torch.randn(8, 3, 5, 5) * torch.arange(1, 9).view(8, 1, 1, 1)
norm = get_norm("naiveSyncBN", 3)
share = batch[dist.rank() :: dist.world_size()]
norm(share)
whole = get_norm("BN", 3)
whole(batch)
assert torch.allclose(norm.running_mean, whole.running_mean, atol=1e-6)
n = batch.numel() / 3  # BN's running variance is the unbiased one, naiveSyncBN's is not
unbiased = (norm.running_var - 0.9) * n / (n - 1) + 0.9
assert torch.allclose(unbiased, whole.running_var, rtol=1e-4), (unbiased, whole.running_var)
dist.shutdown()
"""


def test_naive_sync_norm_sees_the_batch_of_all_ranks(run_ranks: Any) -> None:
    run_ranks(NAIVE_SYNC, 2)
