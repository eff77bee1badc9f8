"""From a weights file into a detector: every tensor accounted for, the input convention compared.

detectron2 itself only warns when nothing matches, and then trains from random initialisation; a
wrong mean, channel order or stride matches every name and is silently wrong. Here a run does not
start unless all backbone tensors match by name and shape, none is left over, and what the weights
expect as input is what the config feeds.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from convert import d2
from convert.names import to_torchvision
from convert.networks import random_tensors
from convert.reading import PICKLES, read_pickle
from core.errors import InputError
from core.results import sha256_of
from detection.backbones import inside, uses_network
from detection.cfg import set_norms
from models import checkpoint
from models.factory import untagged

BACKBONE = re.compile(r"^(?:backbone\.bottom_up\.|backbone\.)?((?:stem|res[2-5]\.\d+)\..+)$")
HEADS = ("proposal_generator.", "roi_heads.", "head.", "backbone.fpn_", "sem_seg_head.")
STEM = "stem.conv1.weight"
COUNTER = "num_batches_tracked"  # of BatchNorm; has no part in what a network computes
ROUNDING = 0.02  # on 0…255, of mean and std: 58.4 is 58.395, but CLIP's 122.77 is not 123.675
LIBRARIES = ("timm:", "torchvision:")  # weights that a library keeps on this machine
CONVENTION = ("mean", "std", "channel_order", "stride_in_1x1")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors of a file under detectron2's names, and what the file says of itself."""

    path: Path  # as the user gave it
    loadable: Path  # the same under detectron2's names: itself, or its conversion
    sha256: str  # of that file
    tensors: dict[str, Tensor]
    facts: dict[str, Any]  # empty where the file says nothing
    whole: bool  # a detector with its heads, not a backbone alone


def read_weights(path: str | Path, converted: Path, arch: str = "") -> Weights:
    """Read a backbone or detector; anything else is converted on the way.

    Args:
        path: a converted file, a detector saved by this suite or detectron2 (its zoo's ``.pkl``
            too), or a raw checkpoint.
        converted: where a raw checkpoint's conversion is written.
        arch: the network of a raw checkpoint that does not say it; "": a ResNet, or by its shapes.

    Raises:
        InputError: missing, truncated, holding code, or not recognised.
    """
    if not str(path).startswith(LIBRARIES):
        path = Path(path).expanduser()
        checkpoint.verify_file(path)
        read = checkpoint.load_plain if _is_torch_file(path) else _pickled_detector
        found = _as_detectron2(read(path))
        if found is not None:
            tensors, facts = found
            backbone = d2.is_network(facts)  # whose own names may be those of a detector's heads
            whole = not backbone and any(name.startswith(HEADS) for name in tensors)
            return Weights(path, path, sha256_of(path), tensors, facts, whole)
    from detection.parity import proof

    d2.convert(path, converted, arch=arch, prove=proof)
    content = d2.load_converted(converted)
    facts = dict(content["facts"])
    return Weights(Path(path), converted, facts["source_sha256"], content["model"], facts, False)


def meta_model(cfg: CfgNode) -> nn.Module:
    """Return the config's detector with shapes alone, on any hardware; no tensor is computed."""
    meta = cfg.clone()
    meta.defrost()
    meta.MODEL.DEVICE = "meta"
    set_norms(meta, "BN")  # the same names and shapes
    with torch.device("meta"):
        model: nn.Module = build_model(meta)
    return model


def model_shapes(cfg: CfgNode) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of the config's detector, without computing one."""
    return {name: tuple(value.shape) for name, value in meta_model(cfg).state_dict().items()}


def covered(weights: Weights, cfg: CfgNode) -> str:
    """Return how many tensors of the config's network the weights fill: all of them.

    Raises:
        InputError: see ``match``.
    """
    pairs = match(weights, model_shapes(cfg))
    what = "detector" if weights.whole else "backbone"
    return f"{len(pairs)} of {len(pairs)} {what} tensors"


def match(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Map the detector's tensor names to the file's; complete, or an error.

    A backbone must cover the detector's backbone exactly (in a C4 detector, res5 is part of the box
    head); a whole detector must cover everything.

    Raises:
        InputError: a tensor is missing, left over, or of another shape.
    """
    targets = [name for name in shapes if COUNTER not in name and not name.startswith("pixel_")]
    if weights.whole:
        pairs = {name: name for name in targets if name in weights.tensors}
        left = [n for n in weights.tensors if n not in pairs and COUNTER not in n]
        left = [n for n in left if "cell_anchors" not in n and not n.startswith("pixel_")]
    else:
        network = any(map(inside, targets))
        own = inside if network else backbone_name
        targets = [name for name in targets if own(name)]
        by_name = (
            network_names(weights)
            if network
            else {backbone_name(name): name for name in weights.tensors if backbone_name(name)}
        )
        pairs = {t: by_name[own(t)] for t in targets if own(t) in by_name}
        if d2.is_network(weights.facts):
            optional = random_tensors(weights.facts["arch"])
            targets = [t for t in targets if t in pairs or own(t) not in optional]
        used = set(pairs.values())
        left = [n for n in by_name.values() if n not in used and COUNTER not in n]
    for target, source in pairs.items():
        have, want = tuple(weights.tensors[source].shape), shapes[target]
        if have != want:
            raise InputError(
                f"{weights.path}: {source} has shape {_x(have)}, but the config's network wants "
                f"{_x(want)}; is it another architecture (MODEL.RESNETS.DEPTH, --arch)?"
            )
    missing = [name for name in targets if name not in pairs]
    what = "detector" if weights.whole else "backbone"
    if missing:
        raise InputError(
            f"{weights.path} covers {len(pairs)} of the {len(targets)} {what} tensors; missing "
            f"{missing[0]}: nothing is trained on a partly random network"
        )
    if left:
        raise InputError(
            f"{weights.path} has {len(left)} {what} tensors that the config's network has no place "
            f"for, such as {left[0]}: it is another architecture"
        )
    return pairs


def check_convention(weights: Weights, cfg: CfgNode, assume: bool = False) -> None:
    """Compare what the weights expect as input with what the config feeds.

    Args:
        weights: with ``facts`` mean and std (RGB, 0..255), channel_order, stride_in_1x1.
        cfg: PIXEL_MEAN and PIXEL_STD in the order of INPUT.FORMAT.
        assume: the user vouches for weights that say nothing of themselves.

    Raises:
        InputError: they differ, or the file says nothing and ``assume`` is not given.
    """
    absent = [key for key in CONVENTION if key not in weights.facts]
    if absent and not assume:
        raise InputError(
            f"{weights.path} does not say which {', '.join(absent)} it was trained with; if it is "
            f"what the config says ({describe(config_convention(cfg))}), add "
            "--assume-convention, else convert it with tools/convert_to_d2.py"
        )
    has, feeds = weights.facts, config_convention(cfg)
    keys = {
        "mean": "MODEL.PIXEL_MEAN",
        "std": "MODEL.PIXEL_STD",
        "channel_order": "INPUT.FORMAT",
        "stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
    }
    for fact, key in keys.items():
        if fact in has and not _same(has[fact], feeds[fact]):
            raise InputError(
                f"{weights.path} was trained with {fact} {_brief(has[fact])}, but {key} of the "
                f"config means {_brief(feeds[fact])}; set the config right, or add "
                "--convention-from-weights to take mean, std, order and stride from the weights"
            )


def config_convention(cfg: CfgNode) -> dict[str, Any]:
    """Return what the config feeds, as the facts of weights say it: mean and std in RGB, 0..255."""
    step = 1 if cfg.INPUT.FORMAT == "RGB" else -1
    return {
        "mean": [float(v) for v in cfg.MODEL.PIXEL_MEAN][::step],
        "std": [float(v) for v in cfg.MODEL.PIXEL_STD][::step],
        "channel_order": cfg.INPUT.FORMAT,
        "stride_in_1x1": bool(cfg.MODEL.RESNETS.STRIDE_IN_1X1),
    }


def take_convention(cfg: CfgNode, weights: Weights) -> None:
    """Set the config's input keys to what the weights say of themselves."""
    absent = [key for key in CONVENTION if key not in weights.facts]
    if absent:
        raise InputError(f"{weights.path} does not say its {', '.join(absent)}")
    facts = weights.facts
    step = 1 if facts["channel_order"] == "RGB" else -1
    cfg.INPUT.FORMAT = facts["channel_order"]
    cfg.MODEL.PIXEL_MEAN = [float(v) for v in facts["mean"]][::step]
    cfg.MODEL.PIXEL_STD = [float(v) for v in facts["std"]][::step]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = bool(facts["stride_in_1x1"])


def network_names(weights: Weights) -> dict[str, str]:
    """Map the network's own names to the file's: plain, a detector's, or detectron2's of a ResNet.

    Raises:
        InputError: a ResNet whose stride stands in the 1×1, which ``models.resnet`` has not.
    """
    if d2.is_network(weights.facts):
        return {name: name for name in weights.tensors}
    if weights.facts.get("stride_in_1x1"):
        raise InputError(
            f"{weights.path} strides in the 1×1 convolution (MSRA), and the network in the 3×3: "
            "use a protocol of detectron2's own ResNet"
        )
    return {to_torchvision(own): n for n in weights.tensors if (own := backbone_name(n))}


def adopt_network(cfg: CfgNode, weights: Weights) -> None:
    """Set ``MODEL.NETWORK.ARCH`` and the input keys to what the weights say of themselves.

    Raises:
        InputError: they are of another network than the config names, or the config has none.
    """
    said, named = str(weights.facts.get("arch", "")), cfg.MODEL.NETWORK.ARCH
    if not uses_network(cfg):
        if d2.is_network(weights.facts):
            raise InputError(
                f"{weights.path} is a {said}, and {cfg.SUITE.PROTOCOL} has detectron2's ResNet: "
                "use a protocol for any backbone, such as detection/mask_rcnn_any_FPN_1x.yaml"
            )
        return
    if said and named and untagged(said) != untagged(named):
        raise InputError(f"{weights.path} is a {said}, but the config or --arch says {named}")
    cfg.MODEL.NETWORK.ARCH = named or said
    if all(key in weights.facts for key in CONVENTION):
        take_convention(cfg, weights)


def load_into(model: nn.Module, weights: Weights) -> int:
    """Copy the matched tensors into the detector; return how many (batch counters not counted).

    Raises:
        InputError: see ``match``.
    """
    state = model.state_dict()
    pairs = match(weights, {name: tuple(value.shape) for name, value in state.items()})
    with torch.no_grad():
        for target, source in pairs.items():
            state[target].copy_(weights.tensors[source])
    return len(pairs)


def _as_detectron2(content: Any) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return tensors and facts of a file under detectron2's names, None if it is another format."""
    if not isinstance(content, dict) or checkpoint.is_ours(content):
        return None
    model = content.get("model", content)
    if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
        return None
    facts = content.get("facts", {})
    network = isinstance(facts, dict) and d2.is_network(facts)
    if not network and not any(inside(n) or backbone_name(n) == STEM for n in model):
        return None
    tensors = {k: v for k, v in model.items() if isinstance(v, Tensor)}
    return tensors, dict(facts) if isinstance(facts, dict) else {}


def _pickled_detector(path: Path) -> dict[str, Any] | None:
    """Return a pickled detector of detectron2's zoo with tensors for its arrays, None of others.

    A pickled backbone is left to ``convert``, which knows conventions by their authors.
    """
    content = read_pickle(path) if path.suffix in PICKLES else None
    if not isinstance(content, dict):
        return None
    model = content.get("model", content)
    if not isinstance(model, dict) or not any(str(name).startswith(HEADS) for name in model):
        return None
    return content | {"model": {name: _as_tensor(value) for name, value in model.items()}}


def _as_tensor(value: Any) -> Any:
    """Return an array of numbers as a tensor of its own, anything else as it is."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        return value
    return torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))


def _is_torch_file(path: Path) -> bool:
    """Whether torch wrote the file."""
    with path.open("rb") as file:
        return file.read(2) == b"PK" or path.suffix in (".pth", ".pt")


def backbone_name(name: str) -> str:
    """Return the name inside the residual network, "" for a tensor of another part."""
    found = BACKBONE.match(name.removeprefix("roi_heads.") if ".res5." in name else name)
    return found[1] if found else ""


def _same(one: Any, other: Any) -> bool:
    if isinstance(other, list):
        return all(abs(a - b) <= ROUNDING for a, b in zip(one, other, strict=True))
    return bool(one == other)


def _brief(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(f"{v:.6g}" for v in value) + "]"
    return str(value)


def describe(convention: dict[str, Any]) -> str:
    """Return an input convention in words."""
    return ", ".join(f"{key} {_brief(value)}" for key, value in convention.items())


def _x(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
