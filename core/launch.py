"""Several processes of one command, as ranks of a group: started, signalled and ended together.

Each gets RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as from
torchrun. Unlike torchrun's agent the launcher forwards stop signals, returns the status of the rank
that failed first, and adds no traceback of its own.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from core.errors import STOPPED_STATUS, InputError
from core.signals import SIGNALS, end_with_parent

GRACE_SECONDS = 30.0  # that the other ranks have to end after one has failed
# environment of a rank, for ``end_with_launcher`` and ``speaks``
PARENT, SAID = "LAUNCHER_PID", "LAUNCHER_SAID"
PORT = 29500  # torch's default


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one of several machines stands among them."""

    nodes: int = 1
    node: int = 0
    host: str = ""  # of the first one; needed for several
    port: int = 0  # 0: a free one; needed for several

    def __post_init__(self) -> None:
        if not 0 <= self.node < self.nodes:
            raise InputError(f"machine {self.node} is not one of 0..{self.nodes - 1}")


ALONE = Place()


def place_here(environment: Mapping[str, str] = os.environ) -> Place:
    """Return this machine's place, from NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT or from srun.

    Raises:
        InputError: a variable is missing or no number, a place that is not one of the machines, or
            srun has started more than one task on each machine.
    """
    nodes = _number(environment, "NNODES", 1)
    if nodes > 1:
        if not environment.get("MASTER_ADDR"):
            raise InputError(f"NNODES is {nodes}, but MASTER_ADDR is not set")
        node, port = _number(environment, "NODE_RANK"), _number(environment, "MASTER_PORT", PORT)
        return Place(nodes, node, environment["MASTER_ADDR"], port)
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", 1)
    if nodes == 1:
        return ALONE
    if environment.get("SLURM_STEP_NUM_TASKS") != str(nodes):
        raise InputError("srun needs --ntasks-per-node=1: the launcher starts a machine's ranks")
    first = re.sub(r"\[(\d+)[^]]*\]", r"\1", _first_name(environment["SLURM_STEP_NODELIST"]))
    port = 20000 + _number(environment, "SLURM_JOB_ID") % 20000
    return Place(nodes, _number(environment, "SLURM_NODEID"), first, port)


def launch(
    command: Sequence[str], processes: int, place: Place = ALONE, held: Sequence[int] = ()
) -> int:
    """Run a command as ``processes`` ranks on this machine; return once all have ended.

    Stop signals are forwarded; SIGINT becomes SIGTERM, a second one ends the ranks at once. When a
    rank fails the others get SIGTERM, then SIGKILL. Ranks end with the launcher, however it ends.

    Args:
        held: file descriptors that the ranks keep open.

    Raises:
        InputError: several machines without the first one's host and port.

    Returns:
        The first status that is not 0 (128 + N for signal N), 75 if a stop signal ended the ranks.
    """
    if place.nodes > 1 and not (place.host and place.port):
        raise InputError("several machines need the host and the port of the first one")
    folder = tempfile.mkdtemp(prefix="launch-")
    place = place if place.port else dataclasses.replace(place, host="127.0.0.1", port=_free_port())
    ranks = _Ranks()
    try:
        with ranks.forwarding():
            ranks.start(command, processes, place, Path(folder) / "said", held)
            return ranks.wait()
    finally:
        ranks.send(signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


class _Ranks:
    """The ranks of this machine."""

    def __init__(self) -> None:
        self.running: dict[int, subprocess.Popen[bytes]] = {}  # by rank
        self.asked: set[int] = set()  # stop signals that were forwarded
        self.interrupted = False
        self.said = Path()

    @contextlib.contextmanager
    def forwarding(self) -> Iterator[None]:
        """Hand signals on to the ranks."""
        before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
        for number in SIGNALS:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, self._forward)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the ranks: a terminal sends it to all
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(
        self, command: Sequence[str], processes: int, place: Place, said: Path, held: Sequence[int]
    ) -> None:
        self.said = said
        cores = len(os.sched_getaffinity(0))
        shared = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(cores // processes, 1))),
            "LOCAL_WORLD_SIZE": str(processes),
            "WORLD_SIZE": str(processes * place.nodes),
            "MASTER_ADDR": place.host,
            "MASTER_PORT": str(place.port),
            PARENT: str(os.getpid()),
            SAID: str(said),
        }
        for local in range(processes):
            rank = place.node * processes + local
            own = {"RANK": str(rank), "LOCAL_RANK": str(local)}
            self.running[rank] = subprocess.Popen(
                command, env={**os.environ, **shared, **own}, pass_fds=tuple(held)
            )
        signal.signal(signal.SIGINT, self._interrupt)
        for number in self.asked:  # while they were started
            self.send(number)

    def wait(self) -> int:
        """Return the first status other than 0, after the end of all ranks."""
        status, deadline = 0, float("inf")
        while self.running:
            for rank, process in list(self.running.items()):
                if process.poll() is None:
                    continue
                del self.running[rank]
                if process.returncode and not status:
                    status = self._status(rank, process.returncode)
                    deadline = time.monotonic() + GRACE_SECONDS
                    self.send(signal.SIGTERM)
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(0.05)
        return 130 if self.interrupted else status

    def send(self, number: int) -> None:
        """Send a signal to all ranks that run."""
        for process in self.running.values():
            process.send_signal(number)

    def _status(self, rank: int, code: int) -> int:
        if code > 0:
            return code
        if -code in self.asked:  # it had nothing to save yet
            return STOPPED_STATUS
        if not self.interrupted and _claim(self.said):
            name = signal.Signals(-code).name
            hint = ": was there enough memory?" if name == "SIGKILL" else ""
            print(f"error: rank {rank} has died of {name}{hint}", file=sys.stderr, flush=True)
        return 128 - code

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.asked.add(number)
        self.send(number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = signal.SIGTERM in self.asked
        self.asked.add(signal.SIGTERM)
        self.send(signal.SIGKILL if self.interrupted else signal.SIGTERM)


def end_with_launcher() -> None:
    """In a rank: get SIGTERM, and so save, when the launcher is killed. No effect elsewhere."""
    parent = os.environ.pop(PARENT, "")
    if parent:
        end_with_parent(int(parent), signal.SIGTERM)


def speaks(rank_alone: bool = False) -> bool:
    """Whether this process is the one to say why its group ends: the first of a machine that asks.

    Without a launcher of ours that is the first rank, and one whose reason is its alone.
    """
    said = os.environ.get(SAID)
    return _claim(Path(said)) if said else rank_alone or os.environ.get("RANK", "0") == "0"


def _claim(path: Path) -> bool:
    """Create a file; return whether this call did."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except OSError:
        return False
    return True


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that our children may use, as CUDA_VISIBLE_DEVICES takes them.

    Torch would take seconds to tell the same.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [word.strip() for word in given.split(",") if word.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(number) for number in range(count)]


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name) or ("" if default is None else str(default))
    if not text.isdigit():
        raise InputError(f"{name} is {text!r}; it must be a number")
    return int(text)


def _first_name(names: str) -> str:
    """Return the first of SLURM's names, ``a[1-2,4],b`` → ``a[1-2,4]``."""
    match = re.match(r"(?:[^,[]|\[[^]]*\])+", names)
    return match[0] if match else names


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
