"""Any network of ``models.factory`` as a detectron2 backbone, under its own tensor names.

``MODEL.BACKBONE.NAME build_network_backbone`` builds ``MODEL.NETWORK.ARCH``. A network that gives
maps of strides 4, 8, 16 and 32 gets an FPN; one whose maps have a single stride, a plain
transformer, gets ViTDet's simple feature pyramid (arXiv 2203.16527). Below
``backbone.bottom_up.network.`` (FPN) or ``backbone.net.network.`` stand the names of
``create_model(ARCH)``, without the classifier.

Shapes: N images, H×W pixels of a batch, C channels of a map.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import NaiveSyncBatchNorm, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN, SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from convert.networks import random_tensors
from core.errors import InputError
from models.base import Description, head_prefixes, sync_batch_norm
from models.factory import (
    TIMM,
    canonical,
    check_name,
    create_model,
    describe,
    forward_maps,
    untagged,
)

BUILDER = "build_network_backbone"
STRIDES = {f"res{n}": 2**n for n in range(2, 6)}  # detectron2's names of maps
PLAIN = "res4"  # what a plain transformer's map is called, at stride 16
SCALES = (4.0, 2.0, 1.0, 0.5)  # of a simple feature pyramid: strides 4, 8, 16, 32
PROBE = (224, 320)  # pixels, of the pass that finds unused parameters; no network's own size
INSIDE = re.compile(r"^backbone\.(?:bottom_up|net)\.network\.(.+)$")
NORMS = ("", "BN", "SyncBN", "naiveSyncBN", "FrozenBN")


def add_keys(cfg: CfgNode) -> None:
    """Add ``MODEL.NETWORK`` and ``SOLVER.LAYER_DECAY`` with their defaults."""
    network = cfg.MODEL.NETWORK = CfgNode()
    network.ARCH = ""  # a name of models.factory: timm/NAME, resnet50, path/to/file.py:function
    network.DROP_PATH = 0.0  # rate of stochastic depth at the last block (arXiv 1603.09382)
    network.NORM = ""  # of its BatchNorms: "" as they are, or SyncBN, FrozenBN
    network.OUT_NORM = ""  # of each map before the FPN, such as "LN"; "": none
    network.SQUARE_PAD = 0  # images are padded to this side, pixels; 0: to a multiple of 32
    cfg.SOLVER.LAYER_DECAY = 1.0  # factor of the lr from a layer of the network to the one below
    cfg.SOLVER.LAYERS = []  # [pattern, layer] pairs, the first match counts; []: timm's layers


def uses_network(cfg: CfgNode) -> bool:
    """Whether a config's backbone is a network of ``models.factory``."""
    return bool(cfg.MODEL.BACKBONE.NAME == BUILDER)


def set_arch(cfg: CfgNode, arch: str) -> None:
    """Set ``MODEL.NETWORK.ARCH`` to what a command line names.

    Raises:
        InputError: unknown, or the protocol has a backbone of its own or names another network.
    """
    check_name(arch)
    named = cfg.MODEL.NETWORK.ARCH
    if not uses_network(cfg):
        raise InputError(
            f"--arch {arch}: {cfg.SUITE.PROTOCOL} has detectron2's ResNet; a protocol for any "
            "backbone is detection/mask_rcnn_any_FPN_1x.yaml"
        )
    if named and untagged(named) != untagged(canonical(arch)):
        raise InputError(f"--arch {arch}: {cfg.SUITE.PROTOCOL} is a protocol of {named}")
    cfg.MODEL.NETWORK.ARCH = canonical(arch)


def inside(name: str) -> str:
    """Return a detector tensor's name in the network; "" for a tensor of another part."""
    found = INSIDE.match(name)
    return found[1] if found else ""


class NetworkBackbone(Backbone):
    """Maps of a network under detectron2's names, ``res2`` to ``res5`` or ``res4`` alone.

    A plain network's map of another stride than 16 is resized to it, bilinearly: at patch 14 by
    14/16. The network itself stays as it was pretrained.
    """

    def __init__(self, arch: str, drop_path: float = 0.0, out_norm: str = "") -> None:
        super().__init__()
        described = describe(arch)
        self.selected = selected_maps(described)
        options = {"drop_path_rate": drop_path} if drop_path else {}
        self.network = create_model(arch, 2, **options)
        for prefix in head_prefixes(self.network):
            owner, _, name = prefix.removesuffix(".").rpartition(".")
            setattr(self.network.get_submodule(owner), name, nn.Identity())
        never_used = unused_parameters(arch)
        for name, parameter in self.network.named_parameters():
            if name in never_used:
                parameter.requires_grad_(False)  # DDP waits for the gradient of every other one
        channels = {entry.name: entry.channels for entry in described.maps}
        self.stride = 0 if len(self.selected) > 1 else described.maps[-1].stride
        self._out_features = list(self.selected)
        self._out_feature_strides = {name: STRIDES[name] for name in self.selected}
        self._out_feature_channels = {name: channels[own] for name, own in self.selected.items()}
        self.out_norms = nn.ModuleDict()
        if out_norm:
            for name, width in self._out_feature_channels.items():
                self.out_norms[name] = get_norm(out_norm, width)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map N×3×H×W normalised images, H and W multiples of 32, to maps N×C×h×w."""
        size = x.shape[-2:]
        if self.stride:
            x = F.pad(x, (0, -size[1] % self.stride, 0, -size[0] % self.stride))
        maps = forward_maps(self.network, x)
        found = {name: maps[own] for name, own in self.selected.items()}
        if self.stride and self.stride != STRIDES[PLAIN]:
            found[PLAIN] = resized(found[PLAIN], self.stride, STRIDES[PLAIN], size)
        return {
            name: self.out_norms[name](value) if name in self.out_norms else value
            for name, value in found.items()
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each map."""
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=STRIDES[name])
            for name in self._out_features
        }


def resized(maps: Tensor, stride: int, target: int, size: torch.Size) -> Tensor:
    """Resize N×C×h×w maps of one stride to another, for images of ``size`` pixels.

    Cell (i, j) of the result lies over the same pixels as in a map of that stride.
    """
    scale = stride / target
    maps = F.interpolate(
        maps, scale_factor=scale, mode="bilinear", recompute_scale_factor=False, antialias=False
    )
    return maps[..., : size[0] // target, : size[1] // target]


def selected_maps(described: Description) -> dict[str, str]:
    """Return the network's own name of each map that a detector takes, by detectron2's name.

    Raises:
        InputError: the network gives no maps, or none of some stride.
    """
    if described.kind == "vector":
        raise InputError(
            f"{described.name} gives a vector and no map: it can be transferred, not detect"
        )
    if described.kind == "plain":
        return {PLAIN: described.maps[0].name}
    by_stride = {entry.stride: entry.name for entry in described.maps}
    missing = [stride for stride in STRIDES.values() if stride not in by_stride]
    if missing:
        raise InputError(
            f"{described.name} gives maps of strides {', '.join(map(str, by_stride))}; a detector "
            f"needs 4, 8, 16 and 32 (or a single map), and there is none of {missing[0]}"
        )
    return {name: by_stride[stride] for name, stride in STRIDES.items()}


@functools.lru_cache(maxsize=16)
def unused_parameters(arch: str) -> frozenset[str]:
    """Return the parameters that get no gradient from the detector's maps, by the network's names.

    Found by a pass forward and back through the shapes alone, on images that are not square.

    Raises:
        InputError: the network does not take images of any size, or its maps do not cover them.
    """
    described = describe(arch)
    selected = selected_maps(described)
    sides: tuple[int, ...] = PROBE
    if described.kind == "plain":
        sides = tuple(side + -side % described.maps[0].stride for side in PROBE)
    device = "meta" if arch.startswith(TIMM) else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(device):
        network = create_model(arch, 2).train()
        try:
            maps = forward_maps(network, torch.zeros(2, 3, *sides))
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{arch} takes no images of {sides[0]}×{sides[1]} pixels ({reason}), and a "
                "detector's images have all sizes"
            ) from None
        strides = {entry.name: entry.stride for entry in described.maps}
        for own in selected.values():
            found, wanted = maps[own].shape[-2:], [side // strides[own] for side in sides]
            if list(found) != wanted:
                raise InputError(
                    f"{arch}: its map {own} is {found[0]}×{found[1]} for {sides[0]}×{sides[1]} "
                    f"pixels, where a stride of {strides[own]} makes {wanted[0]}×{wanted[1]}"
                )
        total = torch.stack([maps[own].mean() for own in selected.values()]).sum()
        if total.requires_grad:
            total.backward()
    heads = head_prefixes(network)
    without = (name for name, p in network.named_parameters() if p.grad is None)
    return frozenset(name for name in without if not name.startswith(heads))


def can_detect(arch: str) -> bool:
    """Whether a network gives what a detector needs, for images of any size."""
    try:
        unused_parameters(arch)
    except InputError:
        return False
    return True


def own_maps(network: Any, image: Tensor) -> dict[str, Tensor]:
    """Return a network's maps of an image, N×C×h×w by its own names, or its features as "pooled".

    The image is padded to a multiple of a plain network's patches; a network that cannot detect
    gets it resized to its own size.
    """
    described = describe(network.arch)
    with torch.inference_mode():
        if not can_detect(network.arch):
            image = F.interpolate(image, (described.image_size,) * 2)
            return {"pooled": network.forward_head(network.forward_features(image), True)}
        stride = described.maps[0].stride if described.kind == "plain" else 1
        image = F.pad(image, (0, -image.shape[3] % stride, 0, -image.shape[2] % stride))
        return forward_maps(network, image)


def filled(network: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put tensors into a network, in eval mode.

    Raises:
        InputError: one is missing, left over or misshapen (a classifier may be missing).
    """
    heads, optional = head_prefixes(network), random_tensors(network.arch)
    try:
        result = network.load_state_dict(dict(tensors), strict=False)
    except RuntimeError as error:
        raise InputError(f"{network.arch}: {' '.join(str(error).split())[:300]}") from None
    absent = [name for name in result.missing_keys if not name.startswith(heads)]
    absent = [name for name in absent if "num_batches" not in name and name not in optional]
    if absent or result.unexpected_keys:
        raise InputError(
            f"{network.arch}: missing {absent[:3]}, unexpected {result.unexpected_keys[:3]}"
        )
    return network.eval()


def trunk(detector: Any) -> Any:
    """Return the network in a detector, None if its backbone is another one."""
    backbone = getattr(detector, "backbone", detector)
    return getattr(getattr(backbone, "bottom_up", getattr(backbone, "net", None)), "network", None)


def note(arch: str) -> str:
    """Return what a row says of a network's way into the detector; "" where there is nothing."""
    described = describe(arch)
    if described.kind == "plain" and described.maps[0].stride != STRIDES[PLAIN]:
        return f"maps of stride {described.maps[0].stride} are resized to {STRIDES[PLAIN]}"
    return ""


@BACKBONE_REGISTRY.register()
def build_network_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build ``MODEL.NETWORK`` with an FPN, or with a simple feature pyramid if it is plain."""
    keys, fpn = cfg.MODEL.NETWORK, cfg.MODEL.FPN
    if input_shape.channels != 3:
        raise InputError("MODEL.PIXEL_MEAN must have three values")
    if not keys.ARCH:
        raise InputError("MODEL.NETWORK.ARCH is empty: give --arch, such as timm/convnext_tiny")
    bottom_up = NetworkBackbone(keys.ARCH, keys.DROP_PATH, keys.OUT_NORM)
    bottom_up.network = with_norms(bottom_up.network, keys.NORM)
    if cfg.MODEL.BACKBONE.FREEZE_AT not in (0, 5):
        raise InputError(
            f"MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT}: a network is trained (0) or "
            "frozen (5) as a whole"
        )
    if cfg.MODEL.BACKBONE.FREEZE_AT == 5:
        bottom_up.network = with_norms(bottom_up.network, "FrozenBN").requires_grad_(False)
    if len(bottom_up.selected) == 1:
        return SimpleFeaturePyramid(
            bottom_up,
            PLAIN,
            fpn.OUT_CHANNELS,
            SCALES,
            top_block=LastLevelMaxPool(),
            norm=fpn.NORM,
            square_pad=keys.SQUARE_PAD,
        )
    return FPN(
        bottom_up,
        list(STRIDES),
        fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=fpn.FUSE_TYPE,
        square_pad=keys.SQUARE_PAD,
    )


def with_norms(network: Any, norm: str) -> Any:
    """Return a network whose BatchNorms are of another kind, with the same names and numbers.

    Raises:
        InputError: unknown kind.
    """
    if norm not in NORMS:
        raise InputError(f"MODEL.NETWORK.NORM {norm!r} is not one of {', '.join(NORMS[1:])}")
    if norm == "SyncBN":
        return sync_batch_norm(network)
    if norm == "FrozenBN":
        return freeze_batch_norm_2d(network)
    if norm == "naiveSyncBN":
        return _naively_synchronised(network)
    return network


class _NaiveSyncNorm(NaiveSyncBatchNorm):
    """detectron2's BatchNorm over ranks that also works on CPUs, with timm's activation behind."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.weight, self.bias = norm.weight, norm.bias  # with whether they are trained
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def _naively_synchronised(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.BatchNorm2d):
        return _NaiveSyncNorm(module)
    for name, child in module.named_children():
        module.add_module(name, _naively_synchronised(child))
    return module


def solver_rules(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Return the arguments of ``get_default_optimizer_params`` for a network's parameters.

    ``lr_factor_func`` is the layer decay: the stem is layer 0, and what stands behind the network
    (necks, heads) has factor 1. ``overrides`` spare what the network's ``no_weight_decay()`` names,
    and give its other vectors that belong to no norm, as LayerScale's, the norms' weight decay.

    Raises:
        InputError: layer decay of a network whose layers are not known.
    """
    names = {name: p for name, p in model.named_parameters() if inside(name)}
    network = trunk(model)
    spared = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    overrides = {name.rpartition(".")[2]: {"weight_decay": 0.0} for name in spared}
    for name, parameter in names.items():
        leaf = name.rpartition(".")[2]
        if parameter.ndim <= 1 and leaf not in ("weight", "bias"):
            overrides.setdefault(leaf, {"weight_decay": cfg.SOLVER.WEIGHT_DECAY_NORM})
    rules: dict[str, Any] = {"overrides": overrides}
    if cfg.SOLVER.LAYER_DECAY != 1.0:
        rules["lr_factor_func"] = layer_decay(cfg, network)
    return rules


def layer_decay(cfg: CfgNode, network: Any) -> Callable[[str], float]:
    """Return the factor of the lr of each of the detector's parameters, by its name."""
    used = [n for n, p in network.named_parameters() if p.requires_grad] if network else []
    if cfg.SOLVER.LAYERS:
        layers = {name: _first_match(name, cfg.SOLVER.LAYERS) for name in used}
    elif hasattr(network, "group_matcher"):
        from timm.models import group_parameters

        known = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
        layers = {name: known[name] for name in used}
    else:
        name = cfg.MODEL.NETWORK.ARCH or cfg.MODEL.BACKBONE.NAME
        raise InputError(
            f"SOLVER.LAYER_DECAY {cfg.SOLVER.LAYER_DECAY}: the layers of {name} are not known; set "
            "SOLVER.LAYERS, or SOLVER.LAYER_DECAY to 1.0"
        )
    above = max(layers.values(), default=0) + 1
    return lambda name: cfg.SOLVER.LAYER_DECAY ** (above - layers.get(inside(name), above))


def _first_match(name: str, patterns: Any) -> int:
    for pattern, layer in patterns:
        if re.match(pattern, name):
            return int(layer)
    raise InputError(f"SOLVER.LAYERS has no layer for {name}")
