"""detectron2 as it is here: imported quietly, with or without its compiled ``_C``."""

import contextlib
import functools
import logging
import os
import sys
import warnings
from importlib import metadata

import torch

# detectron2 speaks of things that no one can act on: old call styles of torch, missing extras
QUIET = (
    r"torch\.meshgrid: in an upcoming release",
    r".*torch\.cuda\.amp\..* is deprecated",
    r".*pkg_resources is deprecated",
    r".*is deprecated and will be removed in Pillow",
    r".*lr_scheduler\.step\(\)` before `optimizer\.step\(\)",
    r".*torch\.distributed\.reduce_op",
    r"`torch\.jit\.[a-z_]*` is deprecated",
)


def silence() -> None:
    """Turn off the warnings of detectron2 and torch on which a user cannot act."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(detectron2|fvcore)\..*")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for speaker in ("torch.utils.cpp_extension", "torch.fx._symbolic_trace"):
        logging.getLogger(speaker).setLevel(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # tensorboard may look for tensorflow


@functools.cache
def has_compiled_ops() -> bool:
    """Whether this detectron2 carries a ``_C`` that this Python can import.

    Nothing that Mask R-CNN needs comes from it (RoIAlign and NMS are torchvision's); rotated boxes,
    deformable convolutions and detectron2's own fast COCO evaluation do.
    """
    try:
        from detectron2 import _C  # noqa: F401
    except ImportError:
        return False
    return True


def versions() -> dict[str, str]:
    """Return the versions that a result row must name."""
    import detectron2
    import torchvision

    found = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__ + ("" if has_compiled_ops() else " without _C"),
    }
    for name in ("pycocotools", "faster-coco-eval", "hotcoco"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
