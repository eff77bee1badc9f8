"""Any network of ``models.factory``: is a subtree of a file its weights, in whichever layout?

timm knows the layouts of those who publish weights: each of its modules has a
``checkpoint_filter_fn`` (MAE, DINO, DINOv2 with and without registers, DINOv3, CLIP, SigLIP, BEiT,
facebook's ConvNeXt, Microsoft's Swin, …). It is applied here, and its result is accounted for:
every tensor of the network is filled, and every tensor of the file is used or known to be left.
"""

import collections
import contextlib
import functools
import importlib
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.find import Found, matches, states, subtrees
from convert.layouts import Match
from convert.names import COUNTER
from convert.sources import HEADS, Convention
from core.errors import InputError
from models.base import Network, head_prefixes
from models.factory import TIMM, create_model, describe
from models.user_file import FileNetwork

SPELLING = "network"  # of ``convert.sources.FORMATS``
LIKENESS = 0.5  # a subtree with this share of a network's tensors is taken for it, or refused

# What stands beside these networks and is no part of them, in addition to sources.HEADS.
LEFT = (
    "mask_token", "decoder*", "pred", "lm_head", "projectors", "norms", "dino_head", "ibot_head",
    "*relative_position_index", "*attn_mask", "*rope_embed*", "*bias_mask",  # buffers
    "text*", "transformer", "token_embedding", "positional_embedding", "text_projection",
    "ln_final", "logit_scale", "logit_bias", "visual.proj", "visual.head*",  # CLIP's text tower
    "local_cls_norm",  # DINOv3's 7B
)  # fmt: skip
UNREAD = re.compile(r"decoder|pred\.|projectors\.|norms\.")  # timm's functions trip over these
# Per class of timm's: what may be left besides, and what may be new, with the value it starts at
# (None: random, so that nothing may depend on it).
LEFT_OF = {
    "VisionTransformerSAM": ("cls_token", "norm", "fc_norm", "prompt_encoder", "mask_decoder"),
}
NEW_IN: dict[str, dict[str, float | None]] = {
    "VisionTransformerSAM": {r"\.rel_pos_[hw]$": 0.0, r"^neck\.": None},
    "ConvNeXt": {r"^head\.norm\.weight$": 1.0, r"^head\.norm\.bias$": 0.0},
}
# Position embeddings of another grid: (detectron2's or timm's, antialiased) by class.
RULES = {
    "detectron2": "bicubic, not antialiased (detectron2)",
    "timm": "bicubic, antialiased (timm)",
}
WIDTHS = {  # channels, and how timm's names say them
    "vit": {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1408: "giant",
            1536: "giant", 1664: "gigantic"},
    "convnext": {40: "atto", 48: "femto", 64: "pico", 80: "nano", 96: "tiny|small", 128: "base",
                 192: "large", 256: "xlarge", 384: "xxlarge"},
    "swin": {96: "tiny|small", 128: "base", 192: "large"},
}  # fmt: skip


def family(arch: str) -> Callable[[Mapping[str, Any]], Match | None]:
    """Return the question of ``convert.find`` for one network: is a subtree its weights?"""
    return lambda subtree: match(subtree, arch)


def match(subtree: Mapping[str, Any], arch: str) -> Match | None:
    """Return the network's tensors out of a subtree, None if it does not look like it.

    Raises:
        ValueError: it looks like it, but is incomplete or misshapen; the text says which tensor.
    """
    given = {name: value for name, value in subtree.items() if isinstance(value, Tensor)}
    shapes, kind = shapes_of(arch), type(blank(arch)).__name__
    if sum(v.numel() for v in given.values()) < LIKENESS * sum(map(math.prod, shapes.values())):
        return None
    made = _as_named(given, arch)
    found = {name: made[name] for name in shapes if name in made}
    if len(found) < LIKENESS * len(shapes):
        return None
    missing = [name for name in shapes if name not in found]
    new = {name: start for name in missing for start in _starts(name, kind)}
    if lost := [name for name in missing if name not in new]:
        raise ValueError(
            f"{len(lost)} of the {len(shapes)} tensors of {arch} are missing, such as {lost[0]}"
        )
    for name, value in found.items():
        if tuple(value.shape) != shapes[name]:
            raise ValueError(
                f"{name} has shape {_text(value.shape)}, but {arch} has {_text(shapes[name])}"
            )
    _check_not_resampled(given, found, arch)
    counters = [name for name in given if name.endswith(COUNTER)]
    used = _used(given, found, arch) - set(counters)
    # DINOv3's larger models have biases at zero, which timm's network does without
    used |= {n for n, v in given.items() if n.endswith("qkv.bias") and not bool(v.any())}
    filled = {name: torch.full(shapes[name], v) for name, v in new.items() if v is not None}
    return Match(
        arch,
        SPELLING,
        {name: name for name in sorted(used)},
        tuple(counters),
        values=found | filled,
        beside=(*LEFT, *LEFT_OF.get(kind, ())),
        notes={"new_tensors": sorted(new), "positions": _interpolated(given, found)},
    )


def candidates(content: Mapping[Any, Any]) -> list[str]:
    """Return the networks of timm whose weights a file holds, by its names and shapes alone.

    ViT, ConvNeXt and Swin in the layouts of their authors and of timm are looked at.
    """
    for _, state in states(content):
        for subtree in subtrees(state).values():
            fits = [name for name in _plausible(subtree) if _fits(subtree, name)]
            if fits:
                return fits
    return []


def usual_input(arch: str, found: Found | None = None) -> tuple[Convention, str]:
    """Return how images enter a network's usual weights, and a note where those differ.

    Of timm's architectures these are the weights that a tag names, or else timm's default.

    Raises:
        ValueError: the file ``found`` is a masked-image model's own, which timm's default is not,
            and the usual weights differ.
    """
    short = arch.removeprefix(TIMM)
    if short == arch:
        return _convention(describe(arch).mean, describe(arch).std), ""
    cfg: Any = blank(arch).pretrained_cfg
    convention = _convention(cfg["mean"], cfg["std"])
    if "." in short:
        return convention, ""
    import timm

    others = []
    for name in timm.list_pretrained(f"{short}.*"):
        cfg = timm.get_pretrained_cfg(name)
        if cfg is not None and _convention(cfg.mean, cfg.std) != convention:
            others.append(name.partition(".")[2])
    if not others:
        return convention, ""
    advice = (
        f"name them as in --arch {arch}.{others[0]}, or give --mean and --std to "
        "tools/convert_to_d2.py"
    )
    if found and any(re.search(r"\b(mask_token|decoder_embed)\b", n) for n in found.dropped):
        raise ValueError(f"how images enter differs between weights of {short}: {advice}")
    return convention, (
        f"mean and std are those of timm's default weights of {short}; those of "
        f"{', '.join(others)} differ: {advice}"
    )


@functools.lru_cache(maxsize=4)
def blank(arch: str) -> Network:
    """Return the network with shapes and no numbers."""
    with torch.device("meta" if arch.startswith(TIMM) else "cpu"):
        return create_model(arch, 2)


@functools.lru_cache(maxsize=64)
def shapes_of(arch: str) -> Mapping[str, tuple[int, ...]]:
    """Return name and shape of a network's tensors, without its classifier and batch counters."""
    network = blank(arch)
    state, heads = network.state_dict(), head_prefixes(network)
    names = [name for name in state if not name.startswith(heads) and COUNTER not in name]
    return {name: tuple(state[name].shape) for name in names}


def random_tensors(arch: str) -> frozenset[str]:
    """Return the tensors that a file need not have and that would then start at random."""
    kind = type(blank(arch)).__name__
    return frozenset(name for name in shapes_of(arch) if None in _starts(name, kind))


def compare(shapes: Mapping[str, tuple[int, ...]], arch: str) -> None:
    """Raise ValueError unless ``shapes`` are a network's; what it may lack may be missing."""
    expected, optional = shapes_of(arch), random_tensors(arch)
    wrong = [n for n in expected.keys() | shapes.keys() if expected.get(n) != shapes.get(n)]
    if wrong := sorted(n for n in wrong if n in shapes or n not in optional):
        raise ValueError(f"{len(wrong)} tensors are not those of {arch}, such as {wrong[0]}")


def _convention(mean: Iterable[float], std: Iterable[float]) -> Convention:
    (r, g, b), (x, y, z) = ([round(255 * value, 4) for value in part] for part in (mean, std))
    return Convention((r, g, b), (x, y, z))


def _starts(name: str, kind: str) -> list[float | None]:
    """Return what a tensor that a file may lack starts at; [] if it must be there."""
    return [start for pattern, start in NEW_IN.get(kind, {}).items() if re.search(pattern, name)]


def _as_named(given: Mapping[str, Tensor], arch: str) -> dict[str, Tensor]:
    """Return a file's tensors under the network's names, as far as its layout is known.

    Raises:
        ValueError: timm's function for the architecture fails on it.
    """
    shapes, network = shapes_of(arch), blank(arch)
    if _has_all(given, shapes):
        return {name: given[name] for name in shapes}
    if isinstance(network, FileNetwork):
        return {f"body.{name}": value for name, value in given.items()}
    read = {name: value for name, value in given.items() if not UNREAD.match(name)}
    if type(network).__name__ == "VisionTransformerSAM" and "pos_embed" in read:
        read["pos_embed"] = _vitdet_positions(read["pos_embed"], shapes["pos_embed"])
    module = importlib.import_module(type(network).__module__)
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None or not arch.startswith(TIMM):
        return read
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm's function for DINOv3 prints
            return dict(convert(dict(read), network))
    except (KeyError, RuntimeError, AttributeError, TypeError, AssertionError) as error:
        raise ValueError(
            f"timm cannot read it as {arch} ({type(error).__name__}: {error})"
        ) from None


def _vitdet_positions(pos: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ViT's 1×(prefix + n·n)×C positions as detectron2's ViT interpolates them, 1×h×w×C."""
    if pos.ndim != 3:
        return pos
    side = math.isqrt(pos.shape[1])
    grid = pos[:, pos.shape[1] - side * side :].float().reshape(1, side, side, -1)
    grid = grid.permute(0, 3, 1, 2)
    if (side, side) != shape[1:3]:
        grid = F.interpolate(grid, size=shape[1:3], mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).contiguous()


def _interpolated(given: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Return by which rule positions were interpolated, "" where they are the file's own."""
    after = found.get("pos_embed")
    before = [
        v for name, v in given.items() if re.search(r"(pos_embed|positional_embedding)$", name)
    ]
    if after is None or not before or after.shape[-1] != before[0].shape[-1]:
        return ""
    old, new = (math.isqrt(v.numel() // v.shape[-1]) for v in (before[0], after))
    if old == new:
        return ""
    rule = RULES["detectron2" if after.ndim == 4 else "timm"]
    return f"positions of {old}×{old} interpolated to {new}×{new}, {rule}"


def _check_not_resampled(
    given: Mapping[str, Tensor], found: Mapping[str, Tensor], arch: str
) -> None:
    """Raise ValueError if timm's function has resampled a patch embedding or a window's biases."""
    places = {_place(value) for value in given.values()}
    for name, value in found.items():
        fixed = name.endswith(("patch_embed.proj.weight", "relative_position_bias_table"))
        if fixed and _place(value) not in places:
            raise ValueError(
                f"its {name.rpartition('.')[0]} is of another size than that of {arch}, and "
                "patches and windows are not resampled: name the architecture of its own size"
            )


def _used(given: Mapping[str, Tensor], found: Mapping[str, Tensor], arch: str) -> set[str]:
    """Return the names of the file's tensors that the network's were made of.

    Most share their memory with one. Of the others, those are used without which another network
    comes out.
    """
    if _has_all(given, shapes_of(arch)):
        return set(shapes_of(arch))
    places = {_place(value) for value in found.values()}
    copies = collections.Counter(map(_place, given.values()))  # of one tensor under several names
    used = {n for n, v in given.items() if _place(v) in places and copies[_place(v)] == 1}
    for name in given.keys() - used:
        try:
            made = _as_named({key: value for key, value in given.items() if key != name}, arch)
        except ValueError:
            made = {}
        if any(key not in made or not torch.equal(made[key], v) for key, v in found.items()):
            used.add(name)
    return used


def _has_all(given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return all(n in given and tuple(given[n].shape) == shape for n, shape in shapes.items())


def _place(value: Tensor) -> tuple[int, int]:
    return value.data_ptr(), value.numel()


def _fits(subtree: Mapping[str, Any], name: str) -> bool:
    """Whether a subtree is a network of timm and holds nothing that is none of it."""
    try:
        found = match(subtree, TIMM + name)
    except (ValueError, InputError):
        return False
    if found is None or found.notes["new_tensors"] or found.notes["positions"]:
        return False
    known = {*found.tensors.values(), *found.counters}
    heads = head_prefixes(blank(TIMM + name))
    left = [n for n in subtree if n not in known and not n.startswith(heads)]
    return all(matches([n], (*HEADS, *found.beside)) for n in left)


def _plausible(subtree: Mapping[str, Any]) -> list[str]:
    """Return timm's names of the kind and width that a subtree seems to have."""
    import timm

    def shape(name: str) -> tuple[int, ...]:
        return tuple(getattr(subtree.get(name), "shape", ()))

    facebook, stem, patch = (
        shape(f"{name}.weight") for name in ("downsample_layers.0.0", "stem.0", "patch_embed.proj")
    )
    if facebook or (stem and "stages.0.blocks.0.conv_dw.weight" in subtree):
        words, pattern = WIDTHS["convnext"].get((facebook or stem)[0], ""), "convnext*"
    elif "layers.0.blocks.0.attn.relative_position_bias_table" in subtree and patch:
        words, pattern = WIDTHS["swin"].get(patch[0], ""), "swin_*"
    elif clip := shape("visual.conv1.weight"):
        words, pattern = WIDTHS["vit"].get(clip[0], ""), f"vit_*patch{clip[-1]}*clip*"
    elif len(patch) == 4 and any(name.startswith("blocks.0.attn.") for name in subtree):
        words, pattern = WIDTHS["vit"].get(patch[0], ""), f"*patch{patch[-1]}*"
    else:
        return []
    names = timm.list_models(pattern)
    return [name for name in names if words and re.search(rf"(?<![a-z])({words})(?![a-z])", name)]


def _text(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "()"
