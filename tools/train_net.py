#!/usr/bin/env python3
"""Train or evaluate a detector on a pretrained backbone, under a named protocol.

    tools/train_net.py --config detection/mask_rcnn_R50_FPN_1x.yaml --num-gpus 8 --weights ckpt.pth

``KEY VALUE`` pairs override single config keys, as in detectron2. Box and mask AP are appended to
results.jsonl in the run folder.
"""

import _checkout  # isort: skip

import argparse
import dataclasses


def add_run_options(p: argparse.ArgumentParser) -> None:
    """Add what describes a run: config, weights, hardware, data, overrides."""
    p.add_argument("--config", "--config-file", default="", help="YAML, as given or under configs/")
    p.add_argument("--weights", default="", help="backbone: ckpt_d2.pth, or raw (then converted)")
    p.add_argument("--arch", default="", help="network of a protocol for any backbone: timm/NAME, "
                   "resnet50, path/to/file.py:function; default: as the weights say")  # fmt: skip
    p.add_argument("--output", type=_checkout.folder, help="run folder (OUTPUT_DIR)")
    p.add_argument("--init", default="", help="name of the initialisation in the result rows")
    p.add_argument("--seed", type=int, help="of this trial (SEED)")
    p.add_argument("--num-gpus", type=int, help="per machine; 0 runs on CPU")
    p.add_argument("--num-processes", type=int, default=0, help="CPU ranks on this machine")
    for split in ("train", "val"):
        p.add_argument(f"--{split}-json", default="", help="COCO-format annotations")
        p.add_argument(f"--{split}-images", default="", help="the folder of their images")
    p.add_argument("--dataset", default="", help="name of the data given by json, for the rows")
    p.add_argument(
        "--coco-backend", default="", help="pycocotools (of record), faster, hotcoco, or auto"
    )
    p.add_argument(
        "--assume-convention",
        action="store_true",
        help="vouch that weights which do not say so expect the config's mean, std, order, stride",
    )
    p.add_argument(
        "--convention-from-weights",
        action="store_true",
        help="take mean, std, channel order and stride from the weights, not from the config",
    )
    p.add_argument(
        "--check-images", action="store_true", help="decode every image first, on all cores"
    )
    p.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="config keys to change")


def parser() -> argparse.ArgumentParser:
    """Return the command line, detectron2's with a few more flags."""
    p = _checkout.Parser(__doc__)
    add_run_options(p)
    p.add_argument("--num-machines", type=int, default=1)
    p.add_argument("--machine-rank", type=int, default=0)
    p.add_argument("--dist-url", default="auto", help="for several machines: tcp://HOST:PORT")
    p.add_argument("--job", default="", help=argparse.SUPPRESS)  # of a process that it starts
    p.add_argument("--resume", action="store_true", help="go on with the run in --output")
    p.add_argument("--eval-only", action="store_true", help="evaluate a trained detector")
    p.add_argument("--dry-run", action="store_true", help="check, say what would be done, and end")
    return p


def main() -> int:
    """Parse, run, return the exit status."""
    arguments = parser().parse_intermixed_args()
    from detection.job import Request
    from detection.run import run

    names = {field.name for field in dataclasses.fields(Request)}
    return run(Request(**{k: v for k, v in vars(arguments).items() if k in names}))


if __name__ == "__main__":
    _checkout.run(main)
