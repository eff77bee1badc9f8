"""A rank that dies or hangs ends the whole job: soon, with a sentence and a status above 0."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.errors import STOPPED_STATUS
from tests import faults
from tests.faults import ROOT, TINY, Fault

LONG = ["ctc.stage1.epochs", "100000"]  # nothing here waits for its end
SECONDS = 90  # in which the job must have ended; the launcher gives ranks 30 after a failure


def start_ranks(words: list[str], said: Path, fault: Fault, victim: int) -> list[Any]:
    """Start two ranks as srun or torchrun do, without our launcher; one of them has the fault."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        where = fault.where if rank == victim else "never"
        mine = dataclasses.replace(fault, where=where, environment=environment)
        processes.append(faults.start(words, said.with_suffix(f".{rank}"), mine))
    return processes


@pytest.mark.parametrize(
    ("where", "victim"), [("after a step", 1), ("after a step", 0), ("hang", 1)]
)
def test_without_a_launcher_the_other_rank_ends_with_a_sentence(
    tmp_path: Path, tiny_npz: Path, where: str, victim: int
) -> None:
    words = [
        "ctc", "--output", str(tmp_path / "run"), *TINY, *LONG, "data.root", str(tiny_npz),
        "loop.timeout", "8",
    ]  # fmt: skip
    said = tmp_path / "said.txt"
    other = 1 - victim
    processes = start_ranks(words, said, Fault(where, 5), victim)
    try:
        processes[other].join(SECONDS)
        assert processes[other].exitcode == 1, said.with_suffix(f".{other}").read_text()
    finally:
        for process in processes:
            process.kill()
            process.join()
    lines = said.with_suffix(f".{other}").read_text().strip().splitlines()
    assert lines[-1].startswith(
        f"error: rank {other} of 2 has lost another one, which died or hangs"
    )
    assert lines[-1].endswith("start again with --resume")
    assert faults.run(["ctc", "--output", words[2], "--resume", "--dry-run"], said) == 0


def _pid_of_rank(rank: int, mark: str) -> int | None:
    """Return the process of the job that is this rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        wanted = {f"TEST_MARK={mark}".encode(), f"RANK={rank}".encode()}
        if wanted <= set(environment) and b"run_pretrain.py" in command:
            return int(folder.name)
    return None


@pytest.fixture
def job(tmp_path: Path, tiny_npz: Path) -> Iterator[tuple["subprocess.Popen[bytes]", Path, str]]:
    """``NPROC=2 tools/pretrain.sh`` in the middle of its epochs, what it says, and its mark."""
    mark, said = str(tmp_path), tmp_path / "said.txt"
    environment = {
        **os.environ, "NPROC": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
        "TEST_MARK": mark,
    }  # fmt: skip
    run = tmp_path / "run"
    command = [str(ROOT / "tools/pretrain.sh"), "ctc", "--output", str(run), *TINY, *LONG]
    with said.open("wb") as file:
        process = subprocess.Popen(
            [*command, "data.root", str(tiny_npz), "data.workers", "1"],
            env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while not (run / "resume.previous.pth").exists():
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.1)
        yield process, said, mark
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for rank in range(2):
            left = _pid_of_rank(rank, mark)
            if left is not None:
                os.kill(left, signal.SIGKILL)


def test_a_killed_rank_ends_the_job_with_one_sentence(
    job: tuple["subprocess.Popen[bytes]", Path, str],
) -> None:
    process, said, mark = job
    victim = _pid_of_rank(1, mark)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    assert process.wait(SECONDS) in (1, 128 + signal.SIGKILL)  # which end is seen first
    assert said.read_text().count("error: ") == 1, said.read_text()
    assert _pid_of_rank(0, mark) is None


def test_a_signal_to_the_whole_group_saves_although_it_reaches_the_loading_processes(
    job: tuple["subprocess.Popen[bytes]", Path, str],
) -> None:
    process, said, mark = job
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(SECONDS) == STOPPED_STATUS, said.read_text()
    last = said.read_text().strip().splitlines()[-1]
    assert last.startswith("stopped by a signal at step ")
    assert last.endswith("is saved: go on with --resume")
    assert _pid_of_rank(0, mark) is None
