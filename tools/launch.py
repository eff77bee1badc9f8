#!/usr/bin/env python3
"""Run a tool as several processes: one on each GPU of this machine, or of several machines.

    tools/launch.py tools/run_transfer.py --config transfer/cub200_finetune.yaml --weights c.pth
    tools/launch.py --processes 4 tools/run_pretrain.py ctc --output runs/x
    srun --nodes 4 --ntasks-per-node 1 tools/launch.py tools/run_pretrain.py ctc --output runs/x

On several machines without srun, run the same command on each with NNODES, NODE_RANK, MASTER_ADDR
and MASTER_PORT set. SIGTERM, SIGUSR1 and SIGHUP are forwarded. Exit status: that of the first
process that fails, 75 if a signal has stopped them and all is saved.
"""

import _checkout  # isort: skip

import argparse
import os
import sys
from pathlib import Path

from core import launch
from core.errors import InputError


def parse() -> argparse.Namespace:
    parser = _checkout.Parser(__doc__)
    parser.add_argument("--processes", type=int, default=0, help="here; default: GPUs, or 1")
    parser.add_argument("--nodes", type=int, help="machines; default: NNODES, srun's, or 1")
    parser.add_argument("--node", type=int, default=0, help="this machine, from 0")
    parser.add_argument("--host", default="", help="the first machine")
    parser.add_argument("--port", type=int, default=launch.PORT, help="free on the first machine")
    parser.add_argument("tool", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    tool = arguments.tool if arguments.tool.is_file() else _checkout.ROOT / arguments.tool
    if not tool.is_file():
        raise InputError(f"{arguments.tool} is no file: name a tool, such as tools/run_pretrain.py")
    if arguments.processes < 0 or (arguments.nodes or 1) < 1:
        raise InputError("--processes and --nodes must be positive numbers")
    if arguments.nodes is None:
        place = launch.place_here()
    elif arguments.nodes > 1:
        place = launch.Place(arguments.nodes, arguments.node, arguments.host, arguments.port)
    else:
        place = launch.ALONE
    processes = arguments.processes or max(len(launch.visible_gpus()), 1)
    command = [sys.executable, str(tool), *arguments.arguments]
    if processes * place.nodes == 1:
        os.execv(sys.executable, command)
    return launch.launch(command, processes, place)


if __name__ == "__main__":
    _checkout.run(main)
