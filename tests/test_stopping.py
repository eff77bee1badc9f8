"""Tools of every step under a stop signal: status 75, all saved, and the same command goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.timeline import Timeline, TimelineConfig
from core.config import load_config
from core.errors import STOPPED_STATUS
from core.results import read_rows
from models.checkpoint import load_plain
from pretrain.recipe import PretrainConfig
from pretrain.run import pretrain
from tests.detection_tiny import CONFIG, SMALL, write_backbone, write_pair
from tests.faults import COMMON, STAGES
from tests.test_signals import ROOT, wait_until

SECONDS = 120  # in which a tool must have come to a moment, or to its end, on a busy machine


class Tool:
    """A tool in a process group of its own, as a scheduler starts it."""

    def __init__(self, folder: Path, *words: object, **environment: str) -> None:
        self.log = folder / f"said{len(list(folder.glob('said*')))}.txt"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tools" / str(words[0])), *map(str, words[1:])],
                stdout=log, stderr=log, start_new_session=True, cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )  # fmt: skip

    def wait_for(self, what: Callable[[], object]) -> None:
        """Wait until something holds; the tool must not end before."""
        wait_until(lambda: bool(what()) or self.process.poll() is not None, SECONDS)
        assert self.process.poll() is None, self.log.read_text()

    def stop(self, number: signal.Signals, group: bool) -> None:
        """Send a signal and expect that all is saved and nobody is left."""
        (os.killpg if group else os.kill)(self.process.pid, number)
        assert self.end() == STOPPED_STATUS, self.log.read_text()
        wait_until(lambda: not self._alive(), 10)

    def end(self) -> int:
        return self.process.wait(SECONDS)

    def _alive(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture(scope="module")
def detection_words(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The command line of a tiny detector, without its output, processes and iterations."""
    folder = tmp_path_factory.mktemp("detection")
    json_path, images = write_pair(folder / "data")
    words: list[object] = ["train_net.py", "--config", CONFIG, "--seed", "7"]
    for split in ("train", "val"):
        words += [f"--{split}-json", json_path, f"--{split}-images", images]
    return [*words, "--weights", write_backbone(folder / "b_d2.pth"), *SMALL]


@pytest.mark.parametrize(
    ("processes", "number", "group"), [(1, signal.SIGHUP, True), (2, signal.SIGUSR1, False)]
)
def test_detection(
    tmp_path: Path,
    detection_words: list[object],
    processes: int,
    number: signal.Signals,
    group: bool,
) -> None:
    """To the whole group with a loading process; to the first of three processes."""
    run = tmp_path / "run"
    options = ["--num-gpus", "0", "--num-processes", processes, "--output", run]
    many = ["SOLVER.MAX_ITER", "100000", "DATALOADER.NUM_WORKERS", "1"]
    tool = Tool(tmp_path, *detection_words, *many, *options)
    tool.wait_for(lambda: (run / "model_0000003.pth").exists())
    tool.stop(number, group)
    name = (run / "last_checkpoint").read_text()
    assert tool.log.read_text().count(f"{name} is saved: go on with --resume\n") == 1
    assert load_plain(run / name)["iteration"] >= 3
    assert not (run / "results.jsonl").exists()


def test_detection_as_ranks_that_something_else_has_started(
    tmp_path: Path, detection_words: list[object]
) -> None:
    """Under torchrun or srun they are one run, not one each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [*detection_words, "SOLVER.MAX_ITER", "2", "--output", tmp_path / "run"]
    ranks = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        ranks.append(
            Tool(
                tmp_path / str(rank), *words, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            )
        )  # fmt: skip
    assert [tool.end() for tool in ranks] == [0, 0], [tool.log.read_text() for tool in ranks]
    rows = read_rows(tmp_path / "run" / "results.jsonl")
    assert {row.details["world_size"] for row in rows} == {2}
    assert len({row.metric for row in rows}) == len(rows)


@pytest.fixture(scope="module")
def pretrained(tiny_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny network."""
    words = ["method", "ce", *COMMON, *STAGES["ce"], "data.root", str(tiny_npz)]
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(load_config(PretrainConfig, None, words), folder)
    return folder


def test_fine_tuning(tmp_path: Path, pretrained: Path, tiny_npz: Path) -> None:
    """With a loading process, which gets the signal too."""
    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(
        f"data: {{name: npz, root: {tiny_npz}, image_size: 8, workers: 1}}\n"
        "methods: [finetune]\nfinetune: {steps: 100000, lr: [0.01], weight_decay: [0.0]}\n"
        "loop: {batch_size: 8, resume_every: 2, log_every: 1}\nfeatures: {cache: none}\n"
    )
    weights = pretrained / "checkpoints" / "epoch_0002.pth"
    words = ["run_transfer.py", "--config", config, "--weights", weights, "--output", run]
    tool = Tool(tmp_path, *words)
    final = run / "finetune" / "final"
    tool.wait_for(lambda: (final / "resume.previous.pth").exists())
    tool.stop(signal.SIGTERM, group=True)
    state = load_plain(final / "resume.pth")["position"]["iteration"]
    assert state >= json.loads((final / "log.jsonl").read_text().splitlines()[-1])["iteration"]
    assert not (final / "score.json").exists()


def test_analysis(tmp_path: Path, pretrained: Path) -> None:
    """The rows of finished measurements stay; the one that was under way is done again."""
    config = tmp_path / "tiny.yaml"
    text = (
        "quantities: [{}]\nfeatures: {{cache: false}}\ndevice: cpu\ninformation: {{side: 4, "
        "xt: {{iterations: 100000000}}}}\n"
    )
    config.write_text(text.format("retrieval, mi_xt"))
    words = ["run_analysis.py", "--run", pretrained, "--config", config]

    def rows() -> list[Any]:
        return [row for row in read_rows(pretrained / "results.jsonl") if row.step == "analysis"]

    tool = Tool(tmp_path, *words)
    tool.wait_for(rows)
    tool.stop(signal.SIGUSR1, group=False)
    kept = rows()
    assert {row.metric for row in kept} == {"recall@1"}
    config.write_text(text.format("retrieval"))
    for _ in Timeline(pretrained, load_config(TimelineConfig, config), "tiny").work():
        pass
    assert rows()[: len(kept)] == kept
    assert len(rows()) == 3 * 2  # epochs × splits, none of them twice
