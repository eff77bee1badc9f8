"""What a network that detectron2's ResNet cannot hold gives itself away by, and the reason to say.

Strings only: patterns of tensor names, and of the names that networks call themselves.
"""

import re
from collections.abc import Iterable

# (pattern of a key, reason)
REFUSALS = (
    (
        r"(^|\.)(conv1|stem)\.\d+\.(weight|conv\.weight)$|(^|\.)stem\.conv[23]\.",
        "a deep stem of three 3×3 convolutions (ResNet-C/D), and detectron2's ResNet has one 7×7",
    ),
    (
        r"(^|\.)layer\d\.\d+\.downsample\.2\.",
        "an average-pooled shortcut (ResNet-D), which detectron2's ResNet has not",
    ),
    (
        r"(^|\.)layer\d\.\d+\.(se|se_module|attn|eca)\.",
        "attention in its blocks (SE, ECA), which detectron2's ResNet has not",
    ),
    (r"(^|\.)(patch_embed|pos_embed|cls_token|class_token)", "a vision transformer, no ResNet"),
    (
        r"(^|\.)layer\d\.\d+\.shortcut\.\d\.",
        "a CIFAR ResNet with shortcut in place of downsample, whose 3×3 stem detectron2 has not",
    ),
    (
        r"(^|\.)[23]\.\d+\.conv1\.weight$",
        "a stem without max-pool (lightly's ResNetGenerator, for CIFAR), which detectron2 has not",
    ),
    (r"(^|\.)layer\d\.\d+\.conv\d\.bias$", "convolutions with a bias, which detectron2 has not"),
)

# Networks whose tensors are those of an ordinary ResNet, but which compute otherwise. Where a file
# or a library gives the name, it is refused; nothing in the tensors themselves could tell.
IMPOSTORS = (
    (
        r"(^|_)resnet(aa|blur)\d+",
        "down-samples by average or blur pooling, which detectron2's ResNet does not",
    ),
    (r"(^|_)resnet\d+_caffe", "has MSRA's convention; say so with --format torchvision-msra"),
)


def reason_of(keys: Iterable[str]) -> str | None:
    """Return why detectron2 cannot hold tensors of these names, None if it may."""
    keys = list(keys)
    for pattern, reason in REFUSALS:
        if any(re.search(pattern, key) for key in keys):
            return reason
    return None


def reason_of_name(name: str) -> str | None:
    """Return why a network that calls itself ``name`` computes otherwise, None if it may not."""
    for pattern, reason in IMPOSTORS:
        if re.search(pattern, name):
            return reason
    return None
