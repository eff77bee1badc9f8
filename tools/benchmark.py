#!/usr/bin/env python3
"""Run a suite (initialisations × protocols × seeds) and print its table.

    tools/benchmark.py --config suites/quickstart.yaml
    tools/benchmark.py --config suites/table5.yaml --dry-run
    tools/benchmark.py --config suites/quickstart.yaml --seeds 1,2,3 --only ctc,ce
    tools/benchmark.py --config suites/table5.yaml --executor slurm slurm.partition gpu
    tools/benchmark.py --config suites/quickstart.yaml protocols.NAME.overrides.SOLVER.MAX_ITER 300

Jobs that are done are skipped, interrupted ones are resumed, and those that a killed call left
running are waited for. Writes table.md, table.tex, table.csv, report.html and figures/ beside the
runs. Exit status: 0 all done, 1 a job failed (the others ran), 2 bad input, 75 stopped by a signal.
"""

import _checkout  # isort: skip

import argparse


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = _checkout.Parser(__doc__)
    p.add_argument("--config", default="suites/quickstart.yaml", help="as given or under configs/")
    p.add_argument(
        "--output",
        type=_checkout.folder,
        help="folder of the suite; default: runs/<its name>",
    )
    p.add_argument("--only", default="", metavar="A,B", help="initialisations, protocols, cells")
    p.add_argument("--seeds", default="", metavar="1,2,3", help="instead of the suite's own")
    p.add_argument("--format", default="markdown", choices=("markdown", "latex", "csv"))
    p.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="at once; 0: a job for each GPU"
    )
    p.add_argument("--executor", default="local", choices=("local", "slurm"), help="where jobs run")
    p.add_argument("--dry-run", action="store_true", help="print the plan and the commands only")
    p.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="keys of the suite to change")
    return p


def main() -> int:
    """Plan, run, report; return the exit status."""
    arguments = parser().parse_intermixed_args()
    from suite.benchmark import benchmark

    return benchmark(**vars(arguments))


if __name__ == "__main__":
    _checkout.run(main)
