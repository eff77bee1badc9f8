"""Detection configs: detectron2's keys, read safely, checked, and told apart as protocols.

A protocol is a YAML file under ``configs/detection``: differences over its ``_BASE_``. Unknown
keys and wrong types are errors; YAML tags are refused. What a run may choose without leaving its
protocol (output folder, seed, device, weights, data) is listed in ``core.identity.NEUTRAL``.
"""

import math
from ast import literal_eval
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import detectron2.modeling as registries
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import nn

from core import identity
from core.config import find_config, nearest, read_with_bases
from core.errors import InputError
from detection import backbones

SYNC_NORM, NAIVE_NORM = "SyncBN", "naiveSyncBN"
CHOICES: dict[str, Iterable[str]] = {  # what the keys can name that choose an implementation
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN", "RetinaNet"),
    "MODEL.DEVICE": ("cuda", "cpu"),  # which GPUs: --num-gpus, CUDA_VISIBLE_DEVICES
    "MODEL.RESNETS.DEPTH": ("18", "34", "50", "101", "152"),
    "INPUT.FORMAT": ("RGB", "BGR"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR",
    ),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
}  # fmt: skip
REGISTRIES = {
    "MODEL.BACKBONE.NAME": registries.BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": registries.PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": registries.RPN_HEAD_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": registries.ANCHOR_GENERATOR_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
}
NORMS = ("", "BN", SYNC_NORM, NAIVE_NORM, "naiveSyncBN_N", "nnSyncBN", "FrozenBN", "GN", "LN")
POSITIVE = (
    "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "INPUT.MAX_SIZE_TRAIN",
    "INPUT.MAX_SIZE_TEST", "TEST.DETECTIONS_PER_IMAGE", "TEST.PRECISE_BN.NUM_ITER",
)  # fmt: skip
NOT_NEGATIVE = (
    "SEED", "SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_NORM", "SOLVER.MOMENTUM", "SOLVER.GAMMA",
    "SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_FACTOR", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD",
    "INPUT.MIN_SIZE_TEST", "DATALOADER.NUM_WORKERS", "SUITE.KEEP_LAST", "SUITE.MILESTONE_PERIOD",
    "SUITE.EXPECTED_HOURS",
)  # fmt: skip
UNUSED = {  # keys of detectron2 that nothing here reads, with what they may be
    "TEST.AUG.ENABLED": False,
    "TEST.EXPECTED_RESULTS": [],
    "MODEL.LOAD_PROPOSALS": False,
}


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """detectron2's ``Res5ROIHeads`` whose res5 is followed by a norm: MoCo's C4 protocols.

    Shapes: N regions, D = 2048 channels of res5, h×w its map (7×7); N×D×h×w is normalised.

    Networks from self-supervised training end in features of any scale; the norm brings them to the
    scale that the box predictor starts from (MoCo, arXiv 1911.05722, appendix A.3). It is not part
    of the backbone: pretrained weights have nothing for it.
    """

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        blocks, channels = super()._build_res5_block(cfg)
        blocks.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return blocks, channels


def default_cfg() -> CfgNode:
    """Return detectron2's defaults with this suite's own keys under ``SUITE``."""
    cfg = get_cfg()
    cfg.OUTPUT_DIR = ""  # chosen by the tool: runs/detection/<protocol>…
    suite = cfg.SUITE = CfgNode()
    suite.PROTOCOL = ""  # name in the result rows; empty: the config file's stem
    suite.VERSION = 1  # of the protocol in the result rows: raised when what it computes changes
    suite.EXPECTED_HOURS = 0.0  # on 8 GPUs; what --dry-run prints
    suite.KEEP_LAST = 2  # checkpoints kept beside the milestones
    suite.MILESTONE_PERIOD = 0  # iterations between checkpoints that are kept for good; 0: none
    cfg.SOLVER.OPTIMIZER = "SGD"  # every published protocol; "AdamW" learns in fewer iterations
    cfg.SOLVER.AMP.DTYPE = "float16"  # of autocast, if AMP.ENABLED; "bfloat16" for CPUs
    backbones.add_keys(cfg)
    suite.CHANNELS_LAST = False  # memory format of the weights; faster convolutions, mostly in AMP
    suite.COMPILE = ""  # backend of torch.compile for the backbone, such as "inductor"; "": none
    suite.WANDB = ""  # project at Weights & Biases that metrics also go to; "": none
    suite.COCO_BACKEND = "pycocotools"  # of record; "faster", "hotcoco" agree and are faster
    shapes = suite.SHAPES = CfgNode()  # the embedded data, DATASETS.TRAIN ("shapes_train",)
    shapes.TRAIN_IMAGES = 600
    shapes.VAL_IMAGES = 100
    shapes.SIZE = 128  # side, pixels
    shapes.SEED = 0  # of the data; a trial's own seed is SEED
    return cfg


def load_cfg(name: str | Path, overrides: Sequence[str] = ()) -> CfgNode:
    """Return the resolved config: defaults, the chain of YAML files, then ``KEY VALUE`` pairs.

    Raises:
        InputError: no such file, a YAML tag, unknown key (names the nearest), wrong type.
    """
    cfg = default_cfg()
    path = find_config(name, "detection")
    for file, content in read_with_bases(path):
        merge(cfg, content, str(file))
    if not cfg.SUITE.PROTOCOL:
        cfg.SUITE.PROTOCOL = path.stem
    for key, value in parse_overrides(overrides):
        merge(cfg, _nested(key, value), "command line")
    return cfg


def check_values(cfg: CfgNode) -> None:
    """Raise InputError unless each key has a value that it can have.

    What a detector of these values cannot be is left to ``detection.trainer.check_builds``.
    """
    values = dict(_leaves(cfg))
    for key, value in values.items():
        name = key.rsplit(".", 1)[-1]
        known = CHOICES.get(key) or (NORMS if name == "NORM" else None)
        if key in REGISTRIES:
            known = [entry for entry, _ in REGISTRIES[key]]
        if known is not None and str(value) not in known:
            names = ", ".join(name or "'' (none)" for name in known)
            which = "; CUDA_VISIBLE_DEVICES says which GPUs" if key == "MODEL.DEVICE" else ""
            raise InputError(f"{key} is {value!r}: it can be {names}{which}")
    for keys, least in ((POSITIVE, "more than 0"), (NOT_NEGATIVE, "0 or more")):
        for key in keys:
            value = values[key]
            wrong = value is not None and (not math.isfinite(value) or value < 0)
            if wrong or (value == 0 and keys is POSITIVE):
                raise InputError(f"{key} is {value}: it must be {least}")
    for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        if len(values[key]) != 3 or not all(map(_is_number, values[key])):
            raise InputError(f"{key} is {values[key]}: it must be three numbers, in INPUT.FORMAT")
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    wanted = 2 if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" else len(sizes)
    if not sizes or len(sizes) != wanted or not all(_is_number(n) and n > 0 for n in sizes):
        raise InputError(
            f"INPUT.MIN_SIZE_TRAIN is {sizes}: it must be one or more sizes in pixels, or, with "
            "INPUT.MIN_SIZE_TRAIN_SAMPLING range, the least and the largest"
        )
    steps = list(cfg.SOLVER.STEPS)
    if not all(map(_is_number, steps)) or steps != sorted(set(steps)):
        raise InputError(f"SOLVER.STEPS is {cfg.SOLVER.STEPS}: it must be iterations that rise")
    absent = sorted(set(cfg.MODEL.FPN.IN_FEATURES) - set(cfg.MODEL.RESNETS.OUT_FEATURES))
    if absent and "resnet_fpn" in cfg.MODEL.BACKBONE.NAME:
        raise InputError(
            f"MODEL.FPN.IN_FEATURES names {absent[0]!r}, which is not one of "
            f"MODEL.RESNETS.OUT_FEATURES {list(cfg.MODEL.RESNETS.OUT_FEATURES)}"
        )
    for key, only in UNUSED.items():
        if values[key] != only:
            raise InputError(f"{key} {values[key]} is not supported: leave it at {only}")


def parse_overrides(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Return ``KEY VALUE KEY VALUE`` as pairs; what a value means depends on its key's type."""
    if any("=" in text and "." in text.split("=")[0] for text in overrides[::2]):
        key, value = next(t for t in overrides[::2] if "=" in t).split("=", 1)
        raise InputError(f"overrides are KEY VALUE pairs: write {key} {value} with a space")
    if len(overrides) % 2:
        raise InputError(
            f"overrides come in KEY VALUE pairs, but {overrides[-1]!r} has no value; "
            "write for example: SOLVER.MAX_ITER 100"
        )
    return list(zip(overrides[::2], overrides[1::2], strict=True))


def merge(cfg: CfgNode, content: dict[str, Any], where: str) -> None:
    """Merge plain nested values into ``cfg``; ``where`` names their origin in an error."""
    known = dict(_leaves(cfg))
    groups = {key.rsplit(".", n)[0] for key in known for n in range(1, key.count(".") + 1)}
    for key, value in _leaves(content):
        if key in groups:
            raise InputError(f"{where}: {key} is a group of keys, not one with a value ({value!r})")
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}{nearest(key, list(known))}")
        try:
            cfg.merge_from_other_cfg(CfgNode(_nested(key, _coerced(value, known[key]))))
        except (ValueError, KeyError, AssertionError, TypeError):
            raise InputError(
                f"{where}: {key} must be {_type_name(known[key])} like {known[key]!r}, "
                f"not {value!r}"
            ) from None


def protocol_keys(cfg: CfgNode) -> dict[str, Any]:
    """Return the keys that make the protocol, dotted, with plain values."""
    return identity.effective(_plain(cfg))


def hash_of(cfg: CfgNode) -> str:
    """Return a hash of what makes the protocol."""
    return identity.recipe_hash(_plain(cfg))


def changed_keys(cfg: CfgNode, base: dict[str, Any]) -> dict[str, Any]:
    """Return the protocol keys of ``cfg`` whose values differ from those of ``base``."""
    return identity.changed_keys(_plain(cfg), base)


def protocol_name(cfg: CfgNode, changed: dict[str, Any]) -> str:
    """Return the protocol's name for the rows; what was changed stands in ``details.overrides``."""
    return identity.protocol_name(cfg.SUITE.PROTOCOL, changed)


def as_yaml(cfg: CfgNode) -> str:
    """Return the resolved config as plain YAML that ``load_cfg`` reads back to an equal config."""
    return yaml.safe_dump(_plain(cfg), sort_keys=False, default_flow_style=None)


def norm_for(device: str, world_size: int) -> str:
    """Return the norm that does SyncBN's work on this hardware.

    ``nn.SyncBatchNorm`` refuses CPU tensors; detectron2's ``naiveSyncBN`` works over gloo; one CPU
    process sees the whole batch, so that plain BN is the same.
    """
    if device != "cpu":
        return SYNC_NORM
    return NAIVE_NORM if world_size > 1 else "BN"


def shares_statistics(cfg: CfgNode) -> bool:
    """Whether BatchNorm statistics are taken over all processes."""
    return any(value in (SYNC_NORM, NAIVE_NORM) for _, value in _leaves(cfg))


def set_norms(cfg: CfgNode, norm: str) -> int:
    """Replace every SyncBN of the config by ``norm``; return how many keys were concerned."""
    keys = [key for key, value in _leaves(cfg) if value == SYNC_NORM]
    for key in keys:
        merge(cfg, _nested(key, norm), "norm")
    return len(keys)


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _coerced(value: Any, old: Any) -> Any:
    """Take an integer where a real number is wanted; leave all else to detectron2's own rules."""
    if isinstance(value, str) and not isinstance(old, str):
        value = _literal(value)
    if isinstance(value, bool) != isinstance(old, bool) and old is not None:
        raise TypeError
    if isinstance(old, float) and isinstance(value, int):
        return float(value)
    if isinstance(value, str):
        return repr(value)  # a string that looks like a number stays a string
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _literal(text: Any) -> Any:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return {"true": True, "false": False}.get(text, text) if isinstance(text, str) else text


def _type_name(value: Any) -> str:
    names = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list | tuple) else "a value")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
