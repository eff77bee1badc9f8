"""What a training needs to go on as if it had never stopped: ``resume.pth`` and ``log.jsonl``."""

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from torch import nn

from core import dist
from core.errors import InputError
from core.files import atomic_file
from models import checkpoint

FORMAT = "transfer-suite resume state"
VERSION = 1
FILE = "resume.pth"
LOG = "log.jsonl"
PREVIOUS = "resume.previous.pth"  # the state before, kept until the next is known to be good


@dataclasses.dataclass
class Position:
    """Where a training stands: everything before it is done."""

    stage: int = 0
    started: bool = False  # whether start_stage of ``stage`` has been done
    epoch: int = 0  # over all stages
    step: int = 0  # steps done in this epoch
    iteration: int = 0  # steps done in all


def save(
    run_dir: Path,
    position: Position,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    fingerprint: str,
) -> None:
    """Write ``resume.pth`` atomically; every rank calls it, the first one writes.

    The state before it stays beside it as ``resume.previous.pth``.

    Raises:
        InputError, NonFiniteLoss: on every rank, if the disk is full or a tensor is not finite.
    """
    generators = _gather_objects(_random_states())
    state = objective.state_dict()  # on every rank: a sharded bank gathers its rows

    def write() -> None:
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "position": dataclasses.asdict(position),
            "objective": state,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "random": generators,
            "fingerprint": fingerprint,
        }
        checkpoint.assert_finite(state)
        with atomic_file(run_dir / FILE, keep_previous=run_dir / PREVIOUS) as file:
            torch.save(content, file)

    dist.from_main(write)


def is_there(run_dir: Path) -> bool:
    """Whether a run has any resume state, damaged or not."""
    return any((run_dir / name).exists() for name in (FILE, PREVIOUS))


def load(run_dir: Path, fingerprint: str) -> dict[str, Any]:
    """Return the newest resume state of a run that reads without damage, tensors on the CPU.

    Raises:
        InputError: there is none, all are damaged, or they belong to another recipe.
    """
    paths = [run_dir / FILE, run_dir / PREVIOUS]
    present = [path for path in paths if path.exists()]
    if not present:
        raise InputError(
            f"{run_dir} holds no {FILE}: there is nothing to resume; start without --resume"
        )
    found = checkpoint.newest_valid(present, checkpoint.load_plain)
    if found is None:
        raise InputError(f"{present[0]} is damaged, and there is no older valid state beside it")
    path, content = found
    if path != present[0] and dist.is_main():
        print(f"{present[0]} is damaged: going on from {path.name}", file=sys.stderr, flush=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a resume state of this suite")
    if content["fingerprint"] != fingerprint:
        raise InputError(
            f"{path} was written under another recipe; resume with the config saved in "
            f"{run_dir / 'config.yaml'}, or start in a new folder"
        )
    return content


def restore_random_states(states: list[dict[str, Any]]) -> None:
    """Give this rank its generators back; with another number of ranks they stay as seeded."""
    if len(states) != dist.world_size():
        return
    state = states[dist.rank()]
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def carry_momentum(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Hand over the state of every parameter that both optimisers hold (between two stages)."""
    kept = {parameter for group in new.param_groups for parameter in group["params"]}
    for parameter, state in old.state.items():
        if parameter in kept:
            new.state[parameter] = state


class RunLog:
    """``log.jsonl``: one JSON object a line with ``iteration`` and figures; the first rank writes.

    After a resume the lines past the resumed iteration are dropped, so that none stands twice.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        self._path = path
        if not dist.is_main():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = []
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["iteration"] <= iteration:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut short by a crash
            with atomic_file(path) as file:
                file.write("".join(kept).encode())

    def write(self, iteration: int, **figures: float | int | str) -> None:
        """Append one line."""
        if dist.is_main():
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"iteration": iteration, **figures}) + "\n")


def _random_states() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _gather_objects(value: Any) -> list[Any]:
    if dist.world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.world_size()
    td.all_gather_object(values, value)
    return values
