#!/usr/bin/env python3
"""Evaluate pretrained weights by transfer: linear probe, k-NN, few-shot or fine-tuning.

tools/run_transfer.py --config transfer/linear.yaml --data cub200 --weights ckpt.pth
tools/run_transfer.py --config transfer/cub200_finetune.yaml --weights moco_v2_800ep.pth.tar
tools/launch.py tools/run_transfer.py …      # features and training on all GPUs

Weights are a checkpoint of this suite or any that tools/convert_to_d2.py recognises. Each number
becomes a row of OUTPUT/results.jsonl. Exit status: 0 done, 1 diverged, 2 bad input, 75 stopped by a
signal with everything saved (start again with --resume).
"""

import _checkout  # isort:skip

import argparse
import hashlib
from typing import TYPE_CHECKING

from core import dist
from core.config import ROOT, load_config, recipe_and_data
from core.results import ROWS_FILE, ResultRow, sha256_of

if TYPE_CHECKING:
    from transfer.backbone import Backbone


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = _checkout.Parser(__doc__)
    parser.add_argument("--config", required=True, help="a file, or a name under configs/")
    parser.add_argument("--data", help="a data set of data/catalogue.py; default: the config's own")
    parser.add_argument("--weights", required=True, help="a file, timm:NAME or torchvision:NAME")
    parser.add_argument("--init", default="", help="how rows name the weights; default: their own")
    parser.add_argument("--format", help="as of tools/convert_to_d2.py")
    parser.add_argument(
        "--prefix", help="select one of several backbones in the file, e.g. model_ema"
    )
    parser.add_argument(
        "--output", type=_checkout.folder, help="default: runs/transfer/CONFIG/INIT_WEIGHTS"
    )
    parser.add_argument("--resume", action="store_true", help="go on with a cut fine-tuning")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and end")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="changes to the config")
    return parser.parse_intermixed_args()


def main() -> int:
    """Evaluate, and print one line for each number."""
    arguments = parse()
    from transfer.config import TransferConfig
    from transfer.plan import plan
    from transfer.run import run

    path, named = recipe_and_data(arguments.config, "transfer")
    data = ["data.name", arguments.data or named] if arguments.data or named else []
    config = load_config(TransferConfig, path, [*data, *arguments.overrides])
    recipe = load_config(TransferConfig, path, data)
    weights = read_weights(arguments.weights, arguments.init, arguments.format, arguments.prefix)
    name = "_".join([*data[1:], path.stem])
    default = ROOT / "runs" / "transfer" / name / f"{weights.init}_{weights.sha256[:8]}"
    output = arguments.output or default
    try:
        if arguments.dry_run:
            dist.init(config.loop.device, config.loop.timeout)
            said = plan(config, weights, output, arguments.resume)
            if dist.is_main():
                print(said)
            return 0
        rows = run(config, weights, output, arguments.resume, recipe)
        if dist.is_main():
            print("\n".join([*map(_line, rows), f"rows: {output / ROWS_FILE}"]))
    finally:
        dist.shutdown()
    return 0


def read_weights(path: str, init: str, format: str | None, prefix: str | None) -> "Backbone":
    """Return the backbone in a file: of this suite, or any that convert finds.

    Rows name weights of others by their file, and tell apart two backbones of one file and two
    conventions (``format``) under which one backbone was read.

    Raises:
        InputError: missing, damaged, holding code, or no image backbone.
    """
    from convert import layouts, reading, zoo
    from convert.backbone import read_backbone
    from convert.d2 import default_output
    from models.checkpoint import is_ours, load_checkpoint
    from transfer import backbone

    if not path.startswith(zoo.PREFIXES) and is_ours(reading.read(path)):
        return backbone.from_checkpoint(load_checkpoint(path), sha256_of(path), init)
    found = read_backbone(path, format=format, prefix=prefix)
    sha256 = found.source_sha256
    chosen = [*([] if prefix is None else [found.source_place]), *([format] if format else [])]
    if chosen:
        sha256 = hashlib.sha256(" ".join([sha256, *chosen]).encode()).hexdigest()
    return backbone.from_tensors(
        found.arch,
        found.state,
        found.convention.mean,
        found.convention.std,
        channel_order=found.convention.channel_order,
        stride_in_1x1=found.convention.stride_in_1x1,
        sha256=sha256,
        path=found.source_path,
        init=init or found.origin.get("method", default_output(path).stem.removesuffix("_d2")),
        origin=found.origin,
        spec=layouts.layout_of(found.arch).spec,
    )


def _line(row: "ResultRow") -> str:
    selection = "" if row.selection == "last" else f", {row.selection}"
    if row.details.get("at_grid_edge"):
        selection += " (at the edge of the grid: widen linear.log10_c_min or _max)"
    return (
        f"{row.init} seed {row.seed}  {row.protocol}  {row.dataset}/{row.split}  {row.metric} "
        f"{row.value:.2f}{row.unit}{selection}"
    )


if __name__ == "__main__":
    _checkout.run(main)
