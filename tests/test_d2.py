"""Files in, files out: safe to read, proved before they are named, nothing left after a refusal.

Shapes: those of a ResNet-18 unless said otherwise.
"""

import argparse
import collections
import json
import math
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from convert import d2, names
from convert.backbone import read_backbone
from convert.reading import read, read_pickle
from convert.sources import TORCHVISION
from core.errors import InputError
from detection import parity
from models.checkpoint import Facts, save_checkpoint
from models.resnet import create_model
from tests.test_sources import LAYOUT, LAYOUTS, format_of, resnet

ROOT = Path(__file__).resolve().parent.parent
State = dict[str, Tensor]
BRANCHES = (("conv1", "2a"), ("conv2", "2b"), ("conv3", "2c"), ("shortcut", "1"))


def fill(model: nn.Module) -> nn.Module:
    """Give a network of unset tensors weights whose BatchNorms all do something."""
    generator = torch.Generator().manual_seed(5)
    for key, value in model.state_dict().items():
        if value.dim() == 4:
            value.normal_(0, math.sqrt(2 / value[:, 0].numel()), generator=generator)
        elif key.endswith("num_batches_tracked"):
            value.zero_()
        elif key.endswith(("running_var", "weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        else:
            value.normal_(0, 0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.device("meta"):
        model = torchvision.models.resnet18(num_classes=3)
    return fill(model.to_empty(device="cpu"))


@pytest.fixture(scope="module")
def good(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "net.pth"
    torch.save(network.state_dict(), path)
    return path


def without_head(state: State) -> State:
    return {k: v for k, v in state.items() if not k.startswith("fc.") and "num_batches" not in k}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Sentinel:
    """An object whose unpickling would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


# ---- what is written -------------------------------------------------------------------------


def test_the_written_file_is_plain_and_says_where_it_came_from(
    network: nn.Module, tmp_path: Path
) -> None:
    source = tmp_path / "net.pth.tar"
    torch.save({"state_dict": network.state_dict(), "args": argparse.Namespace(lr=1)}, source)
    conversion = d2.convert(source, prove=parity.proof)
    assert conversion.output == tmp_path / "net_d2.pth"
    assert names_in(tmp_path) == {"net.pth.tar", "net_d2.pth"}
    written = torch.load(conversion.output, weights_only=True)
    state = without_head(network.state_dict())
    assert {names.to_torchvision(key) for key in written["model"]} == set(state)
    for key, value in written["model"].items():
        assert torch.equal(value, state[names.to_torchvision(key)])
    facts = written["facts"]
    assert (
        facts["source_sha256"]
        == subprocess.run(
            ["sha256sum", str(source)], capture_output=True, text=True, check=True
        ).stdout.split()[0]
    )
    assert (facts["arch"], facts["tensors"], facts["source_format"]) == (
        "resnet18",
        100,
        "torchvision",
    )
    assert (facts["source_place"], facts["dropped"]) == (
        "state_dict",
        ["state_dict.fc.weight", "state_dict.fc.bias"],
    )
    assert facts["set_aside"] == ["args"]
    assert (facts["mean"], facts["std"]) == (list(TORCHVISION.mean), list(TORCHVISION.std))
    assert d2.load_converted(conversion.output)["facts"] == facts
    torch.save({"model": written["model"]}, tmp_path / "bare.pth")
    with pytest.raises(InputError, match="no converted file"):
        d2.load_converted(tmp_path / "bare.pth")
    assert conversion.output.stat().st_size < 46e6  # no optimiser, no head, no shared storage


def test_a_checkpoint_of_ours_hands_its_facts_on(network: nn.Module, tmp_path: Path) -> None:
    state = network.state_dict()  # our keys are torchvision's
    facts = Facts("resnet18", 3, "ctc", 7, 3, "shapes", 64, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    save_checkpoint(tmp_path / "epoch_0007.pth", state, facts)
    conversion = d2.convert(tmp_path / "epoch_0007.pth", prove=parity.proof)
    wanted = {"method": "ctc", "epoch": 7, "seed": 3, "dataset": "shapes", "source_format": "own",
              "mean": [127.5, 102.0, 76.5], "std": [51.0, 63.75, 76.5]}  # fmt: skip
    assert {key: conversion.facts[key] for key in wanted} == wanted
    text = "\n".join(d2.summary(conversion.facts))
    assert "method ctc, epoch 7, seed 3, dataset shapes" in text
    with pytest.raises(InputError, match="states its own"):
        read_backbone(tmp_path / "epoch_0007.pth", mean=[0, 0, 0], std=[255, 255, 255])


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda c: c["facts"].pop("mean"), "facts lack mean"),
        (lambda c: c.pop("facts") and c.update(facts={}), "facts lack arch, mean"),
        (lambda c: c.update(version=99), "version 99, newer than 1"),
        (lambda c: c["facts"].update(std=[0.0, 1.0, 1.0]), "not three numbers each on the scale"),
        (lambda c: c["facts"].update(arch="resnet34"), "calls itself resnet34, but is a resnet18"),
    ],
)
def test_damaged_facts_of_ours_are_refused(
    network: nn.Module, harm: Callable[[Any], Any], reason: str, tmp_path: Path
) -> None:
    """A checkpoint of ours that does not say its mean must not get ImageNet's."""
    facts = Facts("resnet18", 3, "ctc", 7, 3, "shapes", 64, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    save_checkpoint(tmp_path / "e.pth", {"fc.bias": network.state_dict()["fc.bias"]}, facts)
    content = torch.load(tmp_path / "e.pth", weights_only=True)
    content["model"] = network.state_dict()
    harm(content)
    torch.save(content, tmp_path / "e.pth")
    with pytest.raises(InputError, match=reason):
        read_backbone(tmp_path / "e.pth")


@pytest.mark.parametrize("arch", ["resnet18_cifar", "resnext32_16x4d", "wrn_28_4"])
def test_our_cifar_networks_are_refused(arch: str, tmp_path: Path) -> None:
    state = create_model(arch, 4).state_dict()
    facts = Facts(arch, 4, "ce", 1, 0, "cifar100", 32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    save_checkpoint(tmp_path / "c.pth", state, facts)
    with pytest.raises(InputError, match=r"c\.pth: .*CIFAR stem.* cannot hold.*resnet50"):
        d2.convert(tmp_path / "c.pth", prove=parity.proof)
    assert names_in(tmp_path) == {"c.pth"}


def test_half_precision_and_views_become_plain_float32(network: nn.Module, tmp_path: Path) -> None:
    """A tensor that is a slice of a large buffer must not drag the buffer into the file."""
    state = without_head(network.state_dict())
    large = torch.zeros(4_000_000)
    large[:64] = state["bn1.weight"]
    state = {key: value.half() for key, value in state.items()}
    state["bn1.weight"] = large[:64]
    torch.save(state, tmp_path / "half.pth")
    conversion = d2.convert(tmp_path / "half.pth", prove=parity.proof)
    model = torch.load(conversion.output, weights_only=True)["model"]
    assert {value.dtype for value in model.values()} == {torch.float32}
    assert torch.equal(model["stem.conv1.weight"], state["conv1.weight"].float())
    assert conversion.output.stat().st_size < 46e6


def test_own_mean_and_std_reach_the_facts(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "simclr.pth")
    backbone = read_backbone(tmp_path / "simclr.pth", mean=[0, 0, 0], std=[255, 255, 255])
    assert (backbone.facts()["mean"], backbone.facts()["std"]) == ([0, 0, 0], [255, 255, 255])
    for mean, std in [([0.5] * 3, [0.2] * 3), ([0] * 3, None), ([300, 0, 0], [1] * 3)]:
        with pytest.raises(InputError, match="--mean"):
            read_backbone(tmp_path / "simclr.pth", mean=mean, std=std)


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        ({"arch": "resnetblur18"}, "calls itself resnetblur18, which down-samples by"),
        ({"args": argparse.Namespace(model="resnetaa50")}, "calls itself resnetaa50"),
        ({"arch": "resnet34"}, "calls itself resnet34, but is a resnet18"),
        ({"arch": "resnet18_caffe"}, "--format torchvision-msra"),
    ],
)
def test_a_network_that_is_not_what_it_calls_itself_is_refused(
    good: Path, declared: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """The same tensors under another network's name compute something else."""
    state = torch.load(good, weights_only=True)
    torch.save({"state_dict": state, **declared}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=reason):
        read_backbone(tmp_path / "a.pth")
    torch.save({"state_dict": state, "arch": "resnet18"}, tmp_path / "a.pth")
    assert read_backbone(tmp_path / "a.pth").arch == "resnet18"


# ---- what the names do not tell ---------------------------------------------------------------


def merged(state: State) -> State:
    """The same network with the statistics merged into scale and bias, as MSRA's are."""
    result = dict(state)
    for key in [key for key in state if key.endswith("running_mean")]:
        norm = key.removesuffix("running_mean")
        scale = state[norm + "weight"] / (state[norm + "running_var"] + 1e-5).sqrt()
        result[norm + "bias"] = state[norm + "bias"] - scale * state[key]
        result[norm + "weight"] = scale
        result[key], result[norm + "running_var"] = torch.zeros(len(scale)), torch.ones(len(scale))
    return result


def test_merged_statistics_need_a_format(network: nn.Module, tmp_path: Path) -> None:
    """MSRA's weights under torchvision's names: nothing but the statistics gives them away."""
    path = tmp_path / "msra.pth"
    torch.save(merged(network.state_dict()), path)
    with pytest.raises(
        InputError, match=r"msra\.pth: .*merged.*--format \(torchvision \| torchvision-"
    ):
        d2.convert(path, prove=parity.proof)
    assert names_in(tmp_path) == {"msra.pth"}
    orders = [read_backbone(path, format=f).convention.channel_order
              for f in ("torchvision", "torchvision-msra")]  # fmt: skip
    assert orders == ["RGB", "BGR"]


def test_a_network_that_was_never_trained_has_no_merged_statistics(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(num_classes=2).state_dict(), tmp_path / "random.pth")
    assert read_backbone(tmp_path / "random.pth").source_format == "torchvision"


def test_a_normalisation_beside_the_backbone_gives_mean_and_std(
    network: nn.Module, tmp_path: Path
) -> None:
    """On 0…1 and on 0…255; what is no mean and std of three channels is refused."""
    path = tmp_path / "net.pth"
    state = {f"model.{k}": v for k, v in network.state_dict().items()}

    def read_with(new_mean: list[float], new_std: list[float], **options: Any) -> Any:
        buffers = {"normalizer.new_mean": new_mean, "normalizer.new_std": new_std}
        torch.save(
            {**state, **{k: torch.tensor(v).view(-1, 1, 1) for k, v in buffers.items()}}, path
        )
        return read_backbone(path, **options).convention

    assert read_with([0.5] * 3, [0.25] * 3).mean == (127.5, 127.5, 127.5)
    assert read_with([0.5] * 3, [0.25] * 3).std == (63.75, 63.75, 63.75)
    assert read_with([120.0] * 3, [60.0] * 3).std == (60, 60, 60)
    assert read_with([0.5] * 3, [0.25] * 3, mean=[1, 2, 3], std=[4, 5, 6]).mean == (1, 2, 3)
    with pytest.raises(InputError, match="not three numbers each"):
        read_with([0.5], [0.25])


def test_transformers_settings_that_move_strides_are_refused(tmp_path: Path) -> None:
    content = LAYOUTS["transformers"][0](resnet(1), resnet(2))
    torch.save(content, tmp_path / "pytorch_model.bin")
    settings = {"downsample_in_first_stage": False, "downsample_in_bottleneck": False}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_backbone(tmp_path / "pytorch_model.bin").source_place == "resnet"
    (tmp_path / "config.json").write_text(
        json.dumps({**settings, "downsample_in_bottleneck": True})
    )
    with pytest.raises(InputError, match=r"config\.json beside it says downsample_in_bottleneck"):
        read_backbone(tmp_path / "pytorch_model.bin")


def test_a_resume_state_of_ours_is_refused(network: nn.Module, tmp_path: Path) -> None:
    """It holds the network, but does not say how images enter."""
    from training.resume import FORMAT

    content = {"format": FORMAT, "version": 1, "objective": network.state_dict()}
    torch.save(content, tmp_path / "resume.pth")
    with pytest.raises(InputError, match="resume state: give one of the run's checkpoints"):
        read_backbone(tmp_path / "resume.pth")


# ---- Caffe2 ----------------------------------------------------------------------------------


def caffe2_blobs() -> dict[str, np.ndarray]:
    """An MSRA-style ResNet-50 as blobs, spelled from detectron2's own module names."""
    from detectron2.modeling.backbone.resnet import BasicStem, ResNet

    with torch.device("meta"):
        stages = ResNet.make_default_stages(50, norm="BN", stride_in_1x1=True)
        shapes = {k: v.shape for k, v in ResNet(BasicStem(norm="BN"), stages).state_dict().items()}
    random = np.random.default_rng(3)
    blobs = {}
    for key, shape in shapes.items():
        if "running" in key or "num_batches" in key:
            continue
        scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) == 4 else 0.2
        blob = random.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        if key.endswith("norm.weight"):
            blob = blob + np.float32(1)
        name = key.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.", "")
        if name.startswith("res") and not name.startswith("res_"):
            for layer, branch in (
                ("conv1", "2a"),
                ("conv2", "2b"),
                ("conv3", "2c"),
                ("shortcut", "1"),
            ):
                name = name.replace(layer, f"branch{branch}")
        name = name.replace(".norm.weight", "_bn_s").replace(".norm.bias", "_bn_b")
        name = name.replace("_bn.weight", "_bn_s").replace("_bn.bias", "_bn_b")
        blobs[name.replace(".weight", "_w").replace(".", "_")] = blob
    return blobs


@pytest.fixture(scope="module")
def msra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("msra") / "R-50.pkl"
    with path.open("wb") as file:
        pickle.dump({"blobs": {**caffe2_blobs(), "fc1000_b": np.zeros(3, np.float32)}}, file)
    return path


def test_a_caffe2_pickle_computes_what_detectron2_makes_of_it(msra: Path, tmp_path: Path) -> None:
    """Reference: detectron2's own legacy loading of the same pickle into its FrozenBN backbone."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
    from detectron2.modeling.backbone import build_resnet_backbone

    conversion = d2.convert(msra, tmp_path / "R-50_d2.pth", prove=parity.proof)
    assert conversion.facts["source_format"] == "caffe2-msra"
    assert conversion.facts["tensors"] == 265
    assert (conversion.facts["channel_order"], conversion.facts["std"]) == ("BGR", [1.0, 1.0, 1.0])
    assert conversion.facts["mean"] == [123.675, 116.28, 103.53]  # in R, G, B, as always
    assert conversion.facts["stride_in_1x1"] is True

    cfg = get_cfg()  # its defaults are MSRA's: FrozenBN, stride in the 1×1
    cfg.MODEL.RESNETS.OUT_FEATURES = list(parity.STAGES)
    theirs = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    DetectionCheckpointer(theirs).load(str(msra))
    for module in theirs.modules():  # its loader writes 1, and 1 + ε is not quite scale·x + bias
        if isinstance(module, FrozenBatchNorm2d):
            module.running_var.fill_(1 - module.eps)
    image = parity.fixed_image().float().flip(1) - torch.tensor([103.53, 116.28, 123.675]).reshape(
        1, 3, 1, 1
    )
    with torch.no_grad():
        reference = theirs(image)
    ours, matched, expected = parity.detectron2_features(conversion.output)
    assert matched == expected == 265
    assert max(parity.compare(reference, ours).values()) < 1e-5


def test_a_bias_of_caffe2s_stem_moves_into_the_mean(network: nn.Module, tmp_path: Path) -> None:
    state = without_head(network.state_dict())
    blobs: dict[str, Any] = {}
    for key, value in state.items():
        if "running" not in key:
            blobs[_blob(names.to_detectron2(key))] = value.numpy()
    bias = np.linspace(-1, 1, 64, dtype=np.float32)
    with (tmp_path / "a.pkl").open("wb") as file:
        pickle.dump({**blobs, "conv1_b": bias}, file)
    found = read_backbone(tmp_path / "a.pkl").state
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 255
    convolution = nn.functional.conv2d(image, state["conv1.weight"], torch.tensor(bias), 2, 3)
    scale, shift = (state[f"bn1.{k}"].reshape(1, -1, 1, 1) for k in ("weight", "bias"))
    plain = nn.functional.conv2d(image, found["conv1.weight"], None, 2, 3)
    norm = (found[f"bn1.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
    ours = nn.functional.batch_norm(plain, *norm, training=False, eps=1e-5)
    torch.testing.assert_close(ours, convolution * scale + shift, rtol=1e-5, atol=1e-4)


def _blob(name: str) -> str:
    stem = name.startswith("stem.")
    name = name.removeprefix("stem.")
    if not stem:
        for layer, branch in BRANCHES:
            name = name.replace(f".{layer}.", f".branch{branch}.")
    if ".norm." in name:
        name = ("res_" if stem else "") + name.replace(".norm.weight", "_bn_s")
        name = name.replace(".norm.bias", "_bn_b")
    return name.replace(".weight", "_w").replace(".", "_")


# ---- safe to read ----------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["pth", "pkl", "ckpt", "pickle"])
@pytest.mark.parametrize("writer", ["torch", "torch-legacy", "pickle"])
def test_code_in_a_file_is_refused_and_never_runs(ending: str, writer: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    content = {"state_dict": {"conv1.weight": torch.ones(2)}, "args": Sentinel(ran)}
    path = tmp_path / f"evil.{ending}"
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"conv1_w": np.ones(2), "args": Sentinel(ran)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(InputError) as caught:
        d2.convert(path, prove=parity.proof)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == {path.name}
    assert not ran.exists()


def test_the_sentinel_would_have_run(tmp_path: Path) -> None:
    """Guards the test above: an ordinary reader does run it."""
    pickle.loads(pickle.dumps(Sentinel(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "reference",
    ["os.system", "builtins.eval", "builtins.getattr", "numpy.load", "numpy.core.multiarray.dot",
     "torch.load", "collections.namedtuple", "functools.partial", "codecs.open", "_codecs.decode"],
)  # fmt: skip
def test_the_restricted_unpickler_looks_up_nothing_else(reference: str, tmp_path: Path) -> None:
    module, _, name = reference.rpartition(".")
    stream = f"c{module}\n{name}\n.".encode()
    (tmp_path / "a.pkl").write_bytes(stream)
    with pytest.raises(InputError, match=f"never loaded .{reference}"):
        read_pickle(tmp_path / "a.pkl")


def test_the_restricted_unpickler_knows_no_codec_but_texts(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"c_codecs\nencode\n(Vx\nVhex_codec\ntR.")
    with pytest.raises(InputError, match=r"never loaded .*hex_codec"):
        read_pickle(tmp_path / "a.pkl")


def test_arrays_of_both_pythons_and_numpys_are_read(tmp_path: Path) -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    content = collections.OrderedDict(a=array, b=np.float32(2), c=[1, "x", None, b"y", True])
    for protocol in range(6):
        stream = pickle.dumps(content, protocol)
        for text in (stream, stream.replace(b"numpy._core.", b"numpy.core.")):
            if protocol >= 4 and text is not stream:
                continue  # frames have lengths that a replacement would break
            (tmp_path / "a.pkl").write_bytes(text)
            back = read_pickle(tmp_path / "a.pkl")
            assert np.array_equal(back["a"], array)
            assert back["b"] == 2
            assert back["c"] == content["c"]
    python2 = (  # {"w": array([-1], "f4")} as Python 2 and numpy 1 wrote it, strings as bytes
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x01\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x04\x00\x00\x80\xbftbs."
    )
    (tmp_path / "a.pkl").write_bytes(python2)
    assert read_pickle(tmp_path / "a.pkl")["w"].tolist() == [-1.0]


def test_settings_that_trainers_save_are_passed_over(network: nn.Module, tmp_path: Path) -> None:
    """numpy's numbers and OmegaConf's dicts are read without importing or running their classes."""
    from omegaconf import OmegaConf

    content = {
        "state_dict": {f"backbone.{k}": v for k, v in network.state_dict().items()},
        "pytorch-lightning_version": "2.0",
        "best": np.float64(0.7),
        "steps": np.arange(3),
        "history": collections.defaultdict(list, {"a": [1]}),
        "hyper_parameters": OmegaConf.create({"a": {"b": [1, 2.5, "c"]}}),
    }
    torch.save(content, tmp_path / "solo.ckpt")
    assert read_backbone(tmp_path / "solo.ckpt").source_place == "state_dict.backbone"


def test_a_file_of_mmengines_runner_is_read(network: nn.Module, tmp_path: Path) -> None:
    """Its log is pickled as HistoryBuffer objects, which hold arrays and their own methods."""
    import types

    class HistoryBuffer:
        def mean(self) -> float:
            return 0.0

        def __init__(self) -> None:
            self.max_length, self._log_history = 9, np.array([0.5, 0.25])

        def __getstate__(self) -> dict[str, Any]:
            return {**vars(self), "statistics_methods": {"mean": HistoryBuffer.mean}}

    name = "mmengine.logging.history_buffer"
    HistoryBuffer.__module__ = HistoryBuffer.mean.__module__ = name
    HistoryBuffer.__qualname__, HistoryBuffer.mean.__qualname__ = (
        "HistoryBuffer",
        "HistoryBuffer.mean",
    )
    modules = {part: types.ModuleType(part) for part in ("mmengine", "mmengine.logging", name)}
    modules[name].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    content = {
        "meta": {"epoch": 3, "mmengine_version": "0.10.7", "cfg": "model = dict()"},
        "state_dict": {f"backbone.{k}": v for k, v in network.state_dict().items()},
        "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {}},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []},
    }
    path = tmp_path / "epoch_3.pth"
    with pytest.MonkeyPatch.context() as patch:
        for part, module in modules.items():
            patch.setitem(sys.modules, part, module)
        torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        stream = archive.read("epoch_3/data.pkl")
    assert b"history_buffer" in stream
    assert b"getattr" in stream
    assert read_backbone(path).source_place == "state_dict.backbone"
    found = read(path)["message_hub"]["log_scalars"]["train/loss"]
    assert (type(found).__name__, vars(found)) == ("Inert", {})


def test_a_stand_in_is_empty_whatever_it_is_given(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    torch.save({"cfg": OmegaConf.create({"a": 1}), "x": torch.ones(1)}, tmp_path / "a.pth")
    content = read(tmp_path / "a.pth")
    assert vars(content["cfg"]) == {}
    assert type(content["cfg"]).__module__ == "convert.reading"
    assert content["x"].tolist() == [1]


@pytest.mark.slow
@LAYOUT
def test_every_layout_passes_the_proof_as_a_file(name: str, tmp_path: Path) -> None:
    """The whole way of every format; what the default suite shows in memory and for a few."""
    if name in ("own", "converted"):
        pytest.skip("has facts, and tests of its own")
    models = []
    for factor in (1.0, 1.1):
        with torch.device("meta"):
            model = torchvision.models.resnet18(num_classes=10)
        models.append(fill(model.to_empty(device="cpu")))
        for value in models[-1].parameters():
            value.data *= factor
    path = tmp_path / ("net.pkl" if name.startswith("caffe2") else "net.pth")
    content = LAYOUTS[name][0](*models)
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    on_request = name if name == "torchvision-msra" else None
    conversion = d2.convert(path, format=on_request, prove=parity.proof)
    assert conversion.facts["source_format"] == format_of(name)
    assert conversion.facts["source_place"] == LAYOUTS[name][1]
    assert conversion.proof.matched == 100


# ---- damaged and unsuited --------------------------------------------------------------------


def damaged(path: Path, good: Path, how: str) -> Path:
    content = good.read_bytes()
    if how == "missing":
        return path
    if how == "folder":
        path.mkdir()
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.write_bytes({"empty": b"", "text": b"not a checkpoint"}.get(how, content[:-1000]))
    return path


@pytest.mark.parametrize("how", ["missing", "folder", "flipped", "empty", "text", "truncated"])
def test_a_damaged_file_is_refused(good: Path, how: str, tmp_path: Path) -> None:
    path = damaged(tmp_path / "bad.pth", good, how)
    before = names_in(tmp_path)
    with pytest.raises(InputError, match=r"bad\.pth"):
        d2.convert(path, prove=parity.proof)
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("ending", ["pkl", "safetensors", "pth.tar"])
@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04.", b"garbage" * 9, b"\xff" * 64])
def test_damage_in_the_other_containers_is_refused(
    ending: str, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / f"bad.{ending}").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\."):
        read(tmp_path / f"bad.{ending}")


OTHER_KINDS = {
    b"<!DOCTYPE html><html><head><title>Sign in</title>": "a web page",
    b"\n  <html lang='en'>": "a web page",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n": "a Git LFS pointer",
    b"\x08\x07\x12\x07pytorch\x1a\x052.1.0": "an ONNX model",
    b"\x89HDF\r\n\x1a\n" + bytes(40): "an HDF5 file",
    b"\x1f\x8b\x08\x00" + bytes(40): "a compressed file",
    b"x" * 257 + b"ustar" + bytes(300): "a tar archive",
    b"\x93NUMPY\x01\x00v\x00{'descr'": "a NumPy array",
    b'{"weight_map": {"conv1.weight": "1.safetensors"}}': "a JSON text",
}


@pytest.mark.parametrize("name", ["net.pth", "net.pkl", "net.safetensors"])
@pytest.mark.parametrize("content", OTHER_KINDS)
def test_a_file_of_another_kind_is_named(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is {OTHER_KINDS[content]}"):
        read(tmp_path / name)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_and_other_zips_are_named(tmp_path: Path) -> None:
    with torch.device("cpu"):
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pth")
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    for name, kind in [("script.pth", "TorchScript archive"), ("arrays.npz", "zip archive that")]:
        with pytest.raises(InputError, match=rf"{name} is a {kind}"):
            read(tmp_path / name)


def test_a_safetensors_file_is_not_taken_for_another_kind_by_its_length(tmp_path: Path) -> None:
    """The header's length, in the first bytes, may be that of any other kind's magic."""
    from safetensors.torch import save

    content = save({"a": torch.ones(2)})
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    length = int.from_bytes(b"BZh\0\0\0\0\0", "little")
    (tmp_path / "a.safetensors").write_bytes(b"BZh\0\0\0\0\0" + header.ljust(length) + content[-8:])
    assert read(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]


@pytest.mark.parametrize("ending", ["pth", "pkl"])
def test_garbled_and_truncated_files_get_one_sentence(
    good: Path, ending: str, tmp_path: Path
) -> None:
    """Every first byte, alone and before noise; and the start of every format that is read."""
    random = np.random.default_rng(0)
    pickled = pickle.dumps({"a": np.ones(3), "b": [1, "x", None]}, 2)
    torch.save({"a": torch.ones(3)}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    starts = [bytes([first]) + random.bytes(size) for first in range(256) for size in (0, 40)]
    for whole in (pickled, (tmp_path / "legacy").read_bytes(), good.read_bytes()[:3000]):
        starts += [whole[:size] for size in range(1, min(len(whole), 500), 11)]
    path, sentences = tmp_path / f"bad.{ending}", set()
    for content in starts:
        path.write_bytes(content)
        try:
            read(path)  # a few bytes of noise may be a whole pickle, of a number say
        except InputError as error:
            sentences.add(str(error))
    assert all(sentence.startswith(str(path)) for sentence in sentences)
    assert not [s for s in sentences if "\n" in s or "weights_only" in s]


def change(key: str, value: Any) -> Callable[[State], Any]:
    return lambda state: {**state, key: value(state[key]) if callable(value) else value}


def without(start: str) -> Callable[[State], Any]:
    return lambda state: {k: v for k, v in state.items() if not k.startswith(start)}


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (
            change("layer2.0.conv1.weight", lambda v: v * torch.nan),
            "layer2.0.conv1.weight holds NaN",
        ),
        (change("bn1.bias", torch.full((64,), torch.inf)), "bn1.bias holds NaN or infinity"),
        (change("bn1.running_var", torch.full((64,), -1.0)), "a variance cannot be"),
        (change("bn1.bias", torch.ones(64, dtype=torch.int8)), "not floating point"),
        (change("bn1.bias", torch.ones(64).to(torch.float8_e5m2)), "quantised"),
        (change("bn1.bias", np.ones(64, np.int64)), "an array of int64"),
        (change("bn1.bias", "text"), "is a str, not a tensor"),
        (lambda s: {**s, 7: torch.ones(1)}, "neither .*: 7;"),
        (change("bn1.bias", torch.ones(63)), "shape 63, but a resnet18 has 64"),
        (change("conv1.weight", torch.ones(64, 3, 3, 3)), "CIFAR"),
        (change("conv1.weight", torch.zeros(64, 3, 7, 7)), "conv1.weight, the stem, is all zeros"),
        (change("bn1.bias", torch.ones(64, device="meta")), "no numbers"),
        (
            lambda s: {k: v for k, v in s.items() if k != "layer4.1.bn2.bias"},
            "1 of the 100 tensors",
        ),
        (lambda s: {k: v for k, v in s.items() if "layer4" not in k}, "2, 2, 2 basic blocks"),
        (change("layer1.0.extra.weight", 1), "neither of the backbone"),
        (lambda s: {"a": 1}, "holds no ResNet: its keys are a"),
        (lambda s: [s], "holds a list"),
    ],
)
def test_an_unsuited_checkpoint_is_refused_and_leaves_nothing(
    network: nn.Module, harm: Callable[[State], Any], reason: str, tmp_path: Path
) -> None:
    torch.save(harm(without_head(network.state_dict())), tmp_path / "bad.pth")
    with pytest.raises(InputError, match=rf"bad\.pth: .*{reason}"):
        d2.convert(tmp_path / "bad.pth", tmp_path / "new" / "out.pth", prove=parity.proof)
    assert names_in(tmp_path) == {"bad.pth"}


# ---- the output ------------------------------------------------------------------------------


def test_a_failed_proof_leaves_no_file_and_the_old_one_as_it_was(
    good: Path, tmp_path: Path
) -> None:
    def refuse(backbone: Any) -> Any:
        def check(path: Path) -> None:
            assert path.is_file()  # it is written, but not yet under its name
            raise InputError("differs")

        return check

    output = tmp_path / "out.pth"
    with pytest.raises(InputError, match="differs"):
        d2.convert(good, output, prove=refuse)
    assert names_in(tmp_path) == set()
    output.write_bytes(b"old")
    with pytest.raises(InputError, match="differs"):
        d2.convert(good, output, overwrite=True, prove=refuse)
    assert output.read_bytes() == b"old"
    assert names_in(tmp_path) == {"out.pth"}


def test_an_output_of_another_source_is_not_overwritten(good: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.pth"
    d2.convert(good, output)
    first = output.stat().st_mtime_ns
    assert d2.convert(good, output).output == output  # the same source: done again
    assert output.stat().st_mtime_ns > first
    content = torch.load(good, weights_only=True)
    torch.save({"model": content}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"out\.pth exists and was not made from .*--overwrite"):
        d2.convert(tmp_path / "other.pth", output)
    d2.convert(tmp_path / "other.pth", output, overwrite=True)
    assert d2.load_converted(output)["facts"]["source_path"].endswith("other.pth")


def test_another_backbone_of_the_same_file_does_not_overwrite_the_first(
    network: nn.Module, tmp_path: Path
) -> None:
    state = network.state_dict()
    ema = {key: value * 2 for key, value in state.items()}
    torch.save({"model": state, "model_ema": ema}, tmp_path / "net.pth")
    first = d2.convert(tmp_path / "net.pth", prefix="model")
    with pytest.raises(InputError, match=r"not made from .*net\.pth at model_ema; .*--overwrite"):
        d2.convert(tmp_path / "net.pth", prefix="model_ema")
    second = d2.convert(tmp_path / "net.pth", tmp_path / "ema.pth", prefix="model_ema")
    stems = [d2.load_converted(c.output)["model"]["stem.conv1.weight"] for c in (first, second)]
    assert torch.equal(stems[0] * 2, stems[1])
    assert second.facts["set_aside"] == ["model"]


@pytest.mark.parametrize(
    ("output", "reason"),
    [("net.pth", "the source itself"), ("net_d2.pkl", r"not end in \.pth"), (".", "is a folder")],
)
def test_an_unsuited_output_is_refused(good: Path, output: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        d2.convert(good, good.parent / output)
    assert names_in(good.parent) == {"net.pth"}


@pytest.mark.parametrize(
    ("source", "output"),
    [("a/ckpt.pth", "a/ckpt_d2.pth"), ("b.pth.tar", "b_d2.pth"), ("R-50.pkl", "R-50_d2.pth"),
     ("x.safetensors", "x_d2.pth"), ("epoch=3.ckpt", "epoch=3_d2.pth"), ("n", "n_d2.pth"),
     ("timm:resnet18.a1_in1k", "timm_resnet18.a1_in1k_d2.pth")],
)  # fmt: skip
def test_the_default_output_lies_beside_the_source(source: str, output: str) -> None:
    assert d2.default_output(source) == Path(output)


def harm_facts(content: Any) -> None:
    del content["facts"]["std"]


def harm_model(content: Any) -> None:
    del content["model"]["res2.0.conv1.weight"]


def harm_author(content: Any) -> None:
    content["__author__"] = "someone"


@pytest.mark.parametrize("harm", [harm_facts, harm_model, harm_author])
def test_a_converted_file_is_checked_when_it_is_loaded(
    good: Path, harm: Callable[[Any], None], tmp_path: Path
) -> None:
    output = d2.convert(good, tmp_path / "out.pth").output
    content = d2.load_converted(output)
    harm(content)
    torch.save(content, output)
    with pytest.raises(InputError, match=r"out\.pth"):
        d2.load_converted(output)


# ---- the way back ----------------------------------------------------------------------------


def test_there_and_back_gives_the_same_tensors(
    good: Path, network: nn.Module, tmp_path: Path
) -> None:
    there = d2.convert(good, tmp_path / "net_d2.pth").output
    back = d2.convert(there, to="torchvision", prove=parity.proof_of_way_back)
    assert back.output == tmp_path / "net_torchvision.pth"
    state = torch.load(back.output, weights_only=True)["model"]
    for key, value in without_head(network.state_dict()).items():
        assert torch.equal(state.pop(key), value)
    assert not state
    fresh = torchvision.models.resnet18()
    content = torch.load(back.output, weights_only=True)["model"]
    assert set(fresh.load_state_dict(content, strict=False).missing_keys) >= {"fc.weight"}
    again = d2.convert(back.output, tmp_path / "again.pth").facts
    assert (again["source_format"], again["mean"]) == ("converted", list(TORCHVISION.mean))


def test_the_way_back_turns_bgr_into_rgb(network: nn.Module, tmp_path: Path) -> None:
    state = without_head(network.state_dict())
    model = {names.to_detectron2(key): value for key, value in state.items()}
    torch.save({"model": model, "__author__": "Caffe2"}, tmp_path / "bgr.pth")
    back = d2.convert(tmp_path / "bgr.pth", to="torchvision", prove=parity.proof_of_way_back)
    written = torch.load(back.output, weights_only=True)
    assert written["facts"]["mean"] == [123.675, 116.28, 103.53]
    assert written["facts"]["channel_order"] == "RGB"
    assert torch.equal(written["model"]["conv1.weight"], state["conv1.weight"].flip(1))


def test_a_stride_in_the_1x1_has_no_way_back(msra: Path) -> None:
    with pytest.raises(InputError, match="stride in the 3×3"):
        d2.convert(msra, to="torchvision")
    assert names_in(msra.parent) == {"R-50.pkl"}


# ---- libraries' weights, and the other containers --------------------------------------------


@pytest.mark.parametrize("name", ["net.safetensors", "known_by_its_content.bin"])
def test_safetensors_are_read(network: nn.Module, name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(network.state_dict(), tmp_path / name)
    state = read_backbone(tmp_path / name).state
    assert torch.equal(state["conv1.weight"], network.state_dict()["conv1.weight"])


def test_weights_of_timm_on_the_machine_are_found(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--timm--resnet18.mine" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    settings = {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    (folder / "config.json").write_text(json.dumps(settings))
    backbone = read_backbone("timm:resnet18")
    assert backbone.convention.mean == (127.5, 127.5, 127.5)
    assert (backbone.source_path, backbone.source_format) == ("timm:resnet18.mine", "timm")
    with pytest.raises(InputError, match=r"timm:resnet50 are not on this machine.*downloaded"):
        read_backbone("timm:resnet50")
    other = tmp_path / "models--timm--resnet18.other" / "snapshots" / "abc"
    other.mkdir(parents=True)
    (other / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"timm:resnet18\.mine or timm:resnet18\.other"):
        read_backbone("timm:resnet18")


def test_weights_of_torchvision_on_the_machine_are_found(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match=r"torchvision:resnet18 are not on this machine"):
        read_backbone("torchvision:resnet18")
    (folder / url.rsplit("/", 1)[-1]).symlink_to(good)
    backbone = read_backbone("torchvision:resnet18")
    assert backbone.source_path == "torchvision:resnet18.IMAGENET1K_V1"
    assert backbone.convention.mean == pytest.approx(TORCHVISION.mean)
    with pytest.raises(InputError, match="no model 'resnet19'"):
        read_backbone("torchvision:resnet19")
    with pytest.raises(InputError, match="no weights 'V9'"):
        read_backbone("torchvision:resnet18.V9")


# ---- the tool --------------------------------------------------------------------------------


def tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "convert_to_d2.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def test_the_tool_converts_proves_and_reports(good: Path, tmp_path: Path) -> None:
    result = tool(good, "--output", tmp_path / "out_d2.pth")
    assert result.returncode == 0, result.stderr
    for text in ("torchvision", "resnet18", "100 of 100", "res5", "fc.* (2)", "123.675", "3×3"):
        assert text in result.stdout
    assert zipfile.is_zipfile(tmp_path / "out_d2.pth")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["nowhere.pth"], "nowhere.pth does not exist"), ([], "no checkpoint"), (["--bad"], "--bad")],
)
def test_the_tool_answers_bad_input_in_one_sentence(arguments: list[str], reason: str) -> None:
    result = tool(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert reason in result.stderr


def test_the_list_of_formats_is_the_table() -> None:
    from convert.sources import FORMATS

    lines = tool("--list-formats").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(FORMATS)


MEASURE = """
import resource, sys, time
import detectron2.modeling  # the import is not what is measured
from convert import d2
from detection.parity import proof

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before, began = peak(), time.perf_counter()
d2.convert(sys.argv[1], sys.argv[2], prove=proof)
print(peak() - before, time.perf_counter() - began)
"""


def test_100_mb_are_converted_in_seconds_with_twice_their_memory(tmp_path: Path) -> None:
    source = tmp_path / "r50.pth"
    torch.save(torchvision.models.resnet50().state_dict(), source)
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "r50_d2.pth")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    memory, seconds = map(float, done.stdout.splitlines()[-1].split())
    assert memory < 2.5 * source.stat().st_size
    assert seconds < 20  # 1 s on an idle core
