"""Pretraining processes that meet a fault at a chosen moment: run in children of a clean server.

The children are forked from a process that has only imported what is slow to import, so that
twenty of them take seconds.
"""

import dataclasses
import io
import json
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMON = [
    "arch", "resnet18_cifar_w16", "data.name", "npz", "data.image_size", "16",
    "loop.batch_size", "16", "loop.amp", "none", "loop.device", "cpu", "loop.log_every", "1",
    "loop.resume_every", "1", "loop.save_every", "1",
]  # fmt: skip
STAGES = {
    "ctc": ["ctc.num_negatives", "8", "ctc.stage1.epochs", "2", "ctc.stage2.epochs", "2"],
    "ce": ["ce.stage.epochs", "2", "ce.stage.warmup_epochs", "0"],
    "random": [],
}
TINY = [*COMMON, *STAGES["ctc"]]
SERVER = multiprocessing.get_context("forkserver")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What befalls a process, and when: at the ``count``-th time that it comes by."""

    where: str = "never"  # a key of PLACES, or as ``_arm`` knows it
    count: int = 1
    signal: str = "SIGKILL"  # what the process gets at a key of PLACES
    file_limit: int = 0  # bytes that a file may have, 0: any
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def start(words: list[str], said: Path, fault: Fault | None = None) -> Any:
    """Start ``tools/run_pretrain.py`` with arguments; what it says goes to a file."""
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    SERVER.set_forkserver_preload(["pretrain.run", "tests.faults"])
    process = SERVER.Process(target=_child, args=(words, str(said), fault or Fault()))
    process.start()
    return process


def run(words: list[str], said: Path, fault: Fault | None = None, seconds: float = 120) -> int:
    """Run it to its end; return its exit status, −9 if it was killed."""
    process = start(words, said, fault)
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{words} did not end in {seconds} s: {said.read_text()[-2000:]}")
    return int(process.exitcode)


def _child(words: list[str], said: str, fault: Fault) -> None:
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(fault.environment)
    if fault.file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_limit, resource.RLIM_INFINITY))
    _arm(fault)
    sys.argv = ["run_pretrain.py", *words]
    sys.path.insert(0, str(ROOT / "tools"))
    runpy.run_path(str(ROOT / "tools/run_pretrain.py"), run_name="__main__")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(fault: Fault) -> None:
    """Let the process kill or stop itself at the place of the fault.

    "clock" counts milliseconds from the first step, "hang" stops before a step without ending.
    """
    import torch

    from training import loop, resume

    if fault.where == "clock":
        _wrap(loop.Trainer, "step", 1, before=threading.Timer(fault.count / 1000, _kill).start)
    elif fault.where == "hang":
        _wrap(
            loop.Trainer, "step", fault.count, before=lambda: os.kill(os.getpid(), signal.SIGSTOP)
        )
    elif fault.where == "half a save":
        _wrap(torch, "save", fault.count, instead=_half_save)
    elif fault.where == "half a log line":
        _wrap(resume.RunLog, "write", fault.count, instead=_half_line)
    elif fault.where in PLACES:
        owner, name, when = PLACES[fault.where]
        number = getattr(signal, fault.signal)
        _wrap(owner, name, fault.count, **{when: lambda: os.kill(os.getpid(), number)})


def _wrap(owner: Any, name: str, count: int, **what: Callable[..., None]) -> None:
    original, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] != count:
            return original(*args, **kwargs)
        if "instead" in what:
            return what["instead"](*args, **kwargs)
        what.get("before", lambda: None)()
        result = original(*args, **kwargs)
        what.get("after", lambda: None)()
        return result

    setattr(owner, name, wrapped)


def _half_save(content: Any, file: Any) -> None:
    import torch

    whole = io.BytesIO()
    torch.serialization.save(content, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    _kill()


def _half_line(log: Any, iteration: int, **figures: Any) -> None:
    with log._path.open("a") as file:
        file.write(json.dumps({"iteration": iteration, **figures})[:20])
    _kill()


def _places() -> dict[str, tuple[Any, str, str]]:
    from pretrain import objectives
    from pretrain import run as pretrain_run
    from training import loop, resume

    return {
        "before a rename": (Path, "replace", "before"),
        "after a rename": (Path, "replace", "after"),
        "before a flush": (os, "fsync", "before"),
        "before a step": (loop.Trainer, "step", "before"),
        "after a step": (loop.Trainer, "step", "after"),
        "in the refresh": (
            objectives.PreservationTerm,
            "frozen_features",
            "before",
        ),  # then each step
        "after a state": (resume, "save", "after"),
        "before the row": (pretrain_run, "record", "before"),
        "after the row": (pretrain_run, "record", "after"),
        "before a checkpoint": (pretrain_run.checkpoint, "save_checkpoint", "before"),
        "after a checkpoint": (pretrain_run.checkpoint, "save_checkpoint", "after"),
    }


PLACES = _places()
