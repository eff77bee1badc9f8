#!/usr/bin/env python3
"""Run benchmarks side by side with plain baselines.

    python benchmarks/run.py ctc-stage2 [ctc-stage1 …]
    python benchmarks/run.py --all

Each ends with ``NAME: R× (baseline A s, ours B s)``. They time, so they are no tests: run them on
a machine that does nothing else, with as many threads as there are cores (OMP_NUM_THREADS).
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import _checkout  # isort:skip

from core.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parent))

BENCHMARKS = {  # name: module, function → (baseline seconds, our seconds, further lines)
    "ctc-stage2": ("ctc", "stage2"),
    "ctc-stage2-shared": ("ctc", "stage2_shared"),
    "ctc-stage1": ("ctc", "stage1"),
    "ctc-stage1-imagenet": ("ctc", "stage1_imagenet"),
    "ctc-step": ("ctc", "whole_step"),
    "bank-dtype": ("ctc", "bank_dtype"),
    "linear-probe": ("linear_probe", "measure"),
    "coco-eval-bbox": ("coco_eval", "bbox"),
    "coco-eval-segm": ("coco_eval", "segm"),
    "mine": ("mine", "mine"),
    "mine-fp32": ("mine", "mine_fp32"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--all", action="store_true", help="run them all")
    options = parser.parse_args()
    names = list(BENCHMARKS) if options.all else options.names
    if not names:
        raise InputError(f"name a benchmark ({', '.join(BENCHMARKS)}) or give --all")
    for name in names:
        if name not in BENCHMARKS:
            raise InputError(f"benchmark {name!r} is not one of {', '.join(BENCHMARKS)}")
    for name in names:
        module, function = BENCHMARKS[name]
        baseline, ours, lines = getattr(importlib.import_module(module), function)()
        print(*lines, sep="\n")
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print(
            f"{name}: {baseline / ours:.1f}× (baseline {baseline:.3g} s, ours {ours:.3g} s)",
            flush=True,
        )


if __name__ == "__main__":
    _checkout.run(main)
