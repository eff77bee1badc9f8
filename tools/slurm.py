#!/usr/bin/env python3
"""Submit any tool of ours as a SLURM job, on several machines if need be.

    tools/slurm.py --nodes 2 --gpus 8 --hours 24 -- \
        tools/run_pretrain.py ctc --config pretrain/ctc_imagenet.yaml --output runs/x

Before its time is over, or when it is preempted, the job saves, is queued again and resumes. Run it
on a login node, in a checkout that the cluster's machines see.
"""

import _checkout  # isort: skip

import argparse
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    from suite.schema import Slurm

    p = _checkout.Parser(__doc__)
    default = Slurm()
    p.add_argument("--nodes", type=int, default=1, help="machines (1)")
    p.add_argument("--gpus", type=int, default=1, help="on each machine (1); 0: CPUs only")
    p.add_argument("--hours", type=float, default=default.hours, help="then it is queued again")
    p.add_argument("--partition", default="", help="default: the cluster's own")
    p.add_argument("--account", default="")
    p.add_argument("--cpus-per-gpu", type=int, default=default.cpus_per_gpu)
    p.add_argument("--memory-gb", type=float, default=0.0, help="of each machine")
    p.add_argument("--save-seconds", type=int, default=default.save_seconds, help="to save in")
    p.add_argument("--requeues", type=int, default=default.requeues, help="after time-outs")
    p.add_argument(
        "--extra", action="append", default=[], metavar="KEY=VALUE", help="sbatch option, e.g. qos"
    )
    p.add_argument("--logs", type=Path, help="folder of the jobs' logs (runs/slurm)")
    p.add_argument("command", nargs="+", metavar="TOOL ARGUMENTS", help="after --")
    return p


def main() -> int:
    """Submit; print the job's number and its log."""
    from core.config import ROOT, InputError
    from suite.schema import Slurm
    from suite.slurm import submit_tool

    arguments = vars(parser().parse_args())
    extra: dict[str, Any] = {}
    for word in arguments.pop("extra"):
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise InputError(f"--extra {word}: write KEY=VALUE, such as qos=high")
        extra[key] = value
    words, nodes, gpus = (arguments.pop(name) for name in ("command", "nodes", "gpus"))
    logs = (arguments.pop("logs") or ROOT / "runs" / "slurm").absolute()
    number, log = submit_tool(words, gpus, nodes, Slurm(**arguments, extra=extra), logs)
    print(f"SLURM job {number}; log: {log}\nend it with: scancel {number}")
    return 0


if __name__ == "__main__":
    _checkout.run(main)
