#!/usr/bin/env python3
"""Evaluate saved detections alone: COCO's box and mask AP of a coco_instances_results.json.

    tools/evaluate.py --results coco_instances_results.json --annotations instances_val.json

--against compares with another run's detections of the same images: Δ with a 95% interval from a
paired bootstrap. --output gets coco_metrics.json (AP per class, curves) and result rows.
"""

import _checkout  # isort: skip

import argparse
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = _checkout.Parser(__doc__)
    p.add_argument("--results", type=Path, required=True, help="detections in COCO's result format")
    p.add_argument("--annotations", type=Path, required=True, help="COCO-format annotations")
    p.add_argument("--against", type=Path, help="detections that Δ refers to")
    p.add_argument(
        "--coco-backend",
        default="pycocotools",
        help="pycocotools (of record); faster, hotcoco, auto: the fastest that is installed",
    )
    p.add_argument(
        "--output", type=_checkout.folder, help="folder for coco_metrics.json and results.jsonl"
    )
    p.add_argument(
        "--init", default="", help="initialisation in the rows; default: the file's name"
    )
    p.add_argument("--protocol", default="saved detections", help="protocol in the rows")
    p.add_argument("--resamples", type=int, default=1000, help="draws of the images for --against")
    p.add_argument("--seed", type=int, default=0, help="of the trial, and of the draws")
    return p


def main() -> None:
    """Evaluate, print, record."""
    arguments = parser().parse_args()
    from detection import compare, saved
    from detection.annotations import read_detections

    truth = saved.open_truth(arguments.annotations)
    detections = read_detections(arguments.results, truth)
    other = read_detections(arguments.against, truth) if arguments.against else None
    backend = saved.choose(arguments.coco_backend)
    evaluations = saved.evaluate_all(truth, detections, backend)
    print(saved.table(evaluations))
    if arguments.output:
        identity = {"init": arguments.init or arguments.results.stem, "seed": arguments.seed}
        identity |= {"protocol": arguments.protocol, "dataset": arguments.annotations.stem}
        rows = saved.record(evaluations, arguments.output, backend, **identity)
        print(f"result rows in {rows}, AP per class and curves beside them")
    if other is not None:
        found = compare.compare_files(truth, detections, other, arguments.resamples, arguments.seed)
        print(f"\nΔ to {arguments.against}")
        print(compare.table({(metric,): difference for metric, difference in found.items()}))


if __name__ == "__main__":
    _checkout.run(main)
