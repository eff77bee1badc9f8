"""The formats that checkpoints come in, as a table: how to know one, and what stands where in it.

A format says where the state dict lies in the file (``containers``), what stands before the
backbone's names in it (``prefixes``), how the backbone's tensors are called (``styles``), what
else may lie beside them and is dropped by name (``drops``), and how images entered the network
(``convention``). Wrappers (``module.`` of DDP, ``_orig_mod.`` of torch.compile) are stripped
wherever they stand and need no mention. ``convert.recognise`` acts on the table.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

OWN_FORMAT = "transfer-suite checkpoint"
AUTHOR = "transfer-suite"
WRAPPERS = ("module", "_orig_mod")


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

BARE: tuple[str, ...] = ()
PLAIN = (BARE, ("state_dict",), ("model",), ("model_state_dict",), ("model_state",))

# What stands beside a backbone and is no part of it, in any format: heads, queues, momentum twins.
# A pattern names a key, or everything below it; * is a wildcard.
HEADS = (
    "fc", "head", "heads", "head_*", "classifier", "linear", "linear_*", "last_layer",
    "online_classifier", "proj", "projector", "projection", "projection_head*", "projection_mlp",
    "projector_*", "predictor", "predictor_*", "prediction", "prediction_head*", "prediction_mlp",
    "prototypes", "neck", "queue*", "ptr", "memory_bank*", "criterion*", "loss", "loss_*",
    "momentum_*", "*_momentum", "target_*", "teacher_*", "student_head", "student_projection_*",
    "n_averaged", "center",
)  # fmt: skip


Detect = Callable[[Mapping[str, Any], Mapping[str, Any]], bool]


def always(content: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Ask for nothing beyond containers, prefixes and style."""
    return True


def top(*keys: str) -> Detect:
    """The file's own top level has one of ``keys``."""
    return lambda content, state: any(key in content for key in keys)


def beside(*starts: str) -> Detect:
    """The state dict has a key that begins with one of ``starts``."""
    return lambda content, state: any(key.startswith(starts) for key in state)


def both(first: Detect, second: Detect) -> Detect:
    """Both of two conditions hold."""
    return lambda content, state: first(content, state) and second(content, state)


def _own(content: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    return content.get("format") == OWN_FORMAT


def _converted(content: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    return content.get("__author__") == AUTHOR and isinstance(content.get("facts"), Mapping)


def _not_ours(content: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    return not _own(content, state) and not _converted(content, state)


# Who writes detectron2's names for RGB weights with the stride in the 3×3.
RGB_AUTHORS = ("torchvision", "MOCO", "CLS", "Yonglong", "OpenSelfSup")


def _pixel(name: str, state: Mapping[str, Any]) -> list[float] | None:
    """``pixel_mean`` or ``pixel_std``, which detectron2 saved in detectors until 2021."""
    value = state.get(name)
    return None if value is None else [float(number) for number in value.reshape(-1)]


def _order(state: Mapping[str, Any]) -> str | None:
    """The channel order of ``pixel_mean``, for ImageNet's red is brightest; "" of grey, or None."""
    mean = _pixel("pixel_mean", state)
    if mean is None or mean[0] == mean[-1]:
        return None if mean is None else ""
    return "RGB" if mean[0] > mean[-1] else "BGR"


def _unit_std(state: Mapping[str, Any]) -> bool | None:
    """Whether ``pixel_std`` is 1, as MSRA's is; None without it."""
    std = _pixel("pixel_std", state)
    return None if std is None else std[0] == 1.0


def _detectron2_rgb(content: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    author = content.get("__author__")
    if not _not_ours(content, state) or author == "Caffe2" or _order(state) not in (None, "RGB"):
        return False
    return author in RGB_AUTHORS or not _unit_std(state)


def _detectron2_msra(content: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    author = content.get("__author__")
    if not _not_ours(content, state) or author in RGB_AUTHORS or _order(state) == "RGB":
        return False
    return author == "Caffe2" or _unit_std(state) is not False


def _detectron2_fair(content: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    return _not_ours(content, state) and _order(state) == "BGR" and _unit_std(state) is False


def _groups(state: Mapping[str, Any]) -> tuple[int, int]:
    """Groups and width per group of a Caffe2 network; (1, 64) of a plain ResNet."""
    blob = state.get("res2_0_branch2b_w")
    branch_c = "res2_0_branch2c_w" in state
    if blob is None or not branch_c or len(blob.shape) != 4:
        return 1, 64
    return int(blob.shape[0] // max(blob.shape[1], 1)), int(blob.shape[1])


def _caffe2_msra(content: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    return _groups(state) != (32, 8)


def _caffe2_fair(content: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    return _groups(state)[0] > 1


@dataclasses.dataclass(frozen=True)
class Source:
    """One format. Of two that pick the same tensors, the earlier in the table gives the name."""

    name: str
    about: str  # who writes it; shown by --list-formats
    containers: tuple[tuple[str, ...], ...]  # where the state dict may lie; () is the file itself
    prefixes: tuple[str, ...] = ("",)
    detect: Detect = always  # what is asked for beyond containers, prefixes and style
    drops: tuple[str, ...] = ()  # in addition to HEADS
    styles: tuple[str, ...] = ("torchvision",)
    convention: Convention = TORCHVISION
    aliases: tuple[tuple[str, str], ...] = ()  # (start, start as it should be) of keys
    on_request: bool = False  # only by --format: nothing in a file tells, or another is preferred


_DETECTOR = (
    "backbone.fpn_*", "backbone.top_block", "res5.norm", "proposal_generator", "roi_heads",
    "sem_seg_head", "pixel_mean", "pixel_std", "anchor_generator", "stem.fc",
)  # fmt: skip


def _detectron2(name: str, about: str, detect: Detect, convention: Convention) -> Source:
    """One of the three conventions in which detectron2's names come."""
    return Source(
        name,
        about,
        (("model",), ("state_dict",), BARE),
        ("", "backbone.bottom_up.", "backbone.", "bottom_up."),
        detect,
        _DETECTOR,
        ("detectron2",),
        convention,
        aliases=(("roi_heads.res5.", "backbone.res5."),),  # a C4 detector's last stage
    )


SOURCES: tuple[Source, ...] = (
    Source("own", "this suite's tools/run_pretrain.py", (("model",),), detect=_own),
    Source(
        "converted",
        "this suite's tools/convert_to_d2.py, detectron2 or torchvision names",
        (("model",),),
        detect=_converted,
        styles=("detectron2", "torchvision"),
    ),
    Source(
        "moco",
        "MoCo v1, v2 (facebookresearch/moco): the query encoder",
        (("state_dict",), BARE),
        ("encoder_q.",),
        drops=("encoder_k",),
    ),
    Source(
        "moco-v3",
        "MoCo v3 (facebookresearch/moco-v3), ResNet: the base encoder",
        (("state_dict",), BARE),
        ("base_encoder.",),
        drops=("momentum_encoder",),
    ),
    Source(
        "densecl",
        "DenseCL, OpenSelfSup and mmselfsup MoCo: the backbone, which is the query encoder's",
        (("state_dict",), BARE),
        ("backbone.",),
        beside("encoder_q.0."),
        drops=("encoder_q", "encoder_k"),
    ),
    Source(
        "infomin",
        "PyContrast: InfoMin, CMC's RGB half and others with a memory; the model, not its EMA",
        (("model",),),
        ("encoder.",),
        both(_not_ours, top("model_ema", "contrast")),
    ),
    Source(
        "infomin-ema",
        "the same file's momentum model",
        (("model_ema",),),
        ("encoder.",),
        on_request=True,
    ),
    Source(
        "supcon", "SupContrast (HobbitLong): SupCon, SimCLR", (("model",),), ("encoder.",),
        top("opt"),
    ),
    Source(
        "dino",
        "DINO, full file: the teacher, as DINO's own evaluation takes",
        (("teacher",),),
        ("backbone.", ""),
    ),
    Source(
        "dino-student",
        "the same file's student",
        (("student",),),
        ("backbone.", ""),
        on_request=True,
    ),
    Source(
        "byol",
        "BYOL: the online network (lucidrains, yaox12, sthalles and alike)",
        (*PLAIN, ("online_network_state_dict",), ("online_backbone",)),
        (
            "online_encoder.net.",
            "online_encoder.",
            "online_network.encoder.",
            "online_backbone.",
            "encoder.",
        ),
        lambda content, state: any(key.startswith("online_") for key in (*state, *content)),
        drops=("net", "online_encoder.projector", "online_network.projet*", "online_predictor",
               "online_network.proj*", "projetion", "online_projector"),
        styles=("torchvision", "numbered"),
    ),
    Source(
        "vissl",
        "VISSL: the trunk",
        (("classy_state_dict", "base_model", "model", "trunk"), ("trunk",), *PLAIN),
        ("_feature_blocks.", "trunk._feature_blocks.", "trunk.base_model._feature_blocks."),
    ),
    Source(
        "swav",
        "SwAV, DeepCluster-v2, SeLa-v2",
        PLAIN,
        detect=beside("prototypes", "projection_head"),
    ),
    Source(
        "solo-learn",
        "solo-learn and other Lightning checkpoints: the online backbone",
        (("state_dict",),),
        ("backbone.", "encoder."),
        top("pytorch-lightning_version"),
    ),
    Source(
        "lightly",
        "lightly: the backbone as an nn.Sequential",
        PLAIN,
        ("backbone.", "encoder.", "features.", ""),
        styles=("numbered",),
    ),
    Source(
        "lightly-dino",
        "lightly's DINO: the teacher",
        PLAIN,
        ("teacher_backbone.",),
        beside("student_backbone."),
        drops=("student_*",),
        styles=("numbered", "torchvision"),
    ),
    Source(
        "mmpretrain", "mmpretrain, mmselfsup, mmcls", (("state_dict",),), ("backbone.",),
        top("meta"), drops=("data_preprocessor",),
    ),
    Source(
        "barlow-twins", "Barlow Twins, VICReg: full file", (("model",),), ("backbone.",),
        beside("projector."), drops=("bn",),
    ),
    Source("simsiam", "SimSiam", (("state_dict",),), ("encoder.",), beside("predictor.")),
    Source("encoder", "SimCLR and others that say encoder.", PLAIN, ("encoder.",), _not_ours),
    Source("backbone", "others that say backbone.", PLAIN, ("backbone.",), _not_ours),
    Source("lightning", "a Lightning module that holds its network as model.",
           (("state_dict",),), ("model.", "net.", "network."), top("pytorch-lightning_version")),
    Source(
        "timm", "timm's training script", (("state_dict",),), detect=top("version"),
    ),
    Source("timm-ema", "the same file's averaged model", (("state_dict_ema",),)),
    Source(
        "torchvision",
        "torchvision, timm, and any file with torchvision's names (SwAV, BYOL, DINO backbones)",
        PLAIN,
        detect=_not_ours,
    ),
    Source("torchvision-ema", "torchvision's training script, the averaged model",
           (("model_ema",),)),
    Source(
        "torchvision-msra",
        "torchvision's names, MSRA's convention: BGR, std 1, stride in the 1×1 (resnet50_caffe)",
        PLAIN,
        ("", "backbone."),
        convention=MSRA,
        on_request=True,
    ),
    Source(
        "caffe2-msra",
        "Caffe2 / Detectron 1 pickle of MSRA's ResNets: BGR, std 1, stride in the 1×1",
        (BARE, ("blobs",), ("model",)),
        detect=_caffe2_msra,
        drops=("*_momentum", "fc1000*", "pred*", "lr", "weight_order", "model_iter", "bbox_*",
               "cls_*", "conv_rpn*", "rpn_*", "fpn_*", "fc6*", "fc7*", "_[[]mask[]]_*", "mask_*",
               "conv5_mask*", "kps_*", "conv_fcn*", "retnet_*", "last_out*"),
        styles=("caffe2",),
        convention=MSRA,
    ),
    Source(
        "caffe2-fair",
        "Caffe2 pickle of FAIR's ResNeXts (X-101-32x8d): BGR, ImageNet std, stride in the 3×3",
        (BARE, ("blobs",), ("model",)),
        detect=_caffe2_fair,
        drops=("*_momentum", "fc1000*", "pred*", "lr", "weight_order", "model_iter", "last_out*"),
        styles=("caffe2",),
        convention=FAIR,
    ),
    _detectron2(
        "detectron2",
        "detectron2 names, torchvision's convention: RGB, ImageNet std, stride in the 3×3",
        _detectron2_rgb,
        TORCHVISION,
    ),
    _detectron2(
        "detectron2-fair",
        "detectron2 names, FAIR's convention (its zoo's X-101): BGR, ImageNet std, stride in 3×3",
        _detectron2_fair,
        FAIR,
    ),
    _detectron2(
        "detectron2-msra",
        "detectron2 names, MSRA's convention (its model zoo's R50): BGR, std 1, stride in the 1×1",
        _detectron2_msra,
        MSRA,
    ),
)  # fmt: skip
BY_NAME = {source.name: source for source in SOURCES}
