"""One backbone, four ways to name its tensors; torchvision's names are the hub.

``to_detectron2`` and ``to_torchvision`` are a bijection between torchvision's and detectron2's
names. ``from_caffe2`` and ``from_numbered`` lead into torchvision's names from the blobs of a
Caffe2 pickle and from a network that was cut up into an ``nn.Sequential``. Strings only.

    torchvision                   detectron2                      Caffe2
    conv1.weight                  stem.conv1.weight               conv1_w
    bn1.bias                      stem.conv1.norm.bias            res_conv1_bn_b
    layer1.0.conv2.weight         res2.0.conv2.weight             res2_0_branch2b_w
    layer1.0.bn2.running_mean     res2.0.conv2.norm.running_mean  res2_0_branch2b_bn_rm
    layer2.0.downsample.0.weight  res3.0.shortcut.weight          res3_0_branch1_w
    layer2.0.downsample.1.bias    res3.0.shortcut.norm.bias       res3_0_branch1_bn_b
"""

import re

STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

_BLOCK = "(?P<block>0|[1-9][0-9]*)"
_STATISTIC = f"(?P<statistic>{'|'.join(STATISTICS)})"
_TORCHVISION = re.compile(
    r"(?:layer(?P<stage>[1-4])\." + _BLOCK + r"\.)?"
    r"(?:conv(?P<conv>[1-3])\.weight|bn(?P<bn>[1-3])\." + _STATISTIC + ")"
)
_TORCHVISION_SHORTCUT = re.compile(
    r"layer(?P<stage>[1-4])\." + _BLOCK + r"\.downsample\.(?:0\.weight|1\." + _STATISTIC + ")"
)
_DETECTRON2 = re.compile(
    r"(?:stem|res(?P<stage>[2-5])\." + _BLOCK + r")\."
    r"(?P<layer>conv[1-3]|shortcut)\.(?:norm\." + _STATISTIC + "|weight)"
)
_CAFFE2_STEM = re.compile(r"(?:conv1_w|res_conv1_bn_(?P<blob>\w+))")
_CAFFE2_BLOCK = re.compile(
    r"res(?P<stage>[2-5])_" + _BLOCK + r"_branch(?P<branch>1|2[abc])_(?:w|bn_(?P<blob>\w+))"
)
_CAFFE2_STATISTICS = {
    "s": "weight",
    "gamma": "weight",
    "b": "bias",
    "beta": "bias",
    "rm": "running_mean",
    "running_mean": "running_mean",
    "riv": "running_var",  # the blob's name says "inverse", what it holds is the variance
    "running_var": "running_var",
}
_NUMBERED = re.compile(r"(?P<index>[0-7])\.(?P<rest>.+)")


def to_detectron2(name: str) -> str:
    """Rename one backbone tensor from torchvision to detectron2.

    Raises:
        ValueError: ``name`` is no tensor of a torchvision ResNet backbone (``fc.weight`` is none).
    """
    if found := _TORCHVISION_SHORTCUT.fullmatch(name):
        layer = "shortcut"
    elif found := _TORCHVISION.fullmatch(name):
        layer = f"conv{found['conv'] or found['bn']}"
    else:
        raise ValueError(f"{name!r} is no tensor of a torchvision ResNet backbone")
    if found["stage"] is None:
        if layer != "conv1":
            raise ValueError(f"{name!r} is no tensor of a torchvision ResNet backbone")
        place = "stem"
    else:
        place = f"res{int(found['stage']) + 1}.{found['block']}"
    statistic = f"norm.{found['statistic']}" if found["statistic"] else "weight"
    return f"{place}.{layer}.{statistic}"


def to_torchvision(name: str) -> str:
    """Rename one backbone tensor from detectron2 to torchvision; the inverse of ``to_detectron2``.

    Raises:
        ValueError: ``name`` is no tensor of a detectron2 ResNet backbone.
    """
    found = _DETECTRON2.fullmatch(name)
    if found is None or (found["stage"] is None and found["layer"] != "conv1"):
        raise ValueError(f"{name!r} is no tensor of a detectron2 ResNet backbone")
    place = ""
    if found["stage"] is not None:
        place = f"layer{int(found['stage']) - 1}.{found['block']}."
    return place + _torchvision_layer(found["layer"], found["statistic"])


def from_caffe2(blob: str) -> str:
    """Rename one backbone blob of a Caffe2 or Detectron 1 pickle to torchvision's name.

    Raises:
        ValueError: ``blob`` is no backbone blob. ``conv1_b``, the stem's bias, is none: a
            torchvision network has nowhere to put it.
    """
    found = _CAFFE2_STEM.fullmatch(blob) or _CAFFE2_BLOCK.fullmatch(blob)
    if found is None or found["blob"] not in (None, *_CAFFE2_STATISTICS):
        raise ValueError(f"{blob!r} is no backbone blob of a Caffe2 ResNet")
    statistic = _CAFFE2_STATISTICS[found["blob"]] if found["blob"] else None
    if found.re is _CAFFE2_STEM:
        return _torchvision_layer("conv1", statistic)
    branch = found["branch"]
    layer = "shortcut" if branch == "1" else f"conv{'abc'.index(branch[1]) + 1}"
    place = f"layer{int(found['stage']) - 1}.{found['block']}."
    return place + _torchvision_layer(layer, statistic)


def from_numbered(name: str) -> str:
    """Rename from ``nn.Sequential(*resnet.children())``: 0 conv1, 1 bn1, 4…7 the four stages.

    Raises:
        ValueError: ``name`` is no backbone tensor of such a network.
    """
    found = _NUMBERED.fullmatch(name)
    if found is None or found["index"] in "23":  # ReLU and max-pool have no tensors
        raise ValueError(f"{name!r} is no tensor of a numbered ResNet backbone")
    index = int(found["index"])
    place = {0: "conv1", 1: "bn1"}.get(index, f"layer{index - 3}")
    return from_torchvision(f"{place}.{found['rest']}")


def from_torchvision(name: str) -> str:
    """Return ``name`` unchanged if it is a torchvision backbone tensor.

    Raises:
        ValueError: it is none.
    """
    to_detectron2(name)
    return name


def _torchvision_layer(layer: str, statistic: str | None) -> str:
    if layer == "shortcut":
        return f"downsample.1.{statistic}" if statistic else "downsample.0.weight"
    return f"{layer.replace('conv', 'bn')}.{statistic}" if statistic else f"{layer}.weight"
