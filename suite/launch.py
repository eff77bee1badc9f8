"""How a tool of ours is started on several GPUs and machines, and what it can go on with."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from core.config import ROOT, InputError
from core.launch import ALONE, Place

__all__ = ["ALONE", "Place", "Tool", "launch", "tool_of"]


@dataclasses.dataclass(frozen=True)
class Tool:
    """What a launcher must know of a tool."""

    ranks: str = ""  # how it gets several processes: "launcher", "own" options, "" not at all
    resumes: bool = False  # whether it knows --output and --resume
    rehearses: bool = False  # whether --dry-run checks its command line


TOOLS = {  # tools that are not here run as one process, from the beginning
    "run_pretrain.py": Tool("launcher", resumes=True, rehearses=True),
    "run_transfer.py": Tool("launcher", resumes=True),
    "train_net.py": Tool("own", resumes=True),
}


def tool_of(words: Sequence[str]) -> Tool:
    """Return what is known of the tool that a command line begins with."""
    return TOOLS.get(Path(words[0]).name, Tool())


def launch(words: Sequence[str], gpus: int, place: Place = ALONE) -> list[str]:
    """Return the command that runs a tool on ``gpus`` GPUs of each machine.

    Args:
        words: the tool's file and its arguments.
        gpus: per machine; 0: what the tool chooses, in one process.

    Raises:
        InputError: a tool that runs as one process is to run on several GPUs or machines.
    """
    tool, *arguments = words
    ranks, processes = tool_of(words).ranks, max(gpus, 1)
    if processes * place.nodes == 1 and ranks != "own":
        return [sys.executable, *words]
    if ranks == "launcher":
        launcher = [sys.executable, str(ROOT / "tools/launch.py"), f"--processes={processes}"]
        launcher += ["--nodes", str(place.nodes)]
        if place.nodes > 1:
            launcher += ["--node", str(place.node), "--host", place.host, "--port", str(place.port)]
        return [*launcher, *words]
    if ranks == "own":
        options = ["--num-gpus", str(gpus)] if gpus else []
        if place.nodes > 1:
            options += ["--num-machines", str(place.nodes), "--machine-rank", str(place.node)]
            options += ["--dist-url", f"tcp://{place.host}:{place.port}"]
        return [sys.executable, tool, *options, *arguments]
    raise InputError(
        f"{Path(tool).name} runs as one process: not on {place.nodes} × {processes} GPUs, but with "
        "--nodes 1 --gpus 1"
    )
