#!/usr/bin/env python3
"""Pretrain a backbone: from random weights, by cross-entropy (ce) or by CTC (ctc).

  tools/run_pretrain.py ctc                                       ResNet-50 on the embedded data
  tools/run_pretrain.py ce --config pretrain/ce_cifar100.yaml     a recipe, KEY VALUE overrides
  tools/run_pretrain.py ctc --output runs/x --resume              go on after an interruption

tools/pretrain.sh does the same on all GPUs of a machine. Exit status: 0 done, 1 failed, 2 bad
input, 75 stopped by a signal with everything saved (start again with --resume).
"""

import _checkout  # isort: skip

import argparse
import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.recipe import PretrainConfig


def parse() -> argparse.Namespace:
    parser = _checkout.Parser(__doc__)
    parser.add_argument("method", choices=("random", "ce", "ctc"), help="how to pretrain")
    parser.add_argument("--config", help="recipe, as given or under configs/")
    parser.add_argument(
        "--output", type=_checkout.folder, help="run folder (default runs/<recipe>)"
    )
    parser.add_argument("--init", default="", help="name of the initialisation in tables")
    parser.add_argument("--resume", action="store_true", help="go on where the run folder stands")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and end")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="e.g. loop.amp bf16")
    return parser.parse_intermixed_args()


def read_config(arguments: argparse.Namespace) -> "PretrainConfig":
    """Return the recipe; a resumed run has its own, unless --config names one."""
    from core.config import InputError, find_config, load_config
    from pretrain.recipe import PretrainConfig

    default = "ce" if arguments.method == "random" else arguments.method
    recipe = find_config(arguments.config or f"pretrain/{default}_shapes.yaml")
    own = arguments.output / "config.yaml" if arguments.output else None
    if arguments.resume and not arguments.config and own and own.exists():
        recipe = own
    config = load_config(PretrainConfig, recipe, arguments.overrides)
    if arguments.method == "random" and config.method == "ce":
        config = dataclasses.replace(config, method="random")
    elif config.method != arguments.method:
        raise InputError(f"{recipe} is a recipe for {config.method}, not for {arguments.method}")
    return dataclasses.replace(
        config, recipe=config.recipe or recipe.stem, init=arguments.init or config.init
    )


def main() -> int:
    arguments = parse()
    from core import dist
    from core.config import ROOT
    from pretrain import run

    config = read_config(arguments)
    output = arguments.output or ROOT / "runs" / f"{config.recipe}-s{config.seed}"
    try:
        if arguments.dry_run:
            from pretrain.plan import plan

            dist.init(config.loop.device, config.loop.timeout)
            said = plan(config, output, arguments.resume)
            if dist.is_main():
                print(said)
            return 0
        path = run.pretrain(config, output, arguments.resume)
        if dist.is_main():
            print(f"{path}\nnext: tools/convert_to_d2.py {path}")
    finally:
        dist.shutdown()
    return 0


if __name__ == "__main__":
    _checkout.run(main)
