"""The launcher: environment, signals, statuses, one sentence, nobody left behind.

The ranks are small scripts without torch; what they do of a tool's is ``_checkout.run``.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from core.launch import ALONE, Place, place_here
from tests.test_signals import ROOT, is_gone, wait_until

RANK = """
import os, pathlib, signal, sys, time
sys.path[:0] = [{root!r}, {tools!r}]
import _checkout
from core.errors import InputError, Stopped
from core.signals import StopRequests
rank, folder = int(os.environ["RANK"]), pathlib.Path({folder!r})

def mark(name):
    (folder / f"{{name}}{{rank}}").write_text(str(os.getpid()))

def work():
    '''Train until a signal comes, as tools do.'''
    with StopRequests() as stop:
        mark("at_work")
        while not stop.requested:
            time.sleep(0.02)
        mark("saved")
        raise Stopped("stopped; all is saved")

def main():
{main}

_checkout.run(main)
"""


class Job:
    """A launcher with its ranks."""

    def __init__(self, folder: Path, main: str, *options: str) -> None:
        tool = folder / "tool.py"
        body = "".join(f"    {line}\n" for line in main.strip().splitlines())
        tool.write_text(
            RANK.format(root=str(ROOT), tools=str(ROOT / "tools"), folder=str(folder), main=body)
        )
        self.folder = folder
        words = [sys.executable, str(ROOT / "tools/launch.py"), "--processes", "2", *options]
        self.process = subprocess.Popen(
            [*words, str(tool)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def pids(self, mark: str, ranks: int = 2) -> list[int]:
        """Wait until all ranks have left a mark; return their process ids."""
        files = [self.folder / f"{mark}{rank}" for rank in range(ranks)]
        wait_until(lambda: all(f.exists() and f.read_text() for f in files))
        return [int(f.read_text()) for f in files]

    def end(self) -> tuple[int, str]:
        """Return the status and all that was said."""
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.mark.parametrize("to", ["launcher", "group"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_stop_signal_lets_all_ranks_save(tmp_path: Path, number: signal.Signals, to: str) -> None:
    job = Job(tmp_path, "work()")
    pids = job.pids("at_work")
    (os.kill if to == "launcher" else os.killpg)(job.process.pid, number)
    assert job.end() == (75, "stopped; all is saved\n")
    assert job.pids("saved") == pids
    assert all(map(is_gone, pids))


def test_ctrl_c_lets_all_ranks_save(tmp_path: Path) -> None:
    job = Job(tmp_path, "work()")
    job.pids("at_work")
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.end()[0] == 75
    job.pids("saved")


def test_a_second_ctrl_c_ends_them(tmp_path: Path) -> None:
    job = Job(tmp_path, "mark('at_work')\nwhile True:\n    try: time.sleep(9)\n    except Stopped: "
              "mark('asked')")  # fmt: skip
    pids = job.pids("at_work")
    job.process.send_signal(signal.SIGINT)
    job.pids("asked")
    job.process.send_signal(signal.SIGINT)
    assert job.end()[0] == 130
    assert all(map(is_gone, pids))


def test_ranks_save_and_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    job = Job(tmp_path, "work()")
    pids = job.pids("at_work")
    job.process.kill()
    assert job.pids("saved") == pids
    wait_until(lambda: all(map(is_gone, pids)))


def test_bad_input_on_all_ranks_is_one_sentence_and_status_2(tmp_path: Path) -> None:
    job = Job(tmp_path, "raise InputError('the batch does not divide')")
    assert job.end() == (2, "error: the batch does not divide\n")


def test_the_sentence_of_any_rank_is_said_and_the_others_end(tmp_path: Path) -> None:
    main = "if rank == 0: work()\nwhile not (folder / 'at_work0').exists(): time.sleep(0.02)\n"
    job = Job(tmp_path, main + "raise InputError('an image does not decode')")
    assert job.end() == (2, "error: an image does not decode\n")


def test_a_killed_rank_is_named_and_the_others_end(tmp_path: Path) -> None:
    job = Job(tmp_path, "work()")
    pids = job.pids("at_work")
    os.kill(pids[1], signal.SIGKILL)
    status, said = job.end()
    assert status == 128 + signal.SIGKILL
    assert said == "error: rank 1 has died of SIGKILL: was there enough memory?\n"
    assert all(map(is_gone, pids))


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core import launch

    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    code = "import os, signal, sys, time\nsignal.signal(15, signal.SIG_IGN)\n" \
        "sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)"  # fmt: skip
    assert launch.launch([sys.executable, "-c", code], 2) == 3


def test_ranks_of_two_machines_know_their_places(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    seen = []
    for node in range(2):
        folder = tmp_path / str(node)
        folder.mkdir()
        options = f"--nodes 2 --node {node} --host first --port 1234".split()
        assert (
            Job(folder, f"mark(' '.join(os.environ[n] for n in {names}))", *options).end()[0] == 0
        )
        seen += [path.name for path in folder.iterdir() if "first" in path.name]
    assert sorted(seen) == [f"{r} {r % 2} 4 2 first 1234{r}" for r in range(4)]


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, ALONE),
        ({"SLURM_NNODES": "4", "SLURM_NODEID": "0"}, ALONE),  # a batch script, not a step of srun
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"},
            Place(2, 1, "a", 29500),
        ),
        (
            {
                "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NUM_TASKS": "3", "SLURM_NODEID": "2",
                "SLURM_JOB_ID": "40017", "SLURM_STEP_NODELIST": "gpu-[007-008,12]-ib,b1",
            },
            Place(3, 2, "gpu-007-ib", 20017),
        ),
    ],
)  # fmt: skip
def test_machines_are_found_in_the_environment(environment: Any, place: Place) -> None:
    assert place_here(environment) == place


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK is ''"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "machine 2 is not one of 0..1"),
        ({"NNODES": "two"}, "NNODES is 'two'"),
        (
            {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "16"},
            "--ntasks-per-node=1",
        ),
    ],
)  # fmt: skip
def test_a_place_that_is_not_clear_is_refused(environment: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        place_here(environment)
