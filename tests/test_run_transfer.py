"""The tool from weights to rows, and one sentence for each kind of bad input."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from core.config import CONFIG_DIR, load_config, recipe_and_data
from core.errors import InputError
from core.files import locked
from core.identity import announced, identity
from core.results import ResultRow, read_rows, sha256_of
from data.datasets import DATASETS, resolved
from models.checkpoint import Facts, load_checkpoint, save_checkpoint
from models.resnet import create_model
from report.tables import build_tables
from transfer.backbone import from_checkpoint, from_tensors
from transfer.config import TransferConfig
from transfer.protocols import METHODS

ROOT = Path(__file__).resolve().parent.parent
ARCH = "resnet18_cifar_w16"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "epoch_0003.pth"
    facts = Facts(ARCH, 7, "ce", 3, 5, "cifar100", 32, (0.5, 0.4, 0.3), (0.25, 0.2, 0.2))
    save_checkpoint(path, create_model(ARCH, 7).state_dict(), facts)
    return path


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_npz: Path
) -> Callable[..., list[ResultRow]]:
    """Call the tool's main in this process; returns the rows of its output folder."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = importlib.import_module("run_transfer")
    config = tmp_path / "tiny.yaml"
    config.write_text(
        f"data: {{name: npz, root: {tiny_npz}, image_size: 8}}\n"
        "features: {cache: none}\nknn: {neighbours: [5]}\nfew_shot: {shots: [2]}\n"
        "linear: {c_values: 5}\nreleased: {epochs: 2}\n"
        "finetune: {steps: 2, lr: [0.01], weight_decay: [0.0]}\nloop: {batch_size: 8}\n"
    )

    def call(path: Path, *overrides: str, options: tuple[str, ...] = ()) -> list[ResultRow]:
        output = tmp_path / "out"
        command = ["--config", str(config), "--weights", str(path), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["run_transfer.py", *command, *options, *overrides])
        assert tool.main() == 0
        rows = output / "results.jsonl"
        return read_rows(rows) if rows.exists() else []

    return call


def test_an_output_in_use_is_refused(
    run_here: Callable[..., list[ResultRow]], weights: Path, tmp_path: Path
) -> None:
    with (
        locked(tmp_path / "out"),
        pytest.raises(InputError, match="out is in use by another run"),
    ):
        run_here(weights)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def plain(row: ResultRow) -> str:
    """Return a protocol's name without the mark of changed keys."""
    return row.protocol.partition("+")[0]


def test_every_protocol_gives_a_row_that_says_how_it_came_about(
    run_here: Callable[..., list[ResultRow]], weights: Path
) -> None:
    before = weights.read_bytes()
    rows = run_here(weights, "methods", "[linear, knn, few_shot, released, finetune]")
    expected = ["linear", "knn_5", "few_shot_2", "linear_released", "finetune"]
    assert [plain(row) for row in rows] == [f"{name}_8px" for name in expected]  # not its own size
    marked = {plain(row) for row in rows if "+" in row.protocol}  # as shipped are k-NN and few-shot
    assert marked == {"linear_8px", "linear_released_8px", "finetune_8px"}
    by_name = {row.details["method"]: row for row in rows}
    assert by_name["linear"].details["overrides"] == {"linear.c_values": 5}
    for row in rows:
        assert (row.step, row.dataset, row.split, row.metric) == (
            "transfer",
            "tiny",
            "test",
            "top1",
        )
        assert (row.init, row.seed, row.epoch, row.unit) == ("ce", 5, 3, "%")
        assert row.weights == sha256_of(weights)
        assert row.value is not None
        assert 0 <= row.value <= 100
    assert by_name["linear"].selection == "best on held-out train"
    assert by_name["released"].selection == "best on test"
    assert "BatchNorm" in by_name["released"].details["flag"]
    assert len(by_name["few_shot"].details["draws"]) == 5
    assert by_name["finetune"].selection == "last"
    assert weights.read_bytes() == before
    assert by_name["linear"].value > 75  # one colour a class: any features tell them apart


def test_a_foreign_checkpoint_enters_by_its_format(
    run_here: Callable[..., list[ResultRow]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    moco = {f"module.encoder_q.{k}": v for k, v in state.items() if not k.startswith("fc.")}
    moco |= {k.replace("encoder_q", "encoder_k"): v for k, v in moco.items()}
    moco["module.queue"] = torch.zeros(128, 16)
    torch.save({"state_dict": moco, "arch": "resnet18"}, tmp_path / "moco.pth.tar")
    torch.save(state, tmp_path / "plain.pth")
    first = run_here(tmp_path / "moco.pth.tar", options=("--init", "mine"))[-1]
    second = run_here(tmp_path / "plain.pth")[-1]
    assert (first.init, second.init) == ("mine", "plain")
    key = run_here(tmp_path / "moco.pth.tar", options=("--prefix", "encoder_k"))[-1]
    assert (key.init, key.value) == ("moco", first.value)
    assert key.weights != first.weights  # another backbone of the file: never one mean with it
    msra = run_here(tmp_path / "plain.pth", options=("--format", "torchvision-msra"))[-1]
    assert msra.weights != second.weights  # nor with the same one under another convention
    assert first.value == second.value
    assert first.details["arch"] == "resnet18"


def test_bgr_weights_become_the_same_function_of_rgb_images() -> None:
    """Blue first with its own mean, against the network that is fed so."""
    torch.manual_seed(0)
    network = create_model("resnet18", 1).eval()
    mean, std = (103.5, 116.3, 123.7), (1.0, 2.0, 3.0)
    made = from_tensors(
        "resnet18", network.state_dict(), mean, std,
        channel_order="BGR", stride_in_1x1=False, sha256="", path="x", init="x",
    )  # fmt: skip
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    blue_first = images.flip(1).float() - torch.tensor(mean)[:, None, None]
    blue_first /= torch.tensor(std)[:, None, None]
    with torch.no_grad():
        expected = network.forward_features(blue_first)
        found = made.model.eval().forward_features(made.inputs.apply(images))
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-2 * float(expected.abs().max()))


def test_msra_strides_stand_in_the_1x1() -> None:
    network = create_model("resnet50", 1)
    made = from_tensors(
        "resnet50", network.state_dict(), (0.0,) * 3, (1.0,) * 3,
        channel_order="RGB", stride_in_1x1=True, sha256="", path="x", init="x",
    )  # fmt: skip
    block = made.model.layer3[0]
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert made.model.forward_features(x).shape == network.forward_features(x).shape


def spoilt_npz(source: Path, target: Path, **changes: np.ndarray | None) -> Path:
    content = dict(np.load(source)) | changes
    np.savez(target, **{k: v for k, v in content.items() if v is not None})
    return target


def test_bad_data_are_refused_in_one_sentence(
    run_here: Callable[..., list[ResultRow]], weights: Path, tiny_npz: Path, tmp_path: Path
) -> None:
    whole = dict(np.load(tiny_npz))
    no_blue = np.where(whole["y_train"] == 2, 0, whole["y_train"])
    cases: dict[str, dict[str, np.ndarray | None]] = {
        "labels": {"y_test": whole["y_test"] + 1},
        "has only train": {"x_test": None, "y_test": None},
        "class 'blue' of .* has no image in train": {"y_train": no_blue},
        "at least 2": {
            "classes": whole["classes"][:1], "y_train": no_blue * 0, "y_test": no_blue[:24] * 0,
        },
    }  # fmt: skip
    for number, (reason, changes) in enumerate(cases.items()):
        path = spoilt_npz(tiny_npz, tmp_path / f"bad{number}.npz", **changes)
        with pytest.raises(InputError, match=reason):
            run_here(weights, "data.root", str(path))
    fewer = {key: whole[key][:3] for key in ("x_train", "y_train")}
    assert sorted(fewer["y_train"]) == [0, 1, 2]
    with pytest.raises(InputError, match="no class has 2 images in train"):
        run_here(weights, "data.root", str(spoilt_npz(tiny_npz, tmp_path / "one.npz", **fewer)))
    reason = "few_shot.shots has 17, but class 'red' of tiny has 16 images"
    for dry in ((), ("--dry-run",)):  # before the features that the linear probe would compute
        with pytest.raises(InputError, match=reason):
            run_here(
                weights, "methods", "[linear, few_shot]", "few_shot.shots", "[17]", options=dry
            )
        with pytest.raises(InputError, match="49, but there are 48"):
            run_here(weights, "methods", "[linear, knn]", "knn.neighbours", "[49]", options=dry)
    assert not (tmp_path / "out").exists()


def test_a_class_without_a_test_image_is_refused_unless_it_is_asked_for(
    run_here: Callable[..., list[ResultRow]], weights: Path, tiny_npz: Path, tmp_path: Path
) -> None:
    """An interrupted copy must not pass for the whole evaluation set."""
    whole = dict(np.load(tiny_npz))
    kept = {key: whole[key][whole["y_test"] != 2] for key in ("x_test", "y_test")}
    where = ("data.root", str(spoilt_npz(tiny_npz, tmp_path / "less.npz", **kept)))
    with pytest.raises(InputError, match=r"class 'blue' of less has no image in test .*partial"):
        run_here(weights, *where)
    (row,) = run_here(weights, *where, "data.partial", "true")
    assert row.details["test_images"] == 16


def test_released_is_a_recipe_and_no_name_for_another(
    run_here: Callable[..., list[ResultRow]], weights: Path
) -> None:
    with pytest.raises(InputError, match=r"--config transfer/released\.yaml"):
        run_here(weights, "methods", "[linear, knn]", "protocol", "released")


@pytest.mark.parametrize(("method", "split"), [
    ("finetune", "train"), ("finetune", "test"), ("released", "train"), ("linear", "test"),
])  # fmt: skip
def test_unreadable_images_are_counted_under_every_method(
    run_here: Callable[..., list[ResultRow]], weights: Path, tmp_path: Path, method: str, split: str
) -> None:
    """And those of the test split before a training starts."""
    for part in ("train", "test"):
        for name in "ab":
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (9, 9), (40 * i, 20, 90)).save(folder / f"{i}.png")
    for name in "ab":
        (tmp_path / "images" / split / name / "2.png").write_bytes(b"\x89PNG broken")
    where = ("data.name", "folder", "data.root", str(tmp_path / "images"), "methods", f"[{method}]")
    reason = rf"2 of the 8 images of images {split} .*a/2\.png.*b/2\.png"
    with pytest.raises(InputError, match=reason):
        run_here(weights, *where)
    assert (tmp_path / "out" / "finetune").exists() == (method + split == "finetunetrain")


def test_splits_must_have_the_same_classes(
    run_here: Callable[..., list[ResultRow]], weights: Path, tmp_path: Path
) -> None:
    """And an image that does not decode is named; the evaluation set is never shortened."""
    for split, classes in (("train", "ab"), ("test", "ab")):
        for name in classes:
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (9, 9), (40 * i, 20, 90)).save(folder / f"{i}.png")
    where = ("data.name", "folder", "data.root", str(tmp_path / "images"))
    (tmp_path / "images" / "test" / "b" / "2.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(InputError, match=r"1 of the 8 images of images test.*b/2\.png"):
        run_here(weights, *where)
    (tmp_path / "images" / "test" / "b").rename(tmp_path / "images" / "test" / "c")
    with pytest.raises(InputError, match="class"):
        run_here(weights, *where)


def test_an_official_val_split_is_chosen_on_and_then_learnt_from(
    run_here: Callable[..., list[ResultRow]], weights: Path, tmp_path: Path
) -> None:
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        for name, colour in (("a", "red"), ("b", "blue")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (9, 9), colour).save(folder / f"{i}.png")
    where = ("data.name", "folder", "data.root", str(tmp_path / "images"))
    rows = run_here(
        weights, *where, "methods", "[linear, knn, finetune]", "finetune.lr", "[0.01, 0.001]"
    )
    assert [row.selection for row in rows] == ["best on val", "last", "best on val"]
    assert {row.split for row in rows} == {"test"}
    assert {row.details["train_images"] for row in rows} == {18}
    assert rows[0].value == 100


def test_bad_weights_are_refused_in_one_sentence(
    run_here: Callable[..., list[ResultRow]], weights: Path, tmp_path: Path
) -> None:
    good = load_checkpoint(weights)
    path = tmp_path / "bad.pth"
    content = torch.load(weights, weights_only=True)
    content["model"]["layer1.0.conv1.weight"][0] = float("nan")
    torch.save(content, path)
    with pytest.raises(InputError, match=r"layer1\.0\.conv1\.weight holds NaN"):
        run_here(path)
    torch.save(content | {"model": {k: v for k, v in good.model.items() if "bn2" not in k}}, path)
    with pytest.raises(InputError, match=r"lacks layer1\.0\.bn2"):
        run_here(path)
    torch.save({"words": torch.zeros(100, 8), "encoder.weight": torch.zeros(8, 8)}, path)
    with pytest.raises(InputError, match=r"bad\.pth"):
        run_here(path)
    path.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="truncated"):
        run_here(path)
    with pytest.raises(InputError, match="does not exist"):
        run_here(tmp_path / "nowhere.pth")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("methods", "[magic]"), "'magic'; known are linear"),
        (("methods", "[]"), "nothing"),
        (("features.dtype", "int8"), "features.dtype"),
        (("linear.patience", "0"), "linear.patience"),
        (("linear.patiense", "3"), "linear.patience"),
        (("knn.neighbours", "[0]"), "knn.neighbours"),
        (("few_shot.draws", "1"), "few_shot.draws"),
        (("data.name", "cifar11"), "did you mean"),
    ],
)
def test_bad_configs_are_refused_before_any_work(
    run_here: Callable[..., list[ResultRow]],
    weights: Path,
    overrides: tuple[str, ...],
    reason: str,
) -> None:
    with pytest.raises(InputError, match=reason):
        run_here(weights, *overrides)


def test_a_fine_tuning_is_not_started_over_another(
    run_here: Callable[..., list[ResultRow]], weights: Path
) -> None:
    rows = run_here(weights, "methods", "[finetune]")
    with pytest.raises(InputError, match="give --resume"):
        run_here(weights, "methods", "[finetune]")
    again = run_here(weights, "methods", "[finetune]", options=("--resume",))
    assert again[-1].value == rows[0].value


def test_our_own_checkpoint_loads_whatever_its_stem(weights: Path) -> None:
    found = from_checkpoint(load_checkpoint(weights), "abc", init="renamed")
    assert (found.init, found.seed, found.epoch, found.model.arch) == ("renamed", 5, 3, ARCH)
    state = load_checkpoint(weights).model
    for key, value in found.model.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(value, state[key])


@pytest.mark.parametrize(
    "path", sorted((CONFIG_DIR / "transfer").glob("*.yaml")), ids=lambda path: path.stem
)
def test_each_recipe_says_how_to_run_it_and_loads(path: Path) -> None:
    config = load_config(TransferConfig, path)
    assert set(config.methods) <= set(METHODS)
    head = path.read_text().split("\n")[0]
    assert f"tools/run_transfer.py --config transfer/{path.name}" in head
    assert (config.data.name in DATASETS) == ("--data" not in head)


OLD_NAMES = """
aircraft_finetune aircraft_finetune_448 aircraft_finetune_tll aircraft_linear
caltech101_finetune caltech101_linear cars_finetune cars_finetune_448 cars_linear
cifar100_finetune cifar100_linear cifar10_finetune cifar10_linear cifar10_subset_finetune
cifar10_subset_linear cinic10_finetune cinic10_linear cub200_finetune cub200_finetune_448
cub200_finetune_tll cub200_linear dtd_finetune dtd_linear flowers102_finetune flowers102_linear
flowers17_finetune flowers17_linear food101_finetune food101_linear imagenet_linear
inat18_finetune pets_finetune pets_linear places205_linear stl10_finetune stl10_linear
svhn_finetune svhn_linear voc07_linear
"""


@pytest.mark.parametrize("name", OLD_NAMES.split())
def test_a_name_of_recipe_and_data_set_means_the_recipe_on_the_data_set(name: str) -> None:
    path, data = recipe_and_data(f"transfer/{name}.yaml", "transfer")
    assert data in DATASETS
    config = load_config(TransferConfig, path, ["data.name", data])
    assert name.startswith(f"{data}_{'linear' if 'linear' in config.methods else 'finetune'}")
    steps = {"cifar10_subset_finetune": 600, "flowers17_finetune": 200}.get(name, 5000)
    assert "finetune" not in config.methods or config.finetune.steps == steps
    assert config.finetune.epochs == (100 if data == "inat18" else 0)
    seen = resolved(config.data)
    small = data.startswith("cifar") or data in ("cinic10", "stl10", "svhn")
    assert seen.augmentation == ("crop_flip" if small else "imagenet")
    sizes = {"stl10": 96, "flowers17": 64}
    size = 448 if name.endswith("448") else sizes.get(data, 32 if small else 224)
    assert seen.image_size == size


def test_a_name_that_is_neither_is_refused() -> None:
    for name in ("transfer/cub200_linaer.yaml", "elsewhere/cub200_linear.yaml"):
        with pytest.raises(InputError, match="neither a file"):
            recipe_and_data(name, "transfer")


def test_a_data_set_must_be_named(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = importlib.import_module("run_transfer")
    command = ["run_transfer.py", "--config", "transfer/linear.yaml", "--weights", str(weights)]
    for more, reason in (
        ((), "name one with --data, of shapes"),
        (("--data", "cub20"), "'cub200'"),
    ):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(InputError, match=reason):
            tool.main()


def test_a_users_own_recipe_does_not_keep_a_shipped_name(
    run_here: Callable[..., list[ResultRow]], weights: Path, tmp_path: Path, tiny_npz: Path
) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text(
        f"_BASE_: {CONFIG_DIR / 'transfer' / 'linear.yaml'}\nmethods: [linear]\n"
        f"data: {{name: npz, root: {tiny_npz}, image_size: 8, workers: 0}}\n"
        "features: {cache: none}\n"
    )
    (same,) = run_here(weights, options=("--config", str(own)))
    own.write_text(own.read_text() + "linear: {log10_c_max: -1.0}\n")
    other = run_here(weights, options=("--config", str(own)))[-1]
    assert same.protocol == "linear_8px"
    assert other.protocol.startswith("linear_8px+")
    assert other.details["overrides"] == {"linear.log10_c_max": -1.0}
    assert same.config != other.config


def test_a_dry_run_announces_the_identity_of_the_rows(
    run_here: Callable[..., list[ResultRow]],
    weights: Path,
    tiny_npz: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What suites compare rows with, and where they look for changed files."""
    methods = ("methods", "[linear, knn]")
    assert run_here(weights, *methods, options=("--dry-run",)) == []
    said = announced(capsys.readouterr().out)
    rows = run_here(weights, *methods)
    assert said is not None
    assert said == {key: [getattr(row, key) for row in rows][: len(said[key])] for key in said}
    assert len(said["config"]) == 2
    assert rows[0].details["read_from"] == [str(tiny_npz)]


def test_other_labels_are_other_data_whatever_the_file_is_called(
    run_here: Callable[..., list[ResultRow]], weights: Path, tiny_npz: Path, tmp_path: Path
) -> None:
    """Neither a mean nor a finished fine-tuning is shared with them."""
    data = tmp_path / "data.npz"
    data.write_bytes(tiny_npz.read_bytes())
    where = ("data.root", str(data), "methods", "[linear, finetune]")
    before = run_here(weights, *where)
    data = data.rename(tmp_path / "copy.npz").rename(tmp_path / "data.npz")
    moved = run_here(weights, *where, "data.workers", "1", options=("--resume",))[2:]
    assert [identity(row) for row in moved] == [identity(row) for row in before]
    assert moved[1].value == before[1].value  # the finished training's
    shuffled = np.roll(np.load(tiny_npz)["y_train"], 1)
    spoilt_npz(tiny_npz, data, y_train=shuffled)
    with pytest.raises(InputError, match="other weights, another seed, recipe or data"):
        run_here(weights, *where, options=("--resume",))
    after = run_here(weights, "data.root", str(data), "methods", "[linear]", "seed", "6")[-1]
    assert after.data.split("/")[1] == before[0].data.split("/")[1]  # tested on the same
    for table in build_tables([before[0], after]):
        assert all(len(line.seeds) == 1 for line in table.lines)


def test_the_tool_runs_from_anywhere_and_exits_with_two_on_bad_input(
    run_tool: Callable[..., subprocess.CompletedProcess[str]],
    weights: Path,
    tiny_npz: Path,
    tmp_path: Path,
) -> None:
    """Two ranks: features shared out, fine-tuning under DDP, one set of rows."""
    config = tmp_path / "tiny.yaml"
    config.write_text(
        f"methods: [linear, finetune]\ndata: {{name: npz, root: {tiny_npz}, image_size: 8}}\n"
        f"features: {{cache: {tmp_path / 'cache'}}}\nlinear: {{c_values: 3}}\n"
        "finetune: {steps: 2, lr: [0.01], weight_decay: [0.0]}\nloop: {batch_size: 8}\n"
    )
    options = ("--config", config, "--weights", weights, "--output", tmp_path / "out")
    done = run_tool("run_transfer.py", *options, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    assert [plain(row) for row in rows] == ["linear_8px", "finetune_8px"]
    assert rows[0].details["world_size"] == 2
    assert done.stdout.count("  tiny/test  top1") == 2
    bad = run_tool("run_transfer.py", *options, "data.limit", "-1", cwd=tmp_path)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: data.limit")
    assert bad.stderr.count("\n") == 1


def test_changed_keys_give_the_rows_of_the_methods_that_read_them_another_name(
    run_here: Callable[..., list[ResultRow]], weights: Path, tmp_path: Path
) -> None:
    first = run_here(weights, "methods", "[linear, knn]", "seed", "3", "features.batch_size", "5")
    changed = run_here(weights, "methods", "[linear, knn]", "linear.c_values", "4")[len(first) :]
    again = run_here(weights, "methods", "[linear]", "linear.c_values", "4", "seed", "2")[-1]
    own, as_shipped = first
    assert own.protocol.startswith("linear_8px+")
    assert own.details["overrides"] == {"linear.c_values": 5}
    assert (as_shipped.protocol, as_shipped.details["overrides"]) == ("knn_5_8px", {})
    linear, knn = changed
    assert linear.protocol.startswith("linear_8px+")
    assert linear.protocol != own.protocol
    assert linear.details["overrides"] == {"linear.c_values": 4}
    assert knn.protocol == "knn_5_8px"
    assert again.protocol == linear.protocol


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    run_here: Callable[..., list[ResultRow]],
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = run_here(weights, "methods", "[linear, knn]", options=("--dry-run",))
    assert rows == []
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert f"# linear, knn of ce ({ARCH}) on " in said
    assert "c_values: 5" in said
    assert "# time: not known" in said
    assert "# disk: next to nothing, " in said
    with pytest.raises(InputError, match="methods names 'nothing'"):
        run_here(weights, "methods", "[nothing]", options=("--dry-run",))
