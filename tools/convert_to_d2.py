#!/usr/bin/env python3
"""Convert a checkpoint to detectron2 weights, and prove that both compute the same features.

tools/convert_to_d2.py ckpt.pth                    # writes ckpt_d2.pth beside it
tools/convert_to_d2.py ckpt.pth --output out.pth --prefix model_ema
tools/convert_to_d2.py torchvision:resnet50        # weights that are on this machine already
tools/convert_to_d2.py ckpt_d2.pth --to torchvision
tools/convert_to_d2.py --list-formats
"""

import _checkout  # isort:skip

import argparse

from convert.sources import FORMATS
from core.errors import InputError


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    # fmt: off
    parser = _checkout.Parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", help="a file, timm:NAME or torchvision:NAME")
    parser.add_argument("--output", type=_checkout.file, help="default: ckpt_d2.pth beside it")
    parser.add_argument("--arch", default="", metavar="NAME",
                        help="the network, where the file does not say it: timm/NAME[.TAG] or "
                        "path/to/file.py:function")
    parser.add_argument("--format", help="the input convention: one of --list-formats")
    parser.add_argument("--prefix", metavar="PLACE",
                        help="select one of several backbones in the file, e.g. model_ema")
    parser.add_argument("--to", default="detectron2", choices=("detectron2", "torchvision"))
    parser.add_argument("--drop", action="append", default=[], metavar="NAME",
                        help="also leave behind what has this name or lies below it")
    for name in ("--mean", "--std"):
        parser.add_argument(name, type=float, nargs=3, metavar="V",
                            help="of R, G, B on 0…255; only for weights that were trained with "
                            "others than their format's usual ones")
    parser.add_argument("--overwrite", action="store_true", help="replace another source's output")
    parser.add_argument("--list-formats", action="store_true", help="print the formats and stop")
    # fmt: on
    return parser.parse_args()


def main() -> None:
    """Convert, prove, and print what was found and how well it agrees."""
    arguments = parse()
    if arguments.list_formats:
        for name, format in FORMATS.items():
            print(f"{name:16} {format.about}")
        return
    if arguments.checkpoint is None:
        raise InputError("no checkpoint given; write tools/convert_to_d2.py ckpt.pth")

    from convert.backbone import Backbone
    from convert.d2 import Check, convert, summary

    def prove(backbone: Backbone) -> Check:
        from detection.parity import proof, proof_of_way_back  # detectron2, for good input only

        return (proof if arguments.to == "detectron2" else proof_of_way_back)(backbone)

    conversion = convert(
        arguments.checkpoint,
        arguments.output,
        arch=arguments.arch,
        format=arguments.format,
        prefix=arguments.prefix,
        to=arguments.to,
        drop=arguments.drop,
        mean=arguments.mean,
        std=arguments.std,
        overwrite=arguments.overwrite,
        prove=prove,
    )
    print("\n".join([*summary(conversion.facts), *conversion.proof.lines()]))
    print(f"wrote     {conversion.output}")


if __name__ == "__main__":
    _checkout.run(main)
