#!/usr/bin/env python3
"""Rebuild tables and page from run folders alone: no GPU, no training code, no network.

    tools/make_report.py runs/quickstart                    a suite, with its own settings
    tools/make_report.py runs/a runs/b --baseline ce --output report

Writes table.md, table.tex, table.csv, report.html and figures/ into --output (default: the first
folder), and prints the table.
"""

import _checkout  # isort: skip

import argparse


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = _checkout.Parser(__doc__)
    p.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders of them")
    p.add_argument(
        "--output",
        type=_checkout.folder,
        help="folder to write to; default: the first of RUNS",
    )
    p.add_argument("--title", default="")
    p.add_argument("--baseline", default="", help="initialisation that every Δ refers to")
    p.add_argument("--columns", default="", metavar="A,B", help="metrics, such as bbox/AP,segm/AP")
    p.add_argument("--images", type=int, help="validation images in the page")
    p.add_argument("--score", type=float, help="predictions below it are not drawn")
    p.add_argument("--format", default="markdown", choices=("markdown", "latex", "csv"))
    return p


def main() -> None:
    """Read, write, print."""
    arguments = parser().parse_args()
    from suite.page import rebuild

    rebuild(**vars(arguments))


if __name__ == "__main__":
    _checkout.run(main)
