"""Memory banks: one embedding per training image, whole on every rank or sharded over the ranks.

Shapes: N images, B images a rank and step, D embedding, W ranks. Of a sharded bank rank r holds
the rows r, r + W, r + 2W, …: a data set sorted by class spreads evenly.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor, nn

from core import dist
from core.seeds import mixed_array

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
BLOCK = 1 << 14  # rows that are initialised at a time


class MemoryBank(nn.Module):
    """N rows of D numbers that follow the images' embeddings with a momentum.

    Rows start uniform in ±1/sqrt(D/3), so of norm about 1 but not normalised, as in the released
    code. They are a function of the seed and the row alone: a shard holds the very rows that the
    whole bank would. Rows are stored in ``dtype`` and returned in float32 (float64 stays).

    ``sample`` and ``update`` are collective over the ranks. A state dict holds all N rows whether
    the bank is sharded or not; of a sharded bank every rank must ask for it at the same time, and
    only the first rank gets the rows.

    Args:
        images: N. dim: D. momentum: m in [0, 1], the share of the old row that is kept.
        dtype: a key of DTYPES. seed: of the first rows. sharded: keep a part on each rank.
    """

    storage: Tensor

    def __init__(
        self,
        images: int,
        dim: int,
        momentum: float,
        *,
        dtype: str = "fp32",
        seed: int = 0,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"bank dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self.images, self.dim, self.momentum = images, dim, momentum
        self.sharded = sharded and dist.world_size() > 1
        self.world, self.rank = (dist.world_size(), dist.rank()) if self.sharded else (1, 0)
        self.held = len(range(self.rank, images, self.world))
        # one row more than are held: it takes the writes that are meant for other ranks
        storage = torch.zeros(self.held + 1, dim, dtype=DTYPES[dtype])
        for low in range(0, self.held, BLOCK):
            high = min(low + BLOCK, self.held)
            numbers = torch.arange(low, high) * self.world + self.rank
            storage[low:high] = first_rows(numbers, dim, seed)
        self.register_buffer("storage", storage, persistent=False)

    @property
    def rows(self) -> Tensor:
        """This rank's rows as stored; all N×D unless the bank is sharded."""
        return self.storage[: self.held]

    def sample(self, index: Tensor) -> Tensor:
        """Return the rows of B images, B×D, from whichever rank holds them."""
        if not self.sharded:
            return _at_least_float32(self.storage.index_select(0, index))
        everyone = dist.gather_rows(index)  # W·B
        local, owned = self._locate(everyone)
        found = _at_least_float32(self.storage.index_select(0, local)) * owned[:, None]
        first = dist.rank() * len(index)
        return dist.all_sum(found)[first : first + len(index)]

    @torch.no_grad()
    def update(self, index: Tensor, embedding: Tensor, momentum: float | None = None) -> None:
        """Move the rows of all ranks' images: M_i ← normalise(m·M_i + (1 − m)·embedding_i).

        Where an image stands twice in the joined batch, its last embedding (in rank order) counts.

        Args:
            index: B. embedding: B×D. B is the same on all ranks; an index of −1 writes nothing.
            momentum: instead of the bank's own.
        """
        momentum = self.momentum if momentum is None else momentum
        index, embedding = dist.gather_rows(index), dist.gather_rows(embedding.detach())
        embedding = embedding.index_select(0, last_occurrence(index))
        local, _ = self._locate(index)
        before = _at_least_float32(self.storage.index_select(0, local))
        after = F.normalize(momentum * before + (1.0 - momentum) * embedding.to(before.dtype))
        self.storage.index_copy_(0, local, after.to(self.storage.dtype))

    def _locate(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions in ``storage`` (the spare row for rows held elsewhere), and a mask."""
        owned = (index >= 0) & (index % self.world == self.rank)
        return torch.where(owned, index // self.world, self.held), owned

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "rows"] = _collect(self) if self.sharded else self.rows.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        name = prefix + "rows"
        missing, _, errors = rest[-3:]
        rows = state_dict.pop(name, None)
        if rows is None:
            missing.append(name)
        elif rows.shape != (self.images, self.dim):
            errors.append(f"{name} is {tuple(rows.shape)}, not {(self.images, self.dim)}")
        else:
            self.rows.copy_(rows[self.rank :: self.world])
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if rows is not None:
            state_dict[name] = rows


@torch.no_grad()
def refresh(
    banks: Sequence[MemoryBank], batches: Iterable[tuple[Tensor, Sequence[Tensor]]]
) -> None:
    """Replace the rows of all ranks' images by embeddings, momentum 0. Collective.

    Args:
        batches: (index B, one B×D embedding for each bank); the number of batches and their sizes
            may differ between ranks.
    """
    none = banks[0].storage.new_zeros(0, dtype=torch.long)
    nothing = (none, [_at_least_float32(bank.storage[:0]) for bank in banks])
    iterator = iter(batches)
    while True:
        index, embeddings = next(iterator, nothing)
        longest = int(dist.gather_rows(none.new_tensor([len(index)])).max())
        if longest == 0:
            return
        missing = longest - len(index)
        index = F.pad(index, (0, missing), value=-1)
        for bank, embedding in zip(banks, embeddings, strict=True):
            bank.update(index, F.pad(embedding, (0, 0, 0, missing)), momentum=0.0)


def last_occurrence(index: Tensor) -> Tensor:
    """Return, for each of B entries, the position of the last entry equal to it, B."""
    ordered, order = torch.sort(index, stable=True)
    return order[torch.searchsorted(ordered, index, right=True) - 1]


def first_rows(numbers: Tensor, dim: int, seed: int) -> Tensor:
    """Return the rows that images start with, numbers×D, uniform in ±1/sqrt(D/3)."""
    cells = numbers[:, None] * dim + torch.arange(dim)
    bits = torch.from_numpy((mixed_array((seed,), cells.numpy()) >> 40).astype("int64"))  # 24
    uniform = bits.double() / (1 << 24)  # exact in float32
    return ((2.0 * uniform - 1.0) / math.sqrt(dim / 3)).float()


def _at_least_float32(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _collect(bank: MemoryBank) -> Tensor:
    """Return all N rows on the first rank, in host memory; 0×D elsewhere."""
    if not dist.is_main():
        td.send(bank.rows.contiguous(), 0)
        return bank.storage.new_zeros(0, bank.dim)
    every = torch.empty(bank.images, bank.dim, dtype=bank.storage.dtype)
    every[0 :: bank.world] = bank.rows.cpu()
    for rank in range(1, bank.world):
        part = bank.storage.new_empty(len(range(rank, bank.images, bank.world)), bank.dim)
        td.recv(part, rank)
        every[rank :: bank.world] = part.cpu()
    return every
