"""The runner of suites, with stand-ins for the tools: what runs, what is skipped, what goes on.

The stand-ins obey the real command lines, keep a diary of their calls, and fail, stop or take
long on request (files named ``fail-<output>`` and the like beside the diary).
"""

import csv
import dataclasses
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.config import ROOT, InputError, load_config, save_config
from core.disk import free_bytes, size
from report.runs import read_run
from suite.benchmark import benchmark, print_plan
from suite.estimates import Clock, expected_disk
from suite.local import LocalExecutor, Task, is_held, last_error
from suite.page import rebuild
from suite.plan import Job, command, make_plan, select
from suite.records import Record, Records, State, assessments, differences, make_room
from suite.runner import run_plan
from suite.schema import Suite, load_suite

HEAD = """
import hashlib, json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
words = sys.argv[1:]
with (here / "diary").open("a") as diary:
    print(json.dumps([pathlib.Path(__file__).stem, *words]), file=diary)
def after(name): return words[words.index(name) + 1]
output = pathlib.Path(after("--output"))
mark = output.name.removesuffix("_d2.pth")
data = here.parent / "data"
pairs = words[words.index("--output") + 2:]
pairs = [word for word in pairs if word not in ("--resume", "--dry-run")]
pairs = dict(zip(pairs[::2], pairs[1::2]))
version = int(pairs.get("version", 1))
own = {k: v for k, v in pairs.items() if k not in ("seed", "version", "data.workers")}
identity = dict(config=json.dumps([after("--config"), own]) if "--config" in words else "",
    data=(data / "labels.txt").read_text() if data.exists() else sys.exit("error: no data"),
    version=version)
def write_row(step, metric, value, weights, seed):
    row = dict(step=step, protocol=pathlib.Path(after("--config")).stem, dataset="shapes",
        split="val", metric=metric, value=value, unit="%", init=after("--init"), seed=seed,
        weights=weights, code="c", schema=2, details={"read_from": [str(data)]}, **identity)
    with (output / "results.jsonl").open("a") as file:
        print(json.dumps(row), file=file)
if "--dry-run" in words:
    assert not output.exists()
    print("identity:", json.dumps({key: [value] for key, value in identity.items()}))
    sys.exit(0)
def stop_if_asked(kind):
    if (here / f"fail-{kind}-{mark}").exists():
        print("cannot go on", file=sys.stderr)
        sys.exit(1)
"""
PRETRAIN = (
    HEAD
    + """
if "--resume" in words:
    assert (output / "resume.pth").exists()
elif output.exists() and any(output.iterdir()):
    sys.exit(2)
(output / "checkpoints").mkdir(parents=True, exist_ok=True)
(output / "resume.pth").write_text("x")
stop_if_asked("pretrain")
for epoch in (9, 10):
    path = output / f"checkpoints/epoch_{epoch:04d}.pth"
    path.write_text(f"{sorted(own.items())} {identity['data']} {pairs['seed']} {epoch}")
(output / "log.jsonl").write_text('{"iteration": 0, "loss": 2}\\n{"iteration": 1, "loss": 1}\\n')
if words[0] != "random":
    weights = hashlib.sha256(path.read_bytes()).hexdigest()
    write_row("pretrain", "top1", 50.0, weights, int(pairs["seed"]))
"""
)
CONVERT = (
    HEAD
    + """
source = pathlib.Path(words[0])
stop_if_asked("convert")
output.write_text("converted " + (source.read_text() if source.exists() else words[0]))
print("converted", source.name)
"""
)
DETECT = (
    HEAD
    + """
if "--resume" in words:
    assert (output / "last_checkpoint").exists()
elif output.exists() and any(output.iterdir()):
    sys.exit(2)
output.mkdir(parents=True, exist_ok=True)
(output / "last_checkpoint").write_text("model_1.pth")
stop_if_asked("detect")
if (here / f"hang-{mark}").exists():
    def save(number, frame):
        (output / "saved").write_text("in time")
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    end = time.monotonic() + 60
    while not (here / f"go-{mark}").exists() and time.monotonic() < end:
        print("hanging", flush=True)
        time.sleep(0.05)
weights = hashlib.sha256(pathlib.Path(after("--weights")).read_bytes()).hexdigest()
write_row("detection", "bbox/AP", 10.0 + len(after("--init")), weights, int(after("--seed")))
"""
)


class Bench:
    """A suite of two initialisations × one protocol on stand-in tools."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tools, self.root = folder, folder / "tools", folder / "runs"
        self.tools.mkdir()
        for name, text in (
            ("run_pretrain", PRETRAIN), ("convert_to_d2", CONVERT), ("train_net", DETECT),
        ):  # fmt: skip
            (self.tools / f"{name}.py").write_text(textwrap.dedent(text))
        (folder / "data").mkdir()
        (folder / "data/labels.txt").write_text("cat dog")
        (folder / "ce.yaml").write_text("optim: {lr: 0.1}\n")
        (folder / "quick.yaml").write_text("SOLVER: {BASE_LR: 0.02}\n")
        self.config = folder / "suite.yaml"
        self.config.write_text(
            f"""
            initialisations:
              random: {{method: random, config: {folder}/ce.yaml, overrides: {{arch: r18}}}}
              ce: {{config: {folder}/ce.yaml, method: ce}}
            protocols:
              quick:
                config: {folder}/quick.yaml
                step: detection
                overrides: {{SOLVER.MAX_ITER: 5}}
            seeds: [1]
            """
        )

    def run(self, *overrides: str, page: bool = False, **request: object) -> int:
        """Run the suite; the page, which takes seconds to draw, only on request."""
        values = {"config": str(self.config), "output": str(self.root)} | request
        with pytest.MonkeyPatch.context() as patch:
            if not page:
                patch.setattr("report.html.render", lambda *_: "page")
            return benchmark(**values, overrides=overrides, tools=self.tools)  # type: ignore[arg-type]

    def calls(self) -> list[list[str]]:
        """Return the calls since the last time."""
        diary = self.tools / "diary"
        lines = diary.read_text().splitlines() if diary.exists() else []
        diary.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def tools_called(self) -> list[str]:
        """Return the runs since the last time, without those that only check."""
        calls = [call for call in self.calls() if "--dry-run" not in call]
        return [f"{call[0]} {Path(call[call.index('--output') + 1]).name}" for call in calls]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_every_cell_runs_once_with_the_agreed_command_lines(bench: Bench, capfd):
    assert bench.run(page=True) == 0
    calls = bench.calls()
    root, configs = str(bench.root), str(bench.folder)
    assert calls[:3] == [
        ["run_pretrain", "random", "--config", f"{configs}/ce.yaml", "--init", "random",
         "--output", f"{root}/pretrain/random-s1", "arch", "r18", "seed", "1"],
        ["convert_to_d2", f"{root}/pretrain/random-s1/checkpoints/epoch_0010.pth",
         "--output", f"{root}/weights/random-s1_d2.pth"],
        ["train_net", "--config", f"{configs}/quick.yaml", "--init", "random", "--seed", "1",
         "--weights", f"{root}/weights/random-s1_d2.pth", "--output", f"{root}/quick/random-s1",
         "SOLVER.MAX_ITER", "5"],
    ]  # fmt: skip
    assert calls[3][:2] == ["run_pretrain", "ce"]
    printed = capfd.readouterr().out
    assert "[1/6] pretrain random, seed 1: elapsed 0:00, ETA ≥ 0:24" in printed  # 2 conversions
    assert "converted epoch_0010.pth" in printed  # the children's own output passes through
    assert "| random" in printed
    assert "converted" in (bench.root / "logs/convert--ce-s1.log").read_text()
    for name in ("table.md", "table.tex", "table.csv", "report.html"):
        assert (bench.root / name).stat().st_size > 0


def test_what_is_done_is_skipped(bench: Bench, capfd):
    bench.run()
    bench.calls()
    table = (bench.root / "table.md").read_text()
    assert bench.run() == 0
    assert bench.calls() == []
    assert capfd.readouterr().out.count("done already") == 6
    assert (bench.root / "table.md").read_text() == table


def test_a_suite_that_was_moved_is_still_done(bench: Bench):
    bench.run()
    bench.calls()
    bench.root = bench.root.rename(bench.folder / "elsewhere")
    assert bench.run() == 0
    assert bench.calls() == []


def test_a_changed_recipe_is_named_and_only_what_depends_on_it_runs_again(bench: Bench, capfd):
    bench.run()
    bench.calls()
    bench.run("initialisations.ce.overrides.optim.lr", "0.2")
    assert bench.tools_called() == [
        "run_pretrain ce-s1", "convert_to_d2 ce-s1_d2.pth", "train_net ce-s1",
    ]  # fmt: skip
    printed = capfd.readouterr().out
    assert "the recipe has changed: optim.lr: 0.1 → 0.2" in printed
    assert "its input weights have changed" in printed
    assert (bench.root / "pretrain/ce-s1.old1/checkpoints").is_dir()  # nothing is lost
    assert len(read_run(bench.root / "quick/ce-s1").rows) == 1


def test_suites_that_share_a_folder_share_their_pretraining(bench: Bench):
    bench.run()
    bench.calls()
    (bench.folder / "more.yaml").write_text("SOLVER: {BASE_LR: 0.01}\n")
    other = bench.folder / "other.yaml"
    other.write_text(
        bench.config.read_text().replace("quick:", "more:").replace("quick.yaml", "more.yaml")
    )
    assert bench.run(config=str(other)) == 0
    assert bench.tools_called() == ["train_net random-s1", "train_net ce-s1"]


def test_a_changed_base_config_of_the_protocol_is_noticed(bench: Bench):
    bench.run()
    bench.calls()
    (bench.folder / "quick.yaml").write_text("SOLVER: {BASE_LR: 0.01}\n")
    bench.run()
    assert bench.tools_called() == ["train_net random-s1", "train_net ce-s1"]


def test_changed_weights_or_lost_rows_are_not_reused(bench: Bench):
    bench.run()
    bench.calls()
    (bench.root / "weights/ce-s1_d2.pth").write_text("tampered")
    (bench.root / "quick/random-s1/results.jsonl").unlink()
    bench.run()
    assert bench.tools_called() == ["train_net random-s1", "convert_to_d2 ce-s1_d2.pth"]


def test_a_key_that_no_number_depends_on_is_no_rerun(bench: Bench):
    bench.run()
    bench.calls()
    workers = ("initialisations.ce.overrides.data.workers", "4")
    assert bench.run(*workers) == 0
    assert bench.tools_called() == []
    assert bench.run(*workers) == 0
    assert bench.calls() == []  # the tools need not be asked again


def test_changed_labels_are_a_rerun_and_touched_files_are_not(bench: Bench, capfd):
    labels = bench.folder / "data/labels.txt"
    bench.run()
    bench.calls()
    labels.touch()
    assert bench.run() == 0
    assert bench.tools_called() == []
    os.utime(labels, (1, 1))  # long ago: the tools are asked once
    assert bench.run() == 0
    assert bench.run() == 0
    assert len(bench.calls()) == 2  # the pretraining, and the protocol for both initialisations
    labels.write_text("dog cat")
    capfd.readouterr()
    assert bench.run() == 0
    assert "changed or moved; its rows are of other data" in capfd.readouterr().out
    assert bench.tools_called() == [
        "train_net random-s1", "run_pretrain ce-s1", "convert_to_d2 ce-s1_d2.pth",
        "train_net ce-s1",
    ]  # fmt: skip
    assert len(read_run(bench.root / "pretrain/ce-s1.old1").rows) == 1  # nothing is lost


def test_data_that_are_gone_fail_their_cells_and_lose_nothing(bench: Bench, capfd):
    bench.run()
    (bench.folder / "data").rename(bench.folder / "elsewhere")
    assert bench.run() == 1
    assert "its rows cannot be checked: no data" in capfd.readouterr().out
    (bench.folder / "elsewhere").rename(bench.folder / "data")
    bench.calls()
    assert bench.run() == 0
    assert bench.tools_called() == []
    assert not list(bench.root.rglob("*.old1"))


def test_a_raised_version_of_a_protocol_is_a_rerun(bench: Bench, capfd):
    bench.run()
    bench.calls()
    assert bench.run("protocols.quick.overrides.version", "2") == 0
    assert bench.tools_called() == ["train_net random-s1", "train_net ce-s1"]
    assert "its rows are of another version" in capfd.readouterr().out


@pytest.mark.parametrize("damage", ["", '{"job": "quick/ce-s1", "sta'])
def test_damaged_records_are_repaired_from_the_run_folders(bench: Bench, capfd, damage: str):
    bench.run()
    bench.calls()
    table = (bench.root / "table.md").read_text()
    for record in (bench.root / "jobs").glob("*.json"):
        record.write_text(damage)
    assert bench.run() == 0
    assert bench.tools_called() == ["convert_to_d2 random-s1_d2.pth", "convert_to_d2 ce-s1_d2.pth"]
    assert (bench.root / "table.md").read_text() == table
    bench.calls()
    assert bench.run() == 0
    assert bench.calls() == []


def test_a_run_whose_record_is_damaged_is_resumed(bench: Bench):
    (bench.tools / "fail-detect-ce-s1").touch()
    assert bench.run() == 1
    (bench.tools / "fail-detect-ce-s1").unlink()
    (bench.root / "jobs/quick--ce-s1.json").write_text("")
    bench.calls()
    assert bench.run() == 0
    assert [(call[0], "--resume" in call) for call in bench.calls()] == [("train_net", True)]


def test_a_record_is_whole_or_as_before(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    plan = make_plan(load_suite(bench.config), "s", bench.root)
    job, records = plan.jobs[0], Records(bench.root)
    records.write(job, Record("done", {}, ""))
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(handle))
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        records.write(job, Record("failed", {}, ""))
    assert synced
    assert records.read(job) == Record("done", {}, "")


def test_the_reason_of_a_failure_is_found_in_a_log():
    assert last_error("error: no data\n") == "no data"
    traceback = "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA\n====\n"
    assert last_error(f"epoch 1\n{traceback}") == "torch.OutOfMemoryError: CUDA"
    assert last_error(f"{traceback}W0101 launcher: closing\n") == "torch.OutOfMemoryError: CUDA"
    assert last_error("loading\nKilled\n----\n") == "Killed"
    assert last_error("") == ""


def test_a_failed_cell_does_not_stop_the_others_and_is_named_with_its_log(bench: Bench, capfd):
    (bench.tools / "fail-pretrain-random-s1").touch()
    assert bench.run(page=True) == 1
    assert bench.tools_called() == [
        "run_pretrain random-s1", "run_pretrain ce-s1", "convert_to_d2 ce-s1_d2.pth",
        "train_net ce-s1",
    ]  # fmt: skip
    printed = capfd.readouterr()
    assert "FAILED, exit status 1: cannot go on; log:" in printed.out
    assert "! pretrain/random-s1 has failed" in printed.err
    assert "! quick/random-s1 was not run" in printed.err
    assert "cannot go on" in (bench.root / "logs/pretrain--random-s1.log").read_text()
    assert "pretrain/random-s1 has failed" in (bench.root / "report.html").read_text()
    (bench.tools / "fail-pretrain-random-s1").unlink()
    assert bench.run() == 0
    assert "--resume" in bench.calls()[0]  # it goes on from what was saved
    assert "Not measured" not in (bench.root / "table.md").read_text()


def test_a_tool_that_leaves_no_rows_has_failed_whatever_its_status(bench: Bench, capfd):
    (bench.tools / "train_net.py").write_text("print('nothing to do')")
    assert bench.run() == 1
    assert "left no result rows" in capfd.readouterr().out


def test_more_seeds_run_only_what_is_new_and_the_table_counts_trials(bench: Bench):
    bench.run()
    bench.calls()
    assert bench.run(seeds="1,2", only="ce") == 0
    assert bench.tools_called() == [
        "run_pretrain ce-s2", "convert_to_d2 ce-s2_d2.pth", "train_net ce-s2",
    ]  # fmt: skip
    table = (bench.root / "table.md").read_text()
    assert "2 (seeds 1, 2)" in table
    assert "1 of 2 trials so far" in table  # random has one; --only does not hide it


def test_given_weights_are_converted_once_for_all_seeds(bench: Bench):
    weights = bench.folder / "moco.pth"
    weights.write_text("moco")
    bench.config.write_text(
        f"""
        initialisations:
          moco: {{weights: {weights}, format: moco}}
        protocols:
          quick:
            config: {bench.folder}/quick.yaml
            step: detection
            overrides: {{SOLVER.MAX_ITER: 5}}
        baseline: moco
        seeds: [1, 2]
        """
    )
    assert bench.run() == 0
    calls = bench.calls()
    assert [call[0] for call in calls] == ["convert_to_d2", "train_net", "train_net"]
    assert calls[0][1:] == [
        str(weights), "--format", "moco", "--output", f"{bench.root}/weights/moco_d2.pth",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18.a1_in1k"])
def test_weights_of_a_library_are_known_by_their_name(bench: Bench, capfd, name: str):
    given = f"{{config: '', method: '', weights: '{name}'}}"
    assert bench.run("initialisations.ce", given, dry_run=True) == 0
    assert f"convert_to_d2.py {name} --output" in capfd.readouterr().out
    assert bench.run("initialisations.ce", given) == 0
    converted = [call for call in bench.calls() if call[0] == "convert_to_d2"]
    assert [name, "--output", f"{bench.root}/weights/ce_d2.pth"] in [c[1:] for c in converted]
    assert bench.run("initialisations.ce", given) == 0
    assert bench.calls() == []
    other = given.replace(name, "timm:resnet26")
    assert bench.run("initialisations.ce", other) == 0
    assert "the recipe has changed: weights: " + name in capfd.readouterr().out
    assert bench.tools_called() == ["convert_to_d2 ce_d2.pth", "train_net ce-s1"]


def test_missing_weights_are_said_before_anything_runs(bench: Bench):
    with pytest.raises(InputError, match=r"initialisations\.ce\.weights PATH"):
        bench.run("initialisations.ce", "{config: '', method: '', weights: nowhere.pth}")
    assert bench.calls() == []
    assert not bench.root.exists()


def test_dry_run_prints_the_plan_and_writes_nothing(bench: Bench, capsys):
    assert bench.run(dry_run=True) == 0
    printed = capsys.readouterr().out
    assert "2 cells, 6 steps" in printed
    assert "run_pretrain.py ce --config" in printed
    assert "--weights '<convert/ce-s1>'" in printed
    assert not bench.root.exists()
    bench.run()
    capsys.readouterr()
    bench.run("protocols.quick.overrides.SOLVER.MAX_ITER", "9", dry_run=True)
    printed = capsys.readouterr().out
    assert printed.count("] done ") == 4
    assert "SOLVER.MAX_ITER: 5 → 9" in printed
    assert "2 steps to run" in printed


RUN = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT / "tools")!r})
import _checkout
import report.html
from suite.benchmark import benchmark
report.html.render = lambda *_: "page"
config, root, tools = sys.argv[1:4]
_checkout.run(lambda: benchmark(config, root, jobs=int(sys.argv[4]), tools=pathlib.Path(tools)))
"""


def start(
    bench: Bench, jobs: int = 1, hanging: tuple[str, ...] = ("random",), **options: object
) -> subprocess.Popen[str]:
    """Start the suite in a process of its own, and wait until the hanging steps have begun."""
    for init in hanging:
        (bench.tools / f"hang-{init}-s1").touch()
    words = [sys.executable, "-c", RUN, *map(str, (bench.config, bench.root, bench.tools, jobs))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    process = subprocess.Popen(words, text=True, start_new_session=True, **pipes)  # type: ignore
    logs = [bench.root / f"logs/quick--{init}-s1.log" for init in hanging]
    wait_until(lambda: process.poll() is not None or all("hanging" in _text(log) for log in logs))
    assert process.poll() is None, process.communicate()
    return process


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    ("number", "to_group", "status"),
    [
        (signal.SIGTERM, True, 75),
        (signal.SIGUSR1, False, 75),
        (signal.SIGHUP, True, 75),
        (signal.SIGINT, True, 130),
    ],
)
def test_a_signal_lets_the_step_save_and_the_same_command_goes_on(
    bench: Bench, number: int, to_group: bool, status: int
):
    process = start(bench)
    (os.killpg if to_group else os.kill)(process.pid, number)
    said = "".join(process.communicate(timeout=120))
    assert process.returncode == status
    assert "the same command resumes from here" in said
    assert (bench.root / "quick/random-s1/saved").read_text() == "in time"
    (bench.tools / "hang-random-s1").unlink()
    bench.calls()
    assert bench.run() == 0
    calls = bench.calls()
    assert [call[0] for call in calls] == [
        "train_net",
        "run_pretrain",
        "convert_to_d2",
        "train_net",
    ]
    assert "--resume" in calls[0]


def test_a_closed_terminal_lets_the_step_save(bench: Bench):
    ours, its = os.openpty()
    terminal = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{RUN}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "RUN", terminal)
        process = start(bench, stdin=its, stdout=its, stderr=its)
    os.close(its)
    os.close(ours)
    assert process.wait(timeout=120) == 75
    assert (bench.root / "quick/random-s1/saved").read_text() == "in time"


def test_nohup_is_respected(bench: Bench):
    with pytest.MonkeyPatch.context() as patch:
        ignored = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{RUN}"
        patch.setattr(sys.modules[__name__], "RUN", ignored)
        process = start(bench)
    os.killpg(process.pid, signal.SIGHUP)
    (bench.tools / "go-random-s1").touch()
    process.communicate(timeout=120)
    assert process.returncode == 0


@pytest.mark.parametrize("ends_first", [True, False])
def test_a_step_survives_its_runner_and_the_next_one_finds_it(
    bench: Bench, capfd, ends_first: bool
):
    start(bench).kill()
    log = bench.root / "logs/quick--random-s1.log"
    seen = len(log.read_text())
    wait_until(lambda: len(log.read_text()) > seen + 30)  # it still writes, to its own log
    bench.calls()
    go = bench.tools / "go-random-s1"
    if ends_first:
        go.touch()
        wait_until((bench.root / "quick/random-s1/results.jsonl").exists)
    else:
        threading.Timer(1.0, go.touch).start()
    (bench.tools / "hang-random-s1").unlink()
    assert bench.run() == 0
    assert bench.tools_called() == [
        "run_pretrain ce-s1",
        "convert_to_d2 ce-s1_d2.pth",
        "train_net ce-s1",
    ]
    said = capfd.readouterr().out
    assert ("quick random, seed 1: process" in said and "runs it already" in said) != ends_first
    assert "quick random, seed 1: done already" in said
    assert len(read_run(bench.root / "quick/random-s1").rows) == 1
    assert bench.run() == 0
    assert bench.calls() == []


def test_a_second_runner_is_refused_and_so_are_cells_beside_a_step_that_was_left(bench: Bench):
    process = start(bench)
    with pytest.raises(InputError, match="is in use by another benchmark"):
        bench.run()
    process.kill()
    process.wait()
    with pytest.raises(InputError, match=r"quick--random-s1 still runs \(process \d+"):
        bench.run(only="ce")
    (bench.tools / "go-random-s1").touch()
    wait_until((bench.root / "quick/random-s1/results.jsonl").exists)
    wait_until(lambda: not is_held(bench.root / "jobs/quick--random-s1.lock"))
    assert bench.run(only="ce") == 0


def test_a_left_step_of_another_recipe_is_not_taken_for_this_one(bench: Bench, capfd):
    start(bench).kill()
    assert bench.run("protocols.quick.overrides.SOLVER.MAX_ITER", "9", only="random") == 1
    assert "but the recipe has changed: SOLVER.MAX_ITER: 5 → 9: end that" in capfd.readouterr().out
    (bench.tools / "go-random-s1").touch()
    wait_until(lambda: not is_held(bench.root / "jobs/quick--random-s1.lock"))


def test_several_jobs_run_at_once_and_leave_their_output_to_their_logs(
    bench: Bench, capfd, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    meet = (
        "\nimport os\nother = {'random': 'ce', 'ce': 'random'}[after('--init')]\n"
        "(here / after('--init')).write_text(os.environ['OMP_NUM_THREADS'])\n"
        "end = time.monotonic() + 30\n"
        "alone = (here / 'fail-pretrain-random-s1').exists()\n"
        "while not (alone or (here / other).exists()):\n"
        "    assert time.monotonic() < end\n    time.sleep(0.05)\n"
        "print('alone' if alone else 'they have met')\n"
    )
    (bench.tools / "train_net.py").write_text(textwrap.dedent(HEAD) + meet + DETECT)
    (bench.tools / "fail-pretrain-random-s1").touch()
    assert bench.run(jobs=2) == 1
    assert "quick ce, seed 1: done in 0:" in capfd.readouterr().out  # the other's end is no reason
    (bench.tools / "fail-pretrain-random-s1").unlink()
    shutil.rmtree(bench.root)
    assert bench.run(jobs=2) == 0
    printed = capfd.readouterr().out
    assert "they have met" in (bench.root / "logs/quick--ce-s1.log").read_text()
    assert "they have met" not in printed
    assert "quick ce, seed 1: started as process" in printed
    assert "quick ce, seed 1: done in 0:" in printed
    threads = max(len(os.sched_getaffinity(0)) // 2, 1)
    assert (bench.tools / "ce").read_text() == str(threads)


def test_an_interruption_ends_all_children_and_the_next_call_goes_on(bench: Bench):
    process = start(bench, jobs=2, hanging=("random", "ce"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    for init in ("random", "ce"):
        assert (bench.root / f"quick/{init}-s1/saved").read_text() == "in time"
        (bench.tools / f"hang-{init}-s1").unlink()
    bench.calls()
    assert bench.run(jobs=2) == 0
    assert [(call[0], "--resume" in call) for call in bench.calls()] == [("train_net", True)] * 2


def test_a_job_that_does_not_save_is_ended_when_the_user_hurries(tmp_path: Path):
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('deaf', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    executor = LocalExecutor(jobs=1)
    task = Task("deaf", words, tmp_path, tmp_path / "log", tmp_path / "lock")
    attempt = executor.start(task, print)
    wait_until(lambda: "\ndeaf" in task.log.read_text())
    looks = iter(range(1000))
    executor.stop(lambda: next(looks))
    end = attempt.ended()
    assert end is not None
    assert end.status == -signal.SIGKILL


def test_a_full_disk_loses_no_result(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    write = Records.write

    def full(records: Records, job: Job, record: Record) -> None:
        if job.name == "quick/random-s1" and record.seconds:
            raise InputError("no space left")
        write(records, job, record)

    monkeypatch.setattr(Records, "write", full)
    with pytest.raises(InputError, match="no space left"):
        bench.run()
    monkeypatch.undo()
    bench.calls()
    assert bench.run() == 0
    assert bench.tools_called() == [
        "run_pretrain ce-s1", "convert_to_d2 ce-s1_d2.pth", "train_net ce-s1",
    ]  # fmt: skip


def test_each_job_has_gpus_of_its_own(tmp_path: Path):
    code = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.5)"
    words = [sys.executable, "-c", code]
    executor = LocalExecutor(gpus=2, devices=["0", "1", "4", "7", "8"])
    assert executor.slots == 2
    tasks = [
        Task(str(n), words, tmp_path, tmp_path / str(n), tmp_path / f"{n}.lock", gpus=2)
        for n in range(3)
    ]
    first, second = (executor.start(task, print) for task in tasks[:2])
    while first.ended() is None or second.ended() is None:
        executor.wait()
    executor.start(tasks[2], print)
    executor.stop(int)
    seen = [task.log.read_text().splitlines()[1:] for task in tasks[:2]]
    assert seen == [["0,1"], ["4,7"]]
    assert LocalExecutor(devices=["0", "1"]).slots == 2
    assert LocalExecutor(devices=[]).slots == 1
    assert LocalExecutor(gpus=8, devices=[]).slots == 1
    with pytest.raises(InputError, match="at most 2 jobs"):
        LocalExecutor(jobs=3, gpus=2, devices=["0", "1", "2", "3"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("protocls: {}", "did you mean 'protocols'"),
        ("seeds: [1, 1]", "must be different"),
        ("seeds: one", "seeds"),
        ("baseline: cee", "did you mean 'ce'"),
        ("initialisations: {'a/b': {config: x}}", "cannot name a folder"),
        ("initialisations: {new: {}}", "either config or weights"),
        ("initialisations: {new: {config: x}}", "method"),
        ("initialisations: {ce: {weigths: x}}", "did you mean 'initialisations.ce.weights'"),
        ("references: [tabel5]", "did you mean 'table5'"),
        ("protocols: {quick: {config: ''}}", "needs a config"),
        ("protocols: {new: {config: some.yaml}}", "needs a step"),
        ("transfer: {dat: [cub200]}", "did you mean 'transfer.data'"),
        (
            "transfer: {data: [cub200], protocols: [linear]}\n"
            "protocols: {cub200_linear: {config: x.yaml, step: transfer}}",
            "both a protocol and a pair",
        ),
    ],
)
def test_a_wrong_suite_is_refused_in_words(bench: Bench, tmp_path: Path, text: str, complaint: str):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(f"_BASE_: suite.yaml\n{text}\n")
    with pytest.raises(InputError, match=complaint):
        load_suite(wrong)


def test_only_keeps_what_the_named_cells_need(bench: Bench):
    plan = make_plan(load_suite(bench.config, ["seeds", "[1, 2]"]), "s", bench.root)
    names = [job.name for job in select(plan, ["quick/ce-s2"]).jobs]
    assert names == ["pretrain/ce-s2", "convert/ce-s2", "quick/ce-s2"]
    with pytest.raises(InputError, match="names no cell"):
        select(plan, ["ctc"])


def test_several_gpus_reach_both_tools(bench: Bench):
    plan = make_plan(load_suite(bench.config, ["gpus", "4"]), "s", bench.root)
    pretrain = command(plan.job("pretrain/ce-s1"), None)
    assert pretrain[1:5] == [str(ROOT / "tools/launch.py"), "--processes=4", "--nodes", "1"]
    detect = command(plan.job("quick/ce-s1"), "w.pth", resume=True)
    assert detect[detect.index("--num-gpus") + 1] == "4"
    assert "--resume" in detect


def test_the_report_is_rebuilt_from_rows_alone(
    bench: Bench, capsys, monkeypatch: pytest.MonkeyPatch
):
    bench.run()
    monkeypatch.setattr("report.html.render", lambda *_: "page")
    table = (bench.root / "table.md").read_text()
    for name in ("pretrain", "quick"):
        shutil.copytree(bench.root / name, bench.folder / "laptop" / name)
    shutil.copy(bench.root / "suite.yaml", bench.folder / "laptop")
    for name in ("laptop", "runs"):
        rebuild([str(bench.folder / name)], output=str(bench.folder / "again"))
        assert (bench.folder / "again/table.md").read_text() == table
    capsys.readouterr()
    rebuild([str(bench.root)], baseline="random", columns="bbox/AP", format="csv")
    lines = list(csv.DictReader(capsys.readouterr().out.splitlines()[:3]))
    assert [line["delta"] for line in lines] == ["", "-4.0"]  # the stand-ins count letters
    with pytest.raises(InputError, match="no result rows"):
        rebuild([str(bench.root / "pretrain/random-s1")])


def test_transfers_read_the_weights_unconverted_and_get_their_seed_as_a_key(bench: Bench):
    config = bench.folder / "transfer" / "linear.yaml"
    config.parent.mkdir()
    config.write_text("dataset: flowers17\n")
    extra = ["protocols.linear.config", str(config), "protocols.linear.overrides.fast", "true"]
    plan = make_plan(load_suite(bench.config, extra), "s", bench.root)
    names = [job.name for job in select(plan, ["linear/ce-s1"]).jobs]
    assert names == ["pretrain/ce-s1", "linear/ce-s1"]
    words = command(plan.job("linear/ce-s1"), "epoch_0010.pth")
    assert words[1:] == [
        str(ROOT / "tools/run_transfer.py"), "--config", str(config), "--init", "ce",
        "--weights", "epoch_0010.pth", "--output", str(bench.root / "linear/ce-s1"),
        "fast", "true", "seed", "1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("suite", "cell", "recipe", "data"),
    [
        ("classification", "cub200_finetune/ce-s1", "finetune", "cub200"),
        ("classification", "inat18_finetune/ce-s1", "inat18", "inat18"),
        ("subset", "flowers17_linear/ctc-s2", "linear", "flowers17"),
        ("subset", "cifar10_subset_finetune/ctc-s2", "cifar10_subset", "cifar10_subset"),
    ],
)
def test_a_protocol_may_be_named_by_its_data_set_and_recipe(
    tmp_path: Path, suite: str, cell: str, recipe: str, data: str
):
    job = make_plan(load_suite(f"suites/{suite}.yaml"), "s", tmp_path).job(cell)
    config = str(ROOT / f"configs/transfer/{recipe}.yaml")
    assert job.words[:2] == ("--config", config)
    assert job.words[-2:] == ("--data", data)
    assert job.recipe["data.name"] == data


def test_each_protocol_of_transfer_meets_each_data_set(bench: Bench, tmp_path: Path):
    (tmp_path / "pairs.yaml").write_text(
        "_BASE_: suite.yaml\n"
        "transfer: {data: [cub200, aircraft], protocols: [linear, finetune],\n"
        "  minutes: {linear: 2}, overrides: {data.workers: 1}}\n"
    )
    more = ["protocols.aircraft_linear.overrides.seed", "3"]
    suite = load_suite(tmp_path / "pairs.yaml", more)
    assert list(suite.protocols) == [
        "cub200_linear", "aircraft_linear", "cub200_finetune", "aircraft_finetune", "quick",
    ]  # fmt: skip
    assert suite.protocols["cub200_linear"].minutes == 2
    assert suite.protocols["aircraft_linear"].overrides == {"data.workers": 1, "seed": 3}
    cell = make_plan(suite, "s", bench.root).job("aircraft_finetune/ce-s1")
    assert cell.kind == "transfer"
    assert ("--config", str(ROOT / "configs/transfer/finetune.yaml")) == cell.words[:2]
    assert cell.words[-2:] == ("--data", "aircraft")


def test_a_changed_recipe_is_named_key_by_key():
    assert differences({"a": 1, "b": [1]}, {"a": 1, "b": (1,)}) == {}
    said = {"a": "a: 1 → 2", "c": "c: (unset) → 3"}
    assert differences({"a": 1}, {"a": 2, "c": 3}) == said


def test_a_stranger_s_run_is_kept_and_crumbs_are_cleared(bench: Bench):
    plan = make_plan(load_suite(bench.config), "s", bench.root)
    job = plan.job("quick/ce-s1")
    job.output.mkdir(parents=True)
    (job.output / "notes.txt").write_text("mine")
    ((_, assessment, _),) = [v for v in assessments(plan) if v[0] is job]
    assert assessment.state is State.RERUN
    kept = make_room(job.output, ours=False)
    assert kept is not None
    assert (kept / "notes.txt").read_text() == "mine"
    run_plan(plan, bench.tools)
    (job.output / "results.jsonl").unlink()
    assert make_room(job.output, ours=True) is None
    assert not job.output.exists()


def test_the_quickstart_and_the_other_suites_can_be_read(capsys, tmp_path: Path):
    files = sorted((ROOT / "configs/suites").glob("*.yaml"))
    assert any(file.name == "quickstart.yaml" for file in files)
    for file in files:
        suite = load_suite(file)
        assert dataclasses.is_dataclass(suite)
        save_config(suite, tmp_path / "suite.yaml")
        assert load_config(Suite, tmp_path / "suite.yaml") == suite
        first, *_ = file.read_text().splitlines()
        assert first.endswith(f" tools/benchmark.py --config suites/{file.name}")
        plan = make_plan(suite, file.stem, "/nowhere")
        assert {cell.init for cell in plan.cells} == set(suite.initialisations)
        capsys.readouterr()
        print_plan(plan)
        assert f"{len(plan.cells)} cells" in capsys.readouterr().out


def test_eta_is_declared_then_measured_and_says_what_it_does_not_know(bench: Bench):
    extra = ["protocols.quick.minutes", "2", "seeds", "[1, 2]"]
    plan = make_plan(load_suite(bench.config, extra), "s", bench.root)
    clock = Clock(plan, Records(plan.root))
    detections = [plan.job(f"quick/{init}-s{seed}") for init in ("random", "ce") for seed in (1, 2)]
    pretrains = [plan.job("pretrain/ce-s1"), plan.job("pretrain/ce-s2")]
    assert clock.eta(detections) == "8:00"
    assert clock.eta(pretrains) == "--:--"
    assert clock.eta([*detections, *pretrains]) == "≥ 8:00"
    clock.note(detections[0], 30.0)
    clock.note(plan.job("pretrain/random-s1"), 1.0)  # tells nothing of another initialisation
    assert clock.eta(detections) == "2:00"
    assert clock.eta(pretrains) == "--:--"
    assert clock.eta(detections, slots=3) == "1:00"
    assert clock.eta(detections, slots=4, passed={"quick/ce-s1": 20.0}) == "0:30"
    clock.note(pretrains[0], 90.0)
    chain = [pretrains[0], plan.job("convert/ce-s1"), plan.job("quick/ce-s1"), pretrains[1]]
    assert clock.eta(chain, slots=2) == "2:12"  # 90 + 12 + 30: each after what it needs
    assert clock.eta(pretrains) == "3:00"


def test_disk_is_declared_then_measured_and_says_what_it_does_not_know(bench: Bench):
    extra = ["protocols.quick.gigabytes", "2", "seeds", "[1, 2]"]
    plan = make_plan(load_suite(bench.config, extra), "s", bench.root)
    records = Records(plan.root)
    detections = [plan.job(f"quick/{init}-s{seed}") for init in ("random", "ce") for seed in (1, 2)]
    pretrain = plan.job("pretrain/ce-s1")
    free = size(free_bytes(bench.root))
    assert expected_disk(plan, detections, records).startswith("8.00 GB, ")
    assert expected_disk(plan, [pretrain], records) == f"not known, {free} free"
    assert expected_disk(plan, [*detections, pretrain], records).startswith("≥ 8.00 GB, ")
    assert expected_disk(plan, [], records).startswith("0.0 MB, ")
    (detections[0].output / "sub").mkdir(parents=True)
    (detections[0].output / "sub/model.pth").write_bytes(bytes(3_000_000))
    (detections[0].output / "log").write_bytes(bytes(1_000_000))
    records.write(detections[0], Record("done", {}, ""))
    assert expected_disk(plan, detections[1:], records).startswith("12.0 MB, ")


def test_a_published_protocol_brings_its_hours_where_it_is_unchanged():
    def hours(*extra: str) -> float:
        plan = make_plan(load_suite("suites/table5_c4.yaml", extra), "s", "/nowhere")
        return plan.job("mask_rcnn_R50_C4_1x/ce-s1").minutes / 60

    assert hours() == 26.0
    assert hours("gpus", "4") == 52.0
    assert hours("gpus", "0") == 0.0
    assert hours("protocols.mask_rcnn_R50_C4_1x.overrides.SOLVER.MAX_ITER", "10") == 0.0


@pytest.mark.parametrize("tool", ["benchmark", "compare runs", "make_report runs", "train_net"])
def test_without_output_a_tool_chooses_the_folder(tool: str, monkeypatch: pytest.MonkeyPatch):
    name, *words = tool.split()
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    parser = runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["parser"]()
    assert not parser.parse_args(words).output  # Path("") would be true, and the present folder


@pytest.mark.parametrize("tool", sorted(p.name for p in (ROOT / "tools").glob("[a-z]*.py")))
def test_an_unknown_option_of_any_tool_is_one_sentence(tool: str, call_tool):
    status, _, said = call_tool(tool, "--nonsense")
    assert status == 2
    assert said.startswith("error: ")
    assert said.endswith(" (see --help)\n")
    assert said.count("\n") == 1
