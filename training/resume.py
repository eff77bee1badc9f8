"""The state that a training resumes from as if never stopped: ``resume.pth``, and ``log.jsonl``."""

import dataclasses
import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from core import dist
from core.errors import InputError
from core.files import atomic_file
from models import amp, checkpoint

T = TypeVar("T")
FORMAT = "transfer-suite resume state"
VERSION = 2  # 2: recipe by key, legs
PARTS = ("position", "objective", "optimizer", "scaler", "random", "recipe", "legs")
FILE = "resume.pth"
LOG = "log.jsonl"
PREVIOUS = "resume.previous.pth"  # the state before, kept until the next is known to be good


@dataclasses.dataclass
class Position:
    """The progress of a training: all before it is done."""

    stage: int = 0
    started: bool = False  # whether start_stage of ``stage`` has been done
    epoch: int = 0  # over all stages
    step: int = 0  # steps done in this epoch
    iteration: int = 0  # steps done in all


Check = Callable[[Mapping[str, Any], Position], None]  # of a state's recipe and position


def save(
    run_dir: Path,
    position: Position,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recipe: Mapping[str, Any],
    legs: list[dict[str, Any]],
) -> None:
    """Write ``resume.pth`` atomically; every rank calls it, the first one writes.

    The state before it stays beside it as ``resume.previous.pth``.

    Args:
        recipe: all that the weights depend on, as plain values by key.
        legs: the iteration, processes, device and precision of each start that changed them.

    Raises:
        InputError, NonFiniteLoss: on every rank, if the disk is full or a tensor is not finite.
    """
    generators = dist.gather_objects(_random_states())
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
            "recipe": dict(recipe),
            "legs": legs,
        }
        checkpoint.assert_finite(state)
        with atomic_file(run_dir / FILE, keep_previous=run_dir / PREVIOUS) as file:
            torch.save(content, file)

    dist.from_main(write)


def is_there(run_dir: Path) -> bool:
    """Whether a run has any resume state, damaged or not."""
    return any((run_dir / name).exists() for name in (FILE, PREVIOUS))


def load(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    """Return the newest resume state of a run that reads without damage, tensors on the CPU.

    Raises:
        InputError: there is none, all are damaged, or it is of another version or incomplete.
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
    if found[0] != present[0]:
        name = found[0].name
        print(f"{present[0]} is damaged: going on from {name}", file=sys.stderr, flush=True)
    _check_content(*found)
    return found


def load_on_all(run_dir: Path, check: Check) -> dict[str, Any]:
    """Return the same state on every rank: the first one chooses and checks it.

    Raises:
        InputError: on every rank; as ``load``, by ``check``, or a rank reads another state.
    """

    def choose() -> tuple[Path, dict[str, Any]]:
        path, content = load(run_dir)
        check(content["recipe"], Position(**content["position"]))
        return path, content

    found = read_on_all(
        choose, lambda path: checkpoint.load_plain(run_dir / path.name), lambda c: c["position"]
    )
    assert found is not None
    return found[1]


def read_on_all(
    choose: Callable[[], tuple[Path, T] | None],
    read: Callable[[Path], T],
    mark: Callable[[T], Any],
) -> tuple[Path, T] | None:
    """Return the file, with its content, that the first rank chooses, on every rank.

    Args:
        choose: returns a file and its content, or None; called on the first rank.
        read: returns a file's content; called on the others.
        mark: returns what must be the same of the contents, small and picklable.

    Raises:
        InputError: on every rank; by ``choose``, or a rank reads another content.
    """
    found: tuple[Path, T] | None = None

    def of_main() -> tuple[Path, Any] | None:
        nonlocal found
        found = choose()
        return found and (found[0], mark(found[1]))

    chosen = dist.from_main(of_main)
    if chosen is None:
        return None
    path, expected = chosen
    problem = ""
    try:
        found = found or (path, read(path))
        if mark(found[1]) != expected:
            problem = f"rank {dist.rank()} reads another {path} than the first rank"
    except InputError as error:
        problem = f"rank {dist.rank()}: {error}"
    problems = [said for said in dist.gather_objects(problem) if said]
    if problems:
        raise InputError(f"{problems[0]}; a run folder must be on storage that all machines share")
    return found


def check_recipe(run_dir: Path, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InputError, naming a key, if a run was begun with another recipe."""
    absent = object()
    for key in {**begun, **now}:
        if begun.get(key, absent) != now.get(key, absent):
            raise InputError(
                f"{run_dir} was begun with {key} = {begun.get(key)}, not {now.get(key)}: resume it "
                "without changes, or start in a new folder"
            )


def leg(iteration: int, device: torch.device, precision: str) -> dict[str, Any]:
    """Return the processes, device and precision of a training from an iteration on."""
    return {
        "iteration": iteration,
        "processes": dist.world_size(),
        "device": device.type,
        "amp": amp.resolve(precision, device),
    }


def joined_legs(legs: list[dict[str, Any]], now: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the legs of a state, and the present one if it differs from the last; then warn."""
    before = legs[-1] | {"iteration": now["iteration"]}
    if before == now:
        return legs
    if dist.is_main():
        was, is_now = (f"{x['processes']} × {x['device']} (amp {x['amp']})" for x in (before, now))
        print(
            f"warning: {was} before step {now['iteration']}, {is_now} from there: the weights are "
            "not those of an uninterrupted run, and the result row says so",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return [*legs, now]


def _check_content(path: Path, content: Any) -> None:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a resume state of this suite")
    if content.get("version") != VERSION:
        raise InputError(
            f"{path} has version {content.get('version')}, but this checkout resumes version "
            f"{VERSION}: use the checkout that wrote it, or start in a new folder"
        )
    missing = [part for part in PARTS if part not in content]
    fields = [field.name for field in dataclasses.fields(Position)]
    if missing or sorted(content["position"]) != sorted(fields):
        raise InputError(f"{path} is incomplete: no valid {(missing or ['position'])[0]!r} in it")


def restore_random_states(states: list[dict[str, Any]]) -> None:
    """Restore this rank's generators; with another number of ranks they stay as seeded."""
    if len(states) != dist.world_size():
        return
    state = states[dist.rank()]
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def carry_momentum(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Copy the state of every parameter that both optimisers hold (between two stages)."""
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
