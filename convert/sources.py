"""What is known of checkpoints in the wild, as tables: input conventions, preferences, refusals.

``convert.find`` finds every complete backbone of a file by itself. What the names alone cannot say
stands here: how images enter the network (``FORMATS``), which of several different backbones is
meant (``PREFERENCES``), what may lie beside a backbone (``HEADS``), and what looks like a network
that detectron2 can hold but is none (``REFUSALS``, ``LOOKALIKES``).
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OWN_FORMAT = "transfer-suite checkpoint"
AUTHOR = "transfer-suite"


@dataclasses.dataclass(frozen=True)
class Convention:
    """How an image enters the network: mean and std of R, G, B on 0…255, and what comes first.

    ``mean`` and ``std`` are in R, G, B whatever the network's channel order; ``pixel_mean`` and
    ``pixel_std`` are in the channel order, as detectron2's PIXEL_MEAN and PIXEL_STD are.
    """

    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    channel_order: str = "RGB"
    stride_in_1x1: bool = False

    @property
    def pixel_mean(self) -> tuple[float, ...]:
        """The mean in the channel order."""
        return self.mean if self.channel_order == "RGB" else self.mean[::-1]

    @property
    def pixel_std(self) -> tuple[float, ...]:
        """The standard deviation in the channel order."""
        return self.std if self.channel_order == "RGB" else self.std[::-1]


TORCHVISION = Convention()
MSRA = Convention(std=(1.0, 1.0, 1.0), channel_order="BGR", stride_in_1x1=True)
FAIR = Convention(channel_order="BGR")


@dataclasses.dataclass(frozen=True)
class Format:
    """One way of naming tensors (``convert.layouts.SPELLINGS``) with one input convention."""

    about: str  # shown by --list-formats
    spellings: tuple[str, ...]
    convention: Convention = TORCHVISION


PYTORCH = ("torchvision", "numbered", "transformers")
FORMATS = {
    "own": Format("this suite's tools/run_pretrain.py; the file states its input", PYTORCH),
    "converted": Format("this suite's tools/convert_to_d2.py; the file states its input",
                        ("detectron2", *PYTORCH)),
    "torchvision": Format("torchvision's names, as nearly all have them, a numbered nn.Sequential, "
                          "transformers: RGB, ImageNet std, stride in the 3×3", PYTORCH),
    "torchvision-msra": Format("the same in MSRA's convention (resnet50_caffe): BGR, std 1, stride "
                               "in the 1×1", PYTORCH, MSRA),
    "caffe2-msra": Format("Caffe2 pickle of MSRA's ResNets: BGR, std 1, stride in the 1×1",
                          ("caffe2",), MSRA),
    "caffe2-fair": Format("Caffe2 pickle of FAIR's ResNeXts (X-101-32x8d): BGR, ImageNet std, "
                          "stride in the 3×3", ("caffe2",), FAIR),
    "detectron2": Format("detectron2's names: RGB, ImageNet std, stride in the 3×3",
                         ("detectron2",)),
    "detectron2-fair": Format("detectron2's names (its zoo's X-101): BGR, ImageNet std, stride in "
                              "the 3×3", ("detectron2",), FAIR),
    "network": Format("any network that --arch names: timm/NAME or path/to/file.py:function, in "
                      "timm's layout or one that timm reads (MAE, DINO, CLIP, …)", ("network",)),
    "detectron2-msra": Format("detectron2's names (its zoo's R50): BGR, std 1, stride in the 1×1",
                              ("detectron2",), MSRA),
}  # fmt: skip
STATING = ("own", "converted")  # files that say of themselves that they are of the format

# Of two different backbones in a file, the one whose place matches the pattern is preferred to the
# one whose place is the replacement. Pairs that are not listed (weights and their moving average,
# say) are the user's choice, by --prefix.
PREFERENCES = (
    (r"\bencoder_q\b", "encoder_k"),  # MoCo: query, key
    (r"\bencoder$", "encoder_k"),  # PixPro
    (r"\bbackbone$", "encoder_k.0"),  # mmselfsup's MoCo
    (r"\bbackbone$", "target_net.0"),  # mmselfsup's BYOL
    (r"\bbackbone$", "momentum_encoder.0"),  # mmselfsup's MoCo v3
    (r"\bbase_encoder\b", "momentum_encoder"),  # MoCo v3
    (r"(\w+)$", r"momentum_\1"),  # solo-learn
    (r"(\w+)$", r"\1_momentum"),  # lightly
    (r"\bonline", "target"),  # BYOL
    (r"\bteacher", "student"),  # DINO evaluates its teacher
    (r"^model\.encoder$", "model_ema.encoder"),  # PyContrast (InfoMin)
)

# What stands beside a backbone and is no part of it: heads, queues, a detector's other parts. A
# pattern names a key relative to the backbone, or everything below it; * is a wildcard. The heads
# of segmentation networks are not listed, for their ResNets are dilated under the same names.
HEADS = (
    "fc", "head", "heads", "head_*", "classifier", "linear", "linear_*", "last_layer", "proj",
    "projector", "projector_*", "projection", "projection_*", "projet*", "predictor",
    "predictor_*", "prediction", "prediction_*", "prototypes", "neck", "queue*", "ptr",
    "memory_bank*", "criterion*", "loss", "loss_*", "n_averaged", "steps", "center",
    "value_transform", "data_preprocessor",
    "bn",  # the affine-free norm behind Barlow Twins' projector
    "1",  # of nn.Sequential(backbone, head)
    "fpn", "fpn_*", "top_block", "res5.norm", "proposal_generator", "roi_heads", "roi_head", "rpn",
    "rpn_head", "bbox_head", "mask_head", "sem_seg_head", "pixel_mean", "pixel_std",
    "anchor_generator", "stem.fc",
)  # fmt: skip
TWIN = re.compile(  # what a momentum network's or a teacher's head has about its name
    r"^(?:momentum|teacher|student|target|online|key)_|(?<=\w)_(?:momentum|k)(?=\.|$)"
)
BLOBS = (  # the same of a Caffe2 pickle
    "*_momentum", "fc1000*", "pred*", "lr", "weight_order", "model_iter", "bbox_*", "cls_*",
    "conv_rpn*", "rpn_*", "fpn_*", "fc6*", "fc7*", "_[[]mask[]]_*", "mask_*", "conv5_mask*",
    "kps_*", "conv_fcn*", "retnet_*", "last_out*",
)  # fmt: skip

# The tables below hold patterns of names, and what a name like that means.
REFUSALS = (  # names in a residual network
    (r"^(conv1|stem)\.\d+\.(weight|conv\.weight)$|^stem\.conv[23]\.|^conv[23]\.weight$",
     "a deep stem of three 3×3 convolutions (ResNet-C/D), and detectron2's ResNet has one 7×7"),
    (r"^layer\d\.\d+\.downsample\.2\.",
     "an average-pooled shortcut (ResNet-D), which detectron2's ResNet does not have"),
    (r"^layer\d\.\d+\.(se|se_module|attn|eca)\.",
     "attention in its blocks (SE, ECA), which detectron2's ResNet does not have"),
    (r"^layer\d\.\d+\.shortcut\.\d\.",
     "a CIFAR ResNet's shortcut in place of downsample, and detectron2 has no 3×3 stem"),
    (r"^[23]\.\d+\.conv1\.weight$",
     "a stem without max-pool (lightly's ResNetGenerator, for CIFAR), and detectron2's has one"),
    (r"^(layer\d\.\d+\.)?conv\d\.bias$",
     "convolutions with a bias, which detectron2's ResNet does not have"),
)  # fmt: skip
OTHERS = (  # names in a file without a complete residual network
    (r"relative_position_bias_table", "a Swin transformer"),
    (r"(^|\.)(patch_embed|pos_embed|pos_embedding|cls_token|class_token|class_embedding)\b",
     "a vision transformer"),
    (r"(^|\.)(conv_dw|dwconv|depthwise_conv)\.|downsample_layers\.\d", "a ConvNeXt or MobileNet"),
    (r"(^|\.)stage\d\.\d+\.branches\.", "an HRNet"),
    (r"(^|\.)denseblock\d", "a DenseNet"),
    (r"_flat_param$", "a shard of FSDP (save a full state dict)"),
)  # fmt: skip
LOOKALIKES = (  # names of networks whose tensors are an ordinary ResNet's
    (r"(^|_)resnet(aa|blur)\d+",
     "down-samples by average or blur pooling, which detectron2's ResNet does not"),
    (r"(^|_)resnet\d+_caffe", "has MSRA's convention; say so with --format torchvision-msra"),
)  # fmt: skip


def reason(table: Sequence[tuple[str, str]], names: Iterable[str]) -> str | None:
    """Return what the first pattern of a table means that is in any of the names, or None."""
    names = list(names)
    found = (means for pattern, means in table if any(re.search(pattern, n) for n in names))
    return next(found, None)


def formats_of(
    content: Mapping[str, Any], spelling: str, state: Mapping[str, Any], tensors: Mapping[str, Any]
) -> list[str]:
    """Return the formats that fit a backbone; one decides, of several the user has to choose.

    Args:
        content: the whole file.
        spelling: how the backbone's tensors are named.
        state: the state dict that it lies in.
        tensors: the backbone's own, by torchvision's names.
    """
    if content.get("format") == OWN_FORMAT:
        return ["own"]
    if content.get("__author__") == AUTHOR and isinstance(content.get("facts"), Mapping):
        return ["converted"]
    if spelling == "network":
        return ["network"]
    if spelling == "detectron2":
        return _detectron2_formats(content.get("__author__"), state)
    if spelling == "caffe2":
        middle = tensors["layer1.0.conv2.weight"].shape
        groups, width = middle[0] // middle[1], middle[1]
        if groups == 1:
            return ["caffe2-msra"]
        return ["caffe2-fair"] if (groups, width) == (32, 8) else ["caffe2-msra", "caffe2-fair"]
    return ["torchvision"]


# Who writes detectron2's names for RGB weights with the stride in the 3×3.
RGB_AUTHORS = ("torchvision", "MOCO", "CLS", "Yonglong", "OpenSelfSup")


def _detectron2_formats(author: Any, state: Mapping[str, Any]) -> list[str]:
    """Tell by the author, and by the pixel statistics that detectors held until 2021."""
    mean, std = state.get("pixel_mean"), state.get("pixel_std")
    order, unit_std = None, None
    if mean is not None:  # ImageNet's red is brightest
        first, _, last = (float(value) for value in mean.reshape(-1))
        order = "grey" if first == last else "RGB" if first > last else "BGR"
    if std is not None:
        unit_std = float(std.reshape(-1)[0]) == 1.0
    known_rgb = author in RGB_AUTHORS
    fits = []
    if author != "Caffe2" and order in (None, "RGB") and (known_rgb or not unit_std):
        fits.append("detectron2")
    if order == "BGR" and unit_std is False:
        fits.append("detectron2-fair")
    if not known_rgb and order != "RGB" and (author == "Caffe2" or unit_std is not False):
        fits.append("detectron2-msra")
    return fits
