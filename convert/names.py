"""One ResNet, five ways to name its tensors; torchvision's names are the hub.

    torchvision                   detectron2                      Caffe2
    conv1.weight                  stem.conv1.weight               conv1_w
    bn1.bias                      stem.conv1.norm.bias            res_conv1_bn_b
    layer1.0.conv2.weight         res2.0.conv2.weight             res2_0_branch2b_w
    layer1.0.bn2.running_mean     res2.0.conv2.norm.running_mean  res2_0_branch2b_bn_rm
    layer2.0.downsample.0.weight  res3.0.shortcut.weight          res3_0_branch1_w
    layer2.0.downsample.1.bias    res3.0.shortcut.norm.bias       res3_0_branch1_bn_b

    numbered: nn.Sequential  transformers: Hugging Face's ResNetModel
    0.weight                 embedder.embedder.convolution.weight
    4.0.bn2.running_mean     encoder.stages.0.layers.0.layer.1.normalization.running_mean
    5.0.downsample.0.weight  encoder.stages.1.layers.0.shortcut.convolution.weight

Every name is listed once, so that the way there and back is exact and nothing else is renamed.
"""

COUNTER = "num_batches_tracked"
STATISTICS = ("weight", "bias", "running_mean", "running_var", COUNTER)
MOST_BLOCKS = 36  # in a stage: of a ResNet-152
_BLOBS = {"weight": ("s", "gamma"), "bias": ("b", "beta"), "running_mean": ("rm", "running_mean"),
          "running_var": ("riv", "running_var")}  # fmt: skip
# "riv" says inverse, what it holds is the variance


def _tables() -> dict[str, dict[str, str]]:
    """Return, for each spelling, torchvision's name by the spelling's name."""
    tables: dict[str, dict[str, str]] = {
        name: {} for name in ("torchvision", "detectron2", "caffe2", "numbered", "transformers")
    }

    def add(hub: str, **spelled: str) -> None:
        tables["torchvision"][hub] = hub
        for spelling, name in spelled.items():
            tables[spelling][name] = hub

    def layer(hub: tuple[str, str], numbered: tuple[str, str], d2: str, blob: str, hf: str) -> None:
        (conv, norm), (number, norm_number) = hub, numbered
        add(f"{conv}.weight", detectron2=f"{d2}.weight", caffe2=f"{blob.removeprefix('res_')}_w",
            numbered=f"{number}.weight", transformers=f"{hf}.convolution.weight")  # fmt: skip
        for statistic in STATISTICS:
            add(f"{norm}.{statistic}", detectron2=f"{d2}.norm.{statistic}",
                numbered=f"{norm_number}.{statistic}",
                transformers=f"{hf}.normalization.{statistic}")  # fmt: skip
            for short in _BLOBS.get(statistic, ()):
                add(f"{norm}.{statistic}", caffe2=f"{blob}_bn_{short}")

    layer(("conv1", "bn1"), ("0", "1"), "stem.conv1", "res_conv1", "embedder.embedder")
    inner = [(f"conv{n}", f"bn{n}", f"conv{n}", f"2{'abc'[n - 1]}", f"layer.{n - 1}")
             for n in (1, 2, 3)]  # fmt: skip
    inner.append(("downsample.0", "downsample.1", "shortcut", "1", "shortcut"))
    for stage in range(4):
        for block in range(MOST_BLOCKS):
            at, number = f"layer{stage + 1}.{block}.", f"{stage + 4}.{block}."
            for conv, norm, d2, branch, hf in inner:
                layer(
                    (at + conv, at + norm),
                    (number + conv, number + norm),
                    f"res{stage + 2}.{block}.{d2}",
                    f"res{stage + 2}_{block}_branch{branch}",
                    f"encoder.stages.{stage}.layers.{block}.{hf}",
                )
    return tables


TO_TORCHVISION = _tables()
_TO_DETECTRON2 = {hub: name for name, hub in TO_TORCHVISION["detectron2"].items()}


def to_detectron2(name: str) -> str:
    """Rename one backbone tensor from torchvision to detectron2.

    Raises:
        ValueError: ``name`` is no tensor of a torchvision ResNet backbone (``fc.weight`` is none).
    """
    if name not in _TO_DETECTRON2:
        raise ValueError(f"{name!r} is no tensor of a torchvision ResNet backbone")
    return _TO_DETECTRON2[name]


def to_torchvision(name: str, spelling: str = "detectron2") -> str:
    """Rename one backbone tensor to torchvision's name; the inverse of ``to_detectron2``.

    Raises:
        ValueError: ``name`` is no backbone tensor in that spelling, a key of TO_TORCHVISION. So is
            Caffe2's ``conv1_b``, the stem's bias: torchvision's ResNet has no such tensor.
    """
    if name not in TO_TORCHVISION[spelling]:
        raise ValueError(f"{name!r} is no tensor of a {spelling} ResNet backbone")
    return TO_TORCHVISION[spelling][name]
