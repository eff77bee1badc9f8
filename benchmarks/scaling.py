#!/usr/bin/env python3
"""Print what CTC's losses hold, read, send and compute a step, by arithmetic: a markdown table.

    python benchmarks/scaling.py

Everything is per rank and step, beside what cross-entropy needs. Nothing here is measured.
"""

import dataclasses

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FLOAT, INDEX, GROUP = 4, 8, 4  # bytes of an embedding's number, an image's number, a row's class


@dataclasses.dataclass(frozen=True)
class Setting:
    """A training whose losses are counted."""

    images: int  # N
    ranks: int  # W
    batch: int  # B, images a rank and step
    dtype: str = "fp32"  # of the banks
    sharded: bool = False
    dim: int = 128  # D
    negatives: int = 65_536  # K
    pool: int = 262_144  # P = 4 K, rows that a step's negatives come from


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes, and multiplications with additions counted as two."""

    memory: float  # held
    read: float  # of bank rows
    received: float  # over the network, in rings
    flops: float  # of the two matrix products


def instance_cost(s: Setting) -> Cost:
    """Count stage 1: attention over the rank's rows by all images that it sees.

    Replicated: index and u of the other ranks' images come once, for the update. Sharded: u for
    the attention, own rows (a sum over ranks: twice), outputs (likewise) and u for the update.
    """
    rows, seen = _rows(s), s.batch * (s.ranks if s.sharded else 1)
    others = (s.ranks - 1) * s.batch
    units, logsumexps = (6, s.ranks * FLOAT) if s.sharded else (1, 0)
    indices = INDEX * (2 if s.sharded else 1)
    return Cost(
        memory=rows * s.dim * BYTES[s.dtype],
        read=rows * s.dim * BYTES[s.dtype],
        received=others * (units * s.dim * FLOAT + indices + logsumexps),
        flops=4.0 * seen * rows * s.dim,
    )


def preservation_cost(s: Setting) -> Cost:
    """Count stage 2, without the frozen network: both banks, both directions.

    On a GPU all P rows of the pool are multiplied with all images that the rank sees; on a CPU
    only the stretch that each takes its K from. Replicated: index and embedding of the other ranks'
    images come once for each bank, for the update. Sharded: also own rows and sums (twice each, as
    sums over ranks), v, t and labels, and the classes of the pool.
    """
    rows, seen = _rows(s), s.batch * (s.ranks if s.sharded else 1)
    pool = min(s.pool, s.images)
    others = (s.ranks - 1) * s.batch
    held = pool / s.ranks if s.sharded else pool
    of_image, of_pool = 2 * s.dim * FLOAT + 2 * INDEX, 0.0
    if s.sharded:
        of_image = 12 * s.dim * FLOAT + 5 * INDEX + 4 * FLOAT
        of_pool = 2 * GROUP * pool * (s.ranks - 1) / s.ranks
    return Cost(
        memory=rows * (2 * s.dim * BYTES[s.dtype] + GROUP),
        read=2 * held * s.dim * BYTES[s.dtype],
        received=others * of_image + of_pool,
        flops=8.0 * seen * held * s.dim,
    )


def _rows(s: Setting) -> float:
    return s.images / s.ranks if s.sharded else s.images


SETTINGS = [
    Setting(1_281_167, 8, 32),
    Setting(1_281_167, 8, 32, sharded=True),
    Setting(100_000_000, 8, 128, "bf16", sharded=True),
    Setting(100_000_000, 64, 32, sharded=True),
    Setting(100_000_000, 64, 32, "bf16", sharded=True),
    Setting(1_000_000_000, 64, 64, "bf16", sharded=True),
    Setting(1_000_000_000, 512, 16, "bf16", sharded=True),
]


def table(settings: list[Setting]) -> str:
    """Return a markdown table, a row for each setting."""
    heads = [
        "images",
        "ranks × batch",
        "banks",
        "memory, stage 1 / 2",
        "bank rows read",
        "received",
        "products",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for s in settings:
        first, second = instance_cost(s), preservation_cost(s)
        cells = [
            f"{s.images / 1e6:,.4g} M",
            f"{s.ranks} × {s.batch}",
            f"{s.dtype}, {'sharded' if s.sharded else 'replicated'}",
            f"{_size(first.memory)} / {_size(second.memory)}",
            f"{_size(first.read)} / {_size(second.read)}",
            f"{_size(first.received)} / {_size(second.received)}",
            f"{first.flops / 1e12:.3g} / {second.flops / 1e12:.3g} TFLOP",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


if __name__ == "__main__":
    print(table(SETTINGS))
