"""Networks by one name, wherever an architecture is named.

* ``resnet50``: this suite's own (``models.resnet``)
* ``timm/convnext_atto``, ``timm/vit_small_patch14_dinov2.lvd142m``: timm's; a tag after the dot
  selects the mean, std and image size of those weights, which are not downloaded
* ``path/to/file.py:function``: a user's own (``models.user_file``)

Shapes: N images, S side in pixels, C channels of a map, K classes.
"""

import difflib
import functools
import inspect
from typing import Any, cast

import torch
from torch import Tensor

from core.errors import InputError
from models import resnet, user_file
from models.base import Description, Map, Network, stride_of

TIMM = "timm/"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DYNAMIC = "dynamic_img_size"  # timm's networks that know it are fixed to one image size without it


def create_model(name: str, num_classes: int, **options: Any) -> Network:
    """Build a randomly initialised network by its name; torch's global generator draws it.

    Args:
        options: of timm's architectures: what its ``create_model`` takes, e.g. ``drop_path_rate``.

    Raises:
        InputError: an unknown name (the sentence names the nearest), options that the architecture
            does not take, or a user's file that fails.
    """
    if name.startswith(TIMM):
        return _create_timm(name, num_classes, options)
    if options and (user_file.is_name(name) or name in resnet.ARCHITECTURES):
        raise InputError(f"arch {name!r} takes no options; {', '.join(options)} is timm's")
    if user_file.is_name(name):
        return user_file.FileNetwork(name, num_classes)
    check_name(name)
    return resnet.create_model(name, num_classes)


def check_name(name: str) -> None:
    """Check that a name stands for a network, without building one of ours or timm's.

    Raises:
        InputError: it does not; the sentence names the nearest.
    """
    if user_file.is_name(name):
        user_file.load_function(name)
    elif name.startswith(TIMM):
        _check_timm(name)
    elif name not in resnet.ARCHITECTURES:
        raise InputError(f"arch {name!r} is unknown; {_nearest(name)}")


def untagged(name: str) -> str:
    """Return the name without the tag that says which of timm's weights it is to hold."""
    return name.partition(".")[0] if name.startswith(TIMM) else name


def canonical(name: str) -> str:
    """Return the name that a checkpoint's facts carry: of a user's file, with its full path."""
    return user_file.canonical(name) if user_file.is_name(name) else name


@functools.lru_cache(maxsize=64)
def describe(name: str) -> Description:
    """Return what is known of an architecture before any weights are.

    timm's maps are measured on a forward pass without numbers, not taken from ``feature_info``.

    Raises:
        InputError: as ``create_model``.
    """
    if name.startswith(TIMM):
        return _describe_timm(name)
    if user_file.is_name(name):
        return user_file.describe(name, IMAGENET_MEAN, IMAGENET_STD)
    check_name(name)
    spec = resnet.ARCHITECTURES[name]
    first = 4 if spec.stem == "imagenet" else 1
    maps = tuple(
        Map(f"res{i + 2}", spec.channels(i), first * 2**i, i) for i in range(len(spec.layers))
    )
    side = 224 if spec.stem == "imagenet" else 32
    width = spec.num_features
    return Description(name, "own", width, width, maps, IMAGENET_MEAN, IMAGENET_STD, side)


def forward_maps(model: Network, x: Tensor) -> dict[str, Tensor]:
    """Map N×3×S×S normalised images to the maps of ``describe(model.arch)``, each N×C×h×w.

    Maps that an architecture computes as N×h×w×C, or as tokens, are brought into this order;
    final norms are not applied.
    """
    if not model.arch.startswith(TIMM):
        return model.forward_stages(x)  # type: ignore[operator]
    maps = describe(model.arch).maps
    indices = [entry.index for entry in maps]
    found = model.forward_intermediates(x, indices=indices, intermediates_only=True)  # type: ignore[operator]
    return {entry.name: value for entry, value in zip(maps, found, strict=True)}


@functools.lru_cache(maxsize=64)
def check_image_size(name: str, size: int) -> None:
    """Check that a network takes square images of ``size`` pixels, by a pass without numbers.

    Raises:
        InputError: it does not.
    """
    if not name.startswith(TIMM):
        return
    with torch.device("meta"), torch.inference_mode():
        model = create_model(name, 2).eval()
        try:
            model.forward_head(model.forward_features(torch.zeros(2, 3, size, size)))
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            usual = describe(name).image_size
            raise InputError(
                f"{name} does not take images of {size}×{size} pixels ({_first_line(error)}); its "
                f"usual size is {usual}×{usual}"
            ) from None


def _check_timm(name: str) -> None:
    import timm

    model, _, tag = name.removeprefix(TIMM).partition(".")
    if not timm.is_model(model):
        raise InputError(f"arch {name!r} is unknown; {_nearest(name)}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{model}.*")]
    if tag and tag not in tags:
        known = f"one of {', '.join(tags)}" if tags else "without a tag"
        raise InputError(f"arch {name!r}: timm knows {model} {known}, not {tag!r}")


def _create_timm(name: str, num_classes: int, options: dict[str, Any]) -> Network:
    import timm

    _check_timm(name)
    short = name.removeprefix(TIMM)
    taken = _constructor_options(short.partition(".")[0])
    given = ({DYNAMIC: True} if DYNAMIC in taken else {}) | options
    try:
        model: Any = timm.create_model(short, num_classes=num_classes, **given)
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        said = f"with {', '.join(f'{k}={v}' for k, v in options.items())} " if options else ""
        raise InputError(f"timm cannot build {short} {said}({_first_line(error)})") from None
    if not hasattr(model, "get_classifier") or not hasattr(model, "forward_intermediates"):
        raise InputError(f"{name} is no image classifier with intermediate maps")
    model.arch = name
    return cast(Network, model)


@functools.cache
def _constructor_options(short: str) -> frozenset[str]:
    """Return the parameters of an architecture's class and of those that it inherits from."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(short)
    names: set[str] = set()
    for cls in type(model).__mro__:
        if cls.__module__.startswith("timm.") and "__init__" in vars(cls):
            names |= set(inspect.signature(vars(cls)["__init__"]).parameters)
    return frozenset(names)


def _describe_timm(name: str) -> Description:
    with torch.device("meta"), torch.inference_mode():
        model: Any = create_model(name, 2).eval()
        cfg = model.pretrained_cfg
        size = cfg["input_size"][-1]
        try:
            found = model.forward_intermediates(
                torch.zeros(1, 3, size, size), intermediates_only=True
            )
        except (AssertionError, RuntimeError, ValueError, NotImplementedError) as error:
            raise InputError(f"{name} gives no maps ({_first_line(error)})") from None
    info = model.feature_info if isinstance(model.feature_info, list | tuple) else []
    names = [entry["module"] for entry in info]
    if len(names) != len(found) or len(set(names)) != len(names):
        names = [f"map{number}" for number in range(len(found))]
    last: dict[int, Map] = {}
    for index, (label, value) in enumerate(zip(names, found, strict=True)):
        stride = stride_of(size, value.shape[-1])
        last[stride] = Map(label, value.shape[1], stride, index)
    maps = tuple(last[stride] for stride in sorted(last))
    return Description(
        name,
        "timm",
        model.num_features,
        model.head_hidden_size,
        maps,
        tuple(cfg["mean"]),
        tuple(cfg["std"]),
        size,
        maps[0].stride if len(maps) == 1 and hasattr(model, "patch_embed") else 0,
    )


def _nearest(name: str) -> str:
    import timm

    known = [*resnet.ARCHITECTURES, *(TIMM + model for model in timm.list_models())]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if not close:  # a timm name without its prefix
        close = difflib.get_close_matches(TIMM + name, known, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    own = ", ".join(resnet.ARCHITECTURES)
    return f"known are {own}, timm/NAME (timm.list_models()) and path/to/file.py:function"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
