"""Runs the tools as a user would, each in a process of its own, without importing torch each time.

A process that has imported torch and detectron2, and nothing of the suite, is forked for every
command: working folder, environment, standard streams and ``sys.path`` are those of a fresh start.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = [
    "torch", "torchvision.transforms.v2", "torch.distributed", "detectron2.engine",
    "detectron2.modeling", "detectron2.data", "detectron2.evaluation", "omegaconf",
    "sklearn.cluster", "matplotlib.pyplot", "torch.utils.tensorboard",
]  # fmt: skip
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOADED)


def call(
    words: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run ``tools/NAME.py args…`` (a path and its arguments); return its output and status.

    Raises:
        subprocess.TimeoutExpired: it was still running after ``timeout`` seconds, and was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        arguments = (list(words), str(cwd), dict(environment), str(out), str(err))
        process = _server.Process(target=_main, args=arguments, daemon=False)
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(words), timeout, _read(out), _read(err))
        return subprocess.CompletedProcess(
            list(words), process.exitcode or 0, _read(out), _read(err)
        )


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _main(words: list[str], cwd: str, environment: dict[str, str], out: str, err: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    root = Path(words[0]).resolve().parent.parent
    sys.path[:] = [
        str(Path(words[0]).parent),
        *(place for place in sys.path if place and Path(place).resolve() != root),
    ]
    sys.argv = list(words)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    runpy.run_path(words[0], run_name="__main__")
