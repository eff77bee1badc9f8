"""SLURM jobs, with stand-ins for its commands: submitted, warned, queued again, taken up again."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.config import ROOT
from core.errors import InputError
from core.launch import Place
from suite import slurm
from suite.local import LocalExecutor, Task
from suite.plan import launch
from suite.schema import Slurm, load_suite
from tests import fake_slurm

pytest.importorskip("submitit")

# Stands in for run_pretrain.py; a slow one ends only when it is stopped and resumed.
TOOL = """
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
if "--dry-run" in words:
    sys.exit("error: no such recipe" if "bad" in words else 0)
output = pathlib.Path(words[words.index("--output") + 1])
state = output / "resume.pth"
assert state.exists() == ("--resume" in words), words
output.mkdir(parents=True, exist_ok=True)
(output / "checkpoints").mkdir(exist_ok=True)
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print("at work as rank", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"), flush=True)
end = time.monotonic() + 60
while "slow" in words and "--resume" not in words and time.monotonic() < end:
    if asked and not state.exists():
        state.write_text("saved")
        print("saved", flush=True)
    if state.exists():  # all ranks stop at the same step
        sys.exit(75)
    time.sleep(0.05)
(output / "checkpoints/epoch_0001.pth").write_text("weights")
print("finished", " ".join(words), flush=True)
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of stand-ins for SLURM's commands, first in $PATH."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    fake_slurm.write_commands(folder)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    path = tmp_path / "run_pretrain.py"
    path.write_text(textwrap.dedent(TOOL))
    return path


def wait_for(what: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def says(log: Path, words: str) -> bool:
    return log.exists() and words in log.read_text()


def submit(tool: Path, *words: str, nodes: int = 1, settings: Slurm | None = None) -> Path:
    """Submit the stand-in; return its log."""
    output = tool.parent / "run"
    command = [str(tool), "ctc", "--output", str(output), *words]
    folder = tool.parent / "logs"
    return slurm.submit_tool(command, 0, nodes, settings or Slurm(), folder)[1]


def test_a_warned_job_saves_is_queued_again_and_resumes(cluster: Path, tool: Path):
    log = submit(tool, "slow")
    wait_for(lambda: says(log, "at work"))
    fake_slurm.warn(cluster, "1000")
    wait_for(lambda: says(log, "finished"))
    assert "saved" in log.read_text()
    assert f"finished ctc --resume --output {tool.parent / 'run'} slow" in log.read_text()
    wait_for(lambda: not list(cluster.glob("*.alive")))


def test_two_machines_meet(cluster: Path, tool: Path):
    log = submit(tool, nodes=2)
    other = log.with_name(log.name.replace("_0_", "_1_"))
    wait_for(lambda: says(log, "finished") and says(other, "finished"))
    assert "at work as rank 0 of 2" in log.read_text()
    assert "at work as rank 1 of 2" in other.read_text()


@pytest.mark.slow
def test_two_machines_save_and_resume_together(cluster: Path, tool: Path):
    log = submit(tool, "slow", nodes=2)
    other = log.with_name(log.name.replace("_0_", "_1_"))
    wait_for(lambda: says(log, "at work") and says(other, "at work"))
    fake_slurm.warn(cluster, "1000")
    wait_for(lambda: says(log, "finished ctc --resume") and says(other, "finished ctc --resume"))
    assert "saved" in log.read_text()


def test_crumbs_of_a_start_that_had_saved_nothing_are_cleared(tmp_path: Path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "config.yaml").write_text("arch: r18")
    words = ["tools/run_pretrain.py", "ctc", "--output", str(output)]
    step = slurm.Step(words, output)
    assert step.command() == [sys.executable, *words]
    assert output.exists()  # a first start leaves what it finds to the tool
    again = dataclasses.replace(step, queued_again=True)
    assert again.command() == [sys.executable, *words]
    assert not output.exists()


def test_a_job_asks_for_what_the_settings_say(cluster: Path, tool: Path):
    settings = Slurm(
        partition="gpu", account="vision", hours=1.5, cpus_per_gpu=4, memory_gb=32,
        save_seconds=90, extra={"qos": "high"},
    )  # fmt: skip
    words = [str(tool), "ctc", "--output", str(tool.parent / "run")]
    slurm.submit_tool(words, 2, 1, settings, tool.parent / "logs")
    script = (cluster / "1000.sh").read_text()
    for option in (
        "partition=gpu", "account=vision", "time=90", "cpus-per-task=8", "gpus-per-node=2",
        "mem=32768M", "signal=USR2@90", "qos=high", "requeue", "ntasks-per-node=1",
    ):  # fmt: skip
        assert f"#SBATCH --{option}\n" in script
    wait_for(lambda: not list(cluster.glob("*.alive")))


def test_tools_are_started_each_in_its_own_way():
    place = Place(2, 1, "n1", 29500)
    detect = launch(["tools/train_net.py", "--config", "c"], 8, place)
    assert detect[1:] == [
        "tools/train_net.py", "--num-gpus", "8", "--num-machines", "2", "--machine-rank", "1",
        "--dist-url", "tcp://n1:29500", "--config", "c",
    ]  # fmt: skip
    pretrain = launch(["tools/run_pretrain.py", "ce"], 8, place)
    assert pretrain[1:] == [
        str(ROOT / "tools/launch.py"), "--processes=8", "--nodes", "2", "--node", "1",
        "--host", "n1", "--port", "29500", "tools/run_pretrain.py", "ce",
    ]  # fmt: skip
    assert launch(["tools/run_analysis.py"], 1) == [sys.executable, "tools/run_analysis.py"]
    with pytest.raises(InputError, match="runs as one process"):
        launch(["tools/run_analysis.py"], 8)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nowhere.py"], "is no tool"),
        (["tools/run_analysis.py", "--run", "x"], "runs as one process"),
        (["tools/run_pretrain.py", "ctc"], "needs --output"),
        (["{tool}", "bad", "--output", "{tool}-run"], "no such recipe"),
        (["{tool}", "--output", "{tool}-run"], "invalid partition"),
    ],
)
def test_what_cannot_be_is_said_before_it_waits_in_a_queue(
    cluster: Path, tool: Path, words: list[str], complaint: str
):
    given = [word.format(tool=tool) for word in words]
    with pytest.raises(InputError, match=complaint):
        slurm.submit_tool(given, 2, 1, Slurm(partition="nowhere"), tool.parent / "logs")
    assert not list(cluster.glob("*.sh"))


def test_without_slurm_or_submitit_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, run_tool):
    words = ["--", "tools/convert_to_d2.py", "x.pth"]
    monkeypatch.setenv("PATH", "/nowhere")
    ended = run_tool("slurm.py", *words)
    assert ended.returncode == 2
    assert "there is no sbatch and no srun on this machine" in ended.stderr
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"pip install submitit$"):
        slurm.check_slurm()


def test_a_suite_s_settings_are_checked(tmp_path: Path):
    with pytest.raises(InputError, match=r"did you mean 'slurm\.partition'"):
        load_suite("suites/quickstart.yaml", ["slurm.partion", "gpu"])
    suite = load_suite("suites/quickstart.yaml", ["slurm.extra.qos", "high", "slurm.hours", "2"])
    assert suite.slurm == Slurm(hours=2.0, extra={"qos": "high"})


def run_suite(tmp_path: Path, tool: Path, words: str = "[slow]") -> subprocess.Popen[str]:
    """Start a suite of one pretraining on SLURM, in a process group of its own."""
    (tmp_path / "ce.yaml").write_text("{}")
    (tmp_path / "quick.yaml").write_text("{}")
    (tmp_path / "suite.yaml").write_text(
        f"initialisations: {{ce: {{method: ce, config: {tmp_path}/ce.yaml, arguments: {words}}}}}\n"
        f"protocols: {{quick: {{config: {tmp_path}/quick.yaml, step: transfer}}}}\n"
    )
    (tmp_path / "run_transfer.py").write_text(TRANSFER)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r})\n"
        "import _checkout\nfrom pathlib import Path\nimport report.html\n"
        "from suite.benchmark import benchmark\n"
        "report.html.render = lambda *_: 'page'\n"
        f"_checkout.run(lambda: benchmark({str(tmp_path / 'suite.yaml')!r}, "
        f"{str(tmp_path / 'runs')!r}, executor='slurm', tools=Path({str(tool.parent)!r})))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


TRANSFER = """
import hashlib, json, pathlib, sys
words = sys.argv[1:]
output = pathlib.Path(words[words.index("--output") + 1])
output.mkdir(parents=True)
row = dict(step="transfer", protocol="linear", dataset="d", split="test", metric="top1", value=1.0,
    unit="%", init="ce", seed=1, config="c", code="c")
weights = pathlib.Path(words[words.index("--weights") + 1]).read_bytes()
row["weights"] = hashlib.sha256(weights).hexdigest()
(output / "results.jsonl").write_text(json.dumps(row))
"""


def test_a_suite_s_jobs_outlive_it_and_are_taken_up_again(
    cluster: Path, tmp_path: Path, tool: Path
):
    log = tmp_path / "runs/logs/pretrain--ce-s1.log"
    first = run_suite(tmp_path, tool)
    wait_for(lambda: says(log, "at work"))
    first.terminate()
    said, _ = first.communicate(timeout=30)
    assert first.returncode == 75
    assert "SLURM continues with jobs 1000" in said
    second = run_suite(tmp_path, tool)
    time.sleep(1)
    fake_slurm.warn(cluster, "1000")  # and it is queued again while the second looks on
    said, complained = second.communicate(timeout=90)
    assert second.returncode == 0, complained
    assert "pretrain ce, seed 1: SLURM job 1000 runs it already" in said
    assert "quick ce, seed 1: started as SLURM job 1001" in said
    assert "--resume" in log.read_text()
    record = json.loads((tmp_path / "runs/jobs/pretrain--ce-s1.json").read_text())
    assert record["state"] == "done"
    assert "| ce" in said


def test_ctrl_c_during_sbatch_orphans_no_job_and_submits_none_again(
    cluster: Path, tmp_path: Path, tool: Path
):
    (cluster / "slow").touch()
    (cluster / "full").touch()
    first = run_suite(tmp_path, tool, words="[]")
    wait_for((cluster / "1000.pid").exists)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does: sbatch gets it too
    time.sleep(0.5)
    (cluster / "slow").unlink()
    said, _ = first.communicate(timeout=60)
    assert "SLURM continues with jobs 1000" in said
    (cluster / "full").unlink()
    second = run_suite(tmp_path, tool, words="[]")
    said, complained = second.communicate(timeout=90)
    assert second.returncode == 0, complained
    assert sorted(path.stem for path in cluster.glob("*.sh")) == ["1000", "1001"], said
    assert "quick ce, seed 1: started as SLURM job 1001" in said


def test_a_runner_killed_during_sbatch_leaves_no_job_beside_its_second(
    cluster: Path, tmp_path: Path, tool: Path
):
    (cluster / "slow").touch()
    (cluster / "full").touch()
    first = run_suite(tmp_path, tool, words="[]")
    wait_for((cluster / "1000.pid").exists)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    (cluster / "slow").unlink()
    second = run_suite(tmp_path, tool, words="[]")
    wait_for((cluster / "1001.pid").exists)
    assert not (cluster / "1000.alive").exists()
    (cluster / "full").unlink()
    said, complained = second.communicate(timeout=90)
    assert second.returncode == 0, complained
    assert "pretrain ce, seed 1: started as SLURM job 1001" in said
    assert (tmp_path / "runs/logs/pretrain--ce-s1.log").read_text().count("finished") == 1


def test_a_job_in_the_queue_is_not_started_here_too(cluster: Path, tmp_path: Path):
    (cluster / "full").touch()
    there = slurm.SlurmExecutor(Slurm(), tmp_path)
    words = [sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path)]
    task = Task("x", words, tmp_path, tmp_path / "log", tmp_path / "x.lock")
    ticket = there.start(task, print).ticket
    here = LocalExecutor(jobs=1)
    with pytest.raises(InputError, match="SLURM job 1000 runs it: take --executor slurm"):
        here.again(task, ticket)
    subprocess.run(["scancel", "1000"], check=True)
    assert here.again(task, ticket) is None
    here.start(task, print)
    with pytest.raises(InputError, match=r"process \d+ on .* runs it"):
        there.again(task, "")
    here.stop(int)


def test_a_job_that_vanishes_has_failed(cluster: Path, tmp_path: Path):
    executor = slurm.SlurmExecutor(Slurm(), tmp_path)
    words = [sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"]
    task = Task("x", words, tmp_path, tmp_path / "log", tmp_path / "x.lock")
    attempt = executor.start(task, print)
    while (end := attempt.ended()) is None:
        executor.wait()
    assert end.status == 1
    assert "SLURM job 1000 has ended without a result" in end.why
    assert executor.again(task, "SLURM job 999") is None
