"""What a run says: everything into ``log.txt``, the few lines that matter on the terminal.

detectron2 prints its environment, the config and the whole network; that stays in the file. A
terminal shows a bar; where the output is no terminal, detectron2's own progress lines take its
place.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage

from core.errors import InputError
from models.checkpoint import atomic_file

LINES_OF_A_LOG = ("detectron2.utils.events", "detectron2.evaluation.evaluator")
SPEAKERS = ("detectron2", "fvcore", "detection")
logger = logging.getLogger("detection")


class _Chosen(logging.Filter):
    """Lets through what belongs on the terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "detection":
            return True
        if record.levelno >= logging.ERROR:  # a stopped loop is reported once, by the tool
            return record.name != "detectron2.engine.train_loop"
        return not self.terminal and record.name in LINES_OF_A_LOG


def is_terminal() -> bool:
    """Whether someone watches: then a bar is drawn instead of lines."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def logging_to(folder: Path, spoken: bool = True) -> Iterator[None]:
    """Log to ``folder/log.txt`` (``log.txt.rank1`` … for others) and, rank 0, to stdout.

    Args:
        folder: of the run; made where it is not, as on a machine that shares no disk with rank 0.
        spoken: False keeps everything in the file.
    """
    rank = comm.get_rank()
    name = "log.txt" if rank == 0 else f"log.txt.rank{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    plain = logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S")
    handlers: list[logging.Handler] = [logging.FileHandler(folder / name, encoding="utf-8")]
    handlers[0].setFormatter(plain)
    if rank == 0 and spoken:
        terminal = logging.StreamHandler(sys.stdout)
        terminal.addFilter(_Chosen(is_terminal()))
        terminal.setFormatter(logging.Formatter("%(message)s"))
        handlers.append(terminal)
    loggers = [logging.getLogger(speaker) for speaker in SPEAKERS]
    for each in loggers:
        each.setLevel(logging.INFO)
        each.propagate = False
        for handler in handlers:
            each.addHandler(handler)
    try:
        yield
    finally:
        for each in loggers:
            for handler in handlers:
                each.removeHandler(handler)
        handlers[0].close()


class WandbWriter(EventWriter):
    """Sends a run's scalars to Weights & Biases, beside metrics.json and TensorBoard.

    A resumed run goes on with the same curve there: its id derives from the run folder.
    """

    def __init__(self, project: str, folder: Path, settings: dict[str, Any]) -> None:
        import wandb

        place = str(folder.resolve())
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                dir=place,
                id=hashlib.sha256(place.encode()).hexdigest()[:16],
                resume="allow",
                config=settings,
            )
        except wandb.Error as error:
            said = " ".join(str(error).split())
            raise InputError(
                f"SUITE.WANDB {project}: {said}; `wandb login`, or set WANDB_MODE=offline"
            ) from None
        self._sent = -1

    def write(self) -> None:
        """Send what was stored since the last call, at the iteration at which it was stored."""
        by_iteration: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(20).items():
            if iteration > self._sent:
                by_iteration.setdefault(iteration, {})[name] = value
        for iteration in sorted(by_iteration):
            self._run.log(by_iteration[iteration], step=iteration)
        self._sent = max([self._sent, *by_iteration])

    def close(self) -> None:
        """End the run there."""
        self._run.finish()


def check_wandb(project: str) -> None:
    """Raise InputError if metrics are to go to Weights & Biases, and its package is absent."""
    if project and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"SUITE.WANDB names project {project!r}, but wandb is not installed: "
            "`pip install wandb`, or leave SUITE.WANDB empty"
        )


def say(sentence: str) -> None:
    """Say one line on the terminal and in the log."""
    logger.info(sentence)


def trim_metrics(path: Path, next_iteration: int) -> int:
    """Drop lines of metrics.json that a resumed run is going to write again; return how many.

    detectron2's JSONWriter appends: without this, iterations between the last checkpoint and the
    interruption would stand twice. A line that a crash cut short is dropped too.
    """
    if not path.is_file():
        return 0
    kept, dropped = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            keep = json.loads(line)["iteration"] < next_iteration
        except (ValueError, KeyError, TypeError):
            keep = False
        if keep:
            kept.append(line)
        else:
            dropped += 1
    with atomic_file(path) as file:
        file.write("".join(line + "\n" for line in kept).encode())
    return dropped
