#!/usr/bin/env python3
"""Say which differences between initialisations are more than chance, from their detections.

    tools/compare.py runs/quickstart
    tools/compare.py runs/detection/ce-seed1 runs/detection/ctc-seed1 --baseline ce

A paired bootstrap over the validation images gives every Δ of box and mask AP a 95% interval.
Trials are paired by seed. Rows go to bootstrap.jsonl in the first folder; tools/make_report.py
shows them.
"""

import _checkout  # isort: skip

import argparse


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = _checkout.Parser(__doc__)
    p.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders of them")
    p.add_argument("--baseline", default="ce", help="initialisation that every Δ refers to")
    p.add_argument("--resamples", type=int, default=1000, help="draws of the images")
    p.add_argument("--seed", type=int, default=0, help="of the draws")
    p.add_argument(
        "--output",
        type=_checkout.folder,
        help="folder for bootstrap.jsonl; default: the first",
    )
    return p


def main() -> None:
    """Compare and print."""
    arguments = parser().parse_args()
    from detection.compare import as_comparison, compare_runs, table

    rows = compare_runs(**vars(arguments))
    for place in dict.fromkeys((row.protocol, row.dataset, row.split) for row in rows):
        own = [row for row in rows if (row.protocol, row.dataset, row.split) == place]
        seeds = sorted({seed for row in own for seed in row.details["seeds"]})
        print(f"{place[0]} on {place[1]} ({place[2]}), Δ to {arguments.baseline}, seeds {seeds}")
        print(table({(row.init, row.details["compared"]): as_comparison(row) for row in own}))


if __name__ == "__main__":
    _checkout.run(main)
