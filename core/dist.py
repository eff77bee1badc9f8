"""Rank, world, gather, reduce: the same calls for one process and for many; no-ops when alone."""

import os
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor


def init(device: str = "auto") -> torch.device:
    """Join the group that torchrun describes in the environment, and return this rank's device.

    Without torchrun's variables nothing is joined. ``device``: ``auto`` (a GPU where there is one),
    ``cpu``, ``cuda`` or ``cuda:N``. NCCL on GPUs, gloo on CPU.
    """
    use_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if use_cuda:
        chosen = torch.device(device if ":" in device else f"cuda:{local_rank}")
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not td.is_initialized():
        td.init_process_group("nccl" if use_cuda else "gloo")
    return chosen


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
    """Whether this process writes files and speaks."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        td.barrier()


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


@torch.no_grad()
def all_mean(tensor: Tensor) -> Tensor:
    """Return the mean over ranks, as a new tensor (the tensor itself when alone)."""
    return all_sum(tensor) / world_size() if world_size() > 1 else tensor


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Return rank ``source``'s value on every rank (a small picklable object)."""
    if world_size() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=source)
    return box[0]
