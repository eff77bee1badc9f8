#!/usr/bin/env python3
"""Check in minutes what would else be found after days: weights, data, speed, memory, resume.

    tools/preflight.py --config detection/mask_rcnn_R50_FPN_1x.yaml --weights ckpt.pth --num-gpus 8
    tools/preflight.py --config … --weights … --only keys,parity,input

Takes what tools/train_net.py takes, and measures on one process what --num-gpus or --num-processes
are planned. A line for each check: ✓ passed, ✗ failed, – not run. Nothing is left behind. Exit
status: 0 all passed (but for those that look at weights, where there are none), 1 one failed or
could not run, 2 bad input.
"""

import _checkout  # isort: skip

import argparse
import dataclasses
from typing import Any

from train_net import add_run_options


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = _checkout.Parser(__doc__)
    add_run_options(p)
    p.add_argument("--only", default="", metavar="A,B", help="these checks, and what they need")
    p.add_argument("--iterations", type=int, help="that are timed (20)")
    p.add_argument("--overfit-steps", type=int, help="on one image (100)")
    p.add_argument("--overfit-factor", type=float, help="by which its loss must fall (2)")
    p.add_argument("--images", type=int, help="that are evaluated (8)")
    p.add_argument("--resume-iterations", type=int, help="half of them after a resume (10)")
    return p


def main() -> int:
    """Print the findings one by one, and what they come to."""
    arguments = vars(parser().parse_intermixed_args())
    from detection.bench import Limits
    from detection.job import Request
    from detection.preflight import FAILED, NOT_RUN, PASSED, preflight

    def given(kind: type) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(kind)}
        return {k: v for k, v in arguments.items() if k in names and v is not None}

    only = [name for name in arguments["only"].split(",") if name]
    findings = []
    for finding in preflight(Request(**given(Request)), Limits(**given(Limits)), only):
        print(finding.line(), flush=True)
        findings.append(finding)
    marks = [finding.mark for finding in findings]
    print(
        f"{marks.count(PASSED)} of {len(marks)} checks passed, "
        f"{marks.count(FAILED)} failed, {marks.count(NOT_RUN)} not run"
    )
    return int(any(finding.stands_in_the_way for finding in findings))


if __name__ == "__main__":
    _checkout.run(main)
