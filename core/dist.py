"""Rank, world, gather, reduce: the same calls for one process and for many; no-ops when alone."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor

from core import files
from core.errors import InputError, LostRank, NonFiniteLoss
from core.files import LOCK

T = TypeVar("T")
LONGEST = 30 * 24 * 3600  # seconds; the longest timeout
TIMEOUT = 600  # seconds that a rank waits for another, unless a config says otherwise
LOST = (  # in messages of gloo and the store when a peer has died or hangs
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting",
    "timed out", "Socket closed", "Application timeout",
)  # fmt: skip


def pick_device(name: str = "auto") -> torch.device:
    """Return this rank's device.

    Args:
        name: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` (by local rank) or ``cuda:N``.

    Raises:
        InputError: another name, or a GPU that is not there.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank = os.environ.get("LOCAL_RANK", "0")
    number = {"auto": local_rank, "cuda": local_rank}.get(name, name.removeprefix("cuda:"))
    if not number.isdigit():
        raise InputError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N")
    if int(number) >= torch.cuda.device_count():
        raise InputError(
            f"device cuda:{number} is not there: this machine has {torch.cuda.device_count()} GPUs"
        )
    return torch.device("cuda", int(number))


def init(device: str = "auto", timeout: int = TIMEOUT) -> torch.device:
    """Join the group that the environment describes; return ``pick_device(device)``.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from ``core.launch``, torchrun or a script
    under srun; without them nothing is joined. NCCL on GPUs, gloo on CPU. ``timeout``: seconds that
    a rank waits for another before the job ends.
    """
    chosen = pick_device(device)
    if not 1 <= timeout <= LONGEST:
        raise InputError(f"the timeout of a group is {timeout}; it must be 1 to {LONGEST} seconds")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if is_rank() and not td.is_initialized():
        td.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=timeout),
        )
    return chosen


def is_rank() -> bool:
    """Whether the environment makes this process one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def shutdown() -> None:
    """Leave the group, if one was joined."""
    if td.is_available() and td.is_initialized():
        td.destroy_process_group()


def is_joined() -> bool:
    """Whether there is a group."""
    return td.is_available() and td.is_initialized()


def rank() -> int:
    """Return this process's number, 0 when alone."""
    return td.get_rank() if is_joined() else 0


def world_size() -> int:
    """Return the number of processes, 1 when alone."""
    return td.get_world_size() if is_joined() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        td.barrier()


def from_main(function: Callable[[], T]) -> T:
    """Call ``function`` on the first rank while the others wait; return its result on every rank.

    Its ``InputError`` or ``NonFiniteLoss`` is raised on every rank. The result must be small and
    picklable.
    """
    result: Any = None
    if is_main():
        try:
            result = function()
        except (InputError, NonFiniteLoss) as error:
            result = error
    result = broadcast_object(result)
    if isinstance(result, Exception):
        raise result
    return result


@contextlib.contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Lock a folder for all ranks; the first one holds the lock, see ``files.locked``."""
    with contextlib.ExitStack() as stack:
        from_main(lambda: stack.enter_context(files.locked(folder, name=name)) and None)
        yield


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Raise ``LostRank``, one sentence, where a collective fails because a peer has died or hangs.

    gloo fails at once when a peer dies, and after the group's timeout when it hangs; NCCL's own
    watchdog ends the process after the timeout.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if world_size() == 1 or not any(sign in said for sign in LOST):
            raise
        raise LostRank(
            f"rank {rank()} of {world_size()} has lost another one, which died or hangs "
            f"({said.strip().splitlines()[0][:200]})"
        ) from None


@torch.no_grad()
def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate B×… tensors of all ranks in rank order, (W·B)×…; B must be equal on all ranks.

    No gradient flows through it; alone, it returns the tensor itself.
    """
    if world_size() == 1:
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    td.all_gather(parts, tensor)
    return torch.cat(parts)


@torch.no_grad()
def all_sum(tensor: Tensor) -> Tensor:
    """Return the sum over ranks, as a new tensor (the tensor itself when alone)."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    td.all_reduce(total)
    return total


def any_rank(*conditions: bool | Tensor, device: torch.device) -> list[bool]:
    """Return for each condition whether it holds on any rank; reads the device once."""
    if world_size() == 1:
        return [bool(condition) for condition in conditions]
    flags = [
        torch.as_tensor(condition, dtype=torch.float32, device=device) for condition in conditions
    ]
    return [count > 0 for count in all_sum(torch.stack(flags)).tolist()]


@torch.no_grad()
def all_mean(tensor: Tensor) -> Tensor:
    """Return the mean over ranks, as a new tensor (the tensor itself when alone)."""
    return all_sum(tensor) / world_size() if world_size() > 1 else tensor


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's value, in rank order, on every rank (small picklable objects)."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    td.all_gather_object(values, value)
    return values


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Return rank ``source``'s value on every rank (a small picklable object)."""
    if world_size() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=source)
    return box[0]
