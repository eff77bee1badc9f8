"""Shards: a storage format and nothing else, and one sentence for whatever is wrong with one."""

import io
import itertools
import json
import os
import pickle
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import load_config
from core.errors import InputError
from data.datasets import DataConfig, open_dataset, report_split, splits_of
from data.loaders import training_loader
from data.pack import PackConfig, pack
from data.readers import shards
from data.sampler import EpochSampler
from models import checkpoint, features
from pretrain.recipe import PretrainConfig
from pretrain.run import pretrain
from tests import dataset_layouts
from tests.faults import TINY
from transfer.data import joined, subset


def _png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 3, 5)).save(file, "png")
    return file.getvalue()


def _tar(path: Path, members: list[tuple[str, bytes]], *more: tarfile.TarInfo) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in more:
            tar.addfile(info)
    return path


def _good(first: int, count: int = 3) -> list[tuple[str, bytes]]:
    numbers = range(first, first + count)
    samples = [[(f"{i:03d}.png", _png(i)), (f"{i:03d}.cls", b"%d" % (i % 2))] for i in numbers]
    return [member for sample in samples for member in sample]


def _open(root: Path, split: str = "train", **keys: Any) -> Any:
    return open_dataset(DataConfig("shards", str(root), image_size=8, **keys), split)


@pytest.fixture
def packed(tmp_path: Path, tiny_npz: Path) -> Path:
    folder = tmp_path / "packed"
    counts = pack(PackConfig(DataConfig("npz", str(tiny_npz)), images_per_shard=10), folder)
    assert counts == {"train": 48, "test": 24}
    return folder


def test_an_epoch_may_read_one_shard_after_the_other(packed: Path, tiny_npz: Path) -> None:
    keys = {"image_size": 16, "shuffle": "shards"}
    data = open_dataset(DataConfig("npz", str(packed), **keys), "train")
    orders = []
    for epoch in range(2):
        parts = []
        for rank in range(2):
            sampler = EpochSampler(48, 12, 1, rank, 2, data.blocks)
            sampler.set_epoch(epoch)
            parts.append([index for step in sampler for _, index in step])
        order = [i for k in range(4) for part in parts for i in part[6 * k : 6 * k + 6]]
        assert sorted(order) == list(range(48))
        shards_in_turn = [int(data.blocks[i]) for i in order]
        changes = sum(a != b for a, b in itertools.pairwise(shards_in_turn))
        assert changes == 4  # of five shards, each read in one go
        assert order[:10] != sorted(order[:10])
        orders.append(order)
    assert orders[0] != orders[1]
    with pytest.raises(InputError, match=r"needs shards, but .*tiny\.npz has none"):
        open_dataset(DataConfig("npz", str(tiny_npz), **keys), "train")
    with pytest.raises(InputError, match="'blocks' is not one of global, shards"):
        open_dataset(DataConfig("npz", str(packed), shuffle="blocks"), "train")


def test_mixed_shards_hold_all_images_with_their_labels_in_a_random_order(
    tmp_path: Path, packed: Path, tiny_npz: Path
) -> None:
    npz = DataConfig("npz", str(tiny_npz))
    pack(PackConfig(npz, images_per_shard=10, mixed=True), tmp_path / "mixed")
    ordered, mixed = (
        open_dataset(DataConfig("npz", str(root), image_size=16), "train")
        for root in (packed, tmp_path / "mixed")
    )
    contents = [[(i.numpy().tobytes(), k) for i, k, _ in data] for data in (ordered, mixed)]
    assert contents[0] != contents[1]
    assert sorted(contents[0]) == sorted(contents[1])


def test_two_splits_join_as_the_sources_do(packed: Path, tiny_npz: Path) -> None:
    both = []
    for root in (tiny_npz, packed):
        cfg = DataConfig("npz", str(root), image_size=16)
        train, test = (open_dataset(cfg, split) for split in ("train", "test"))
        both.append(joined(subset(train, torch.tensor([5, 2]), cfg), test, cfg))
    assert len(both[0]) == len(both[1]) == 26
    for one, two in zip(*both, strict=True):
        assert torch.equal(one[0], two[0])
        assert one[1:] == two[1:]


def test_a_pretraining_ends_at_the_same_weights_from_shards(
    tmp_path: Path, packed: Path, tiny_npz: Path
) -> None:
    models = []
    for name, root in (("files", tiny_npz), ("shards", packed)):
        config = load_config(PretrainConfig, None, ["method", "ctc", *TINY, "data.root", str(root)])
        models.append(checkpoint.load_checkpoint(pretrain(config, tmp_path / name)).model)
    for key, value in models[0].items():
        assert torch.equal(value, models[1][key]), key


def _batches(data: Any, workers: int, rank: int = 0, world: int = 1) -> list[Any]:
    sampler = EpochSampler(len(data), 12, 1, rank, world)
    sampler.set_epoch(3)
    return list(training_loader(data, sampler, workers))


def test_images_labels_and_indices_are_the_sources_in_every_order(
    packed: Path, tiny_npz: Path
) -> None:
    assert [p.name for p in sorted((packed / "train").glob("*.tar"))][-1] == "000004.tar"
    for split in ("train", "test"):
        source, stored = (
            open_dataset(DataConfig("npz", str(root), image_size=16), split, train=True, seed=5)
            for root in (tiny_npz, packed)
        )
        assert stored.classes == source.classes == ["red", "green", "blue"]
        assert torch.equal(stored.labels, source.labels)
        for index in range(len(source)):
            for key in (index, (2, index)):
                image, label, position = stored[key]
                assert torch.equal(image, source[key][0])
                assert (label, position) == source[key][1:]
    for workers, world in ((0, 1), (2, 1), (0, 2)):
        for rank in range(world):
            ours = _batches(pickle.loads(pickle.dumps(stored)), workers, rank, world)
            theirs = _batches(source, 0, rank, world)
            for one, two in zip(ours, theirs, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_held_out_part_and_a_limit_are_the_sources_too(packed: Path, tiny_npz: Path) -> None:
    for keys in ({"val_fraction": 0.25}, {"limit": 7}, {"val_fraction": 0.25, "limit": 7}):
        one, two = (
            open_dataset(DataConfig("npz", str(root), image_size=16, **keys), "train")
            for root in (tiny_npz, packed)
        )
        assert len(one) == len(two)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True))


def test_a_catalogued_data_set_in_shards_keeps_its_name_files_and_facts(tmp_path: Path) -> None:
    dataset_layouts.BUILDERS["cub200"](tmp_path / "cub")
    cfg = DataConfig("cub200", str(tmp_path / "cub"), partial=True)
    pack(PackConfig(cfg), tmp_path / "shards")
    in_shards = DataConfig("cub200", str(tmp_path / "shards"), partial=True)
    assert splits_of(in_shards) == ["train", "test"]
    assert report_split(in_shards) == "test"
    for split in ("train", "test"):
        one, two = open_dataset(cfg, split), open_dataset(in_shards, split)
        assert (one.name, one.classes, one.metric) == (two.name, two.classes, two.metric)
        files = [path.read_bytes() for path in one.source.images]
        assert files == [two.source.images.read(i) for i in range(len(two))]
        assert one.labels.tolist() == two.labels.tolist()
    with pytest.raises(InputError, match="5,994"):  # the official counts are looked at as ever
        open_dataset(DataConfig("cub200", str(tmp_path / "shards")), "train")
    with pytest.raises(InputError, match="shards of cub200: set"):
        open_dataset(DataConfig("cars", str(tmp_path / "shards")), "train")
    assert (tmp_path / "shards/train/000000.tar").read_bytes()[:3] == b"000"


def test_shards_that_webdataset_wrote_are_read_and_ours_by_webdataset(
    tmp_path: Path, packed: Path
) -> None:
    wds = pytest.importorskip("webdataset")
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (25, 8, 8, 3), dtype=np.uint8)
    pattern = str(tmp_path / "wds/train-%06d.tar")
    (tmp_path / "wds").mkdir()
    with wds.ShardWriter(pattern, maxcount=10, verbose=0) as writer:
        for i, image in enumerate(images):
            label = {"cls": i % 4} if i % 2 else {"json": {"label": i % 4, "caption": "x"}}
            writer.write({"__key__": f"a/sample{i:03d}", "png": image, **label})
    data = _open(tmp_path / "wds")
    assert len(data) == 25
    assert data.classes == ["0", "1", "2", "3"]
    for i, (image, label, _) in enumerate(data):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), images[i])
        assert label == i % 4
    ours = sorted(str(path) for path in (packed / "train").glob("*.tar"))
    theirs = wds.WebDataset(ours, shardshuffle=False).decode("rgb8").to_tuple("png", "cls")
    opened = open_dataset(DataConfig("npz", str(packed), image_size=16), "train")
    read = list(theirs)
    assert len(read) == 48
    for (image, label), (expected, number, _) in zip(read, opened, strict=True):
        assert np.array_equal(image, expected.permute(1, 2, 0).numpy())
        assert int(label) == number


def test_numbers_in_the_names_of_shards_count_as_numbers(tmp_path: Path) -> None:
    for k in (10, 9, 2):
        _tar(tmp_path / f"part-{k}.tar", _good(k * 3))
    data = _open(tmp_path)
    assert splits_of(DataConfig("shards", str(tmp_path))) == ["train"]
    assert [int(image[0, 0, 0]) for image, _, _ in data] == [*range(6, 9), *range(27, 33)]


def test_the_index_is_made_once_and_a_changed_shard_is_noticed(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_: Any) -> Any:
        raise AssertionError("the headers are read again")

    opened = lambda: open_dataset(DataConfig("npz", str(packed)), "train")  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_make", never)
        patch.setattr(shards, "_sha256", never)
        opened()
    shard = packed / "train" / "000002.tar"
    os.utime(shard, ns=(1, 1))  # touched, as by a copy: its content is compared
    with pytest.warns(UserWarning, match="same content"):
        before = features.dataset_signature(opened())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert features.dataset_signature(opened()) == before  # and its new time is noted
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"000002\.tar has changed .* remove .*train\.index\.npz"):
        opened()
    (packed / "train.index.npz").unlink()
    assert features.dataset_signature(opened()) != before
    shard.rename(shard.with_name("000009.tar"))
    with pytest.raises(InputError, match=r"000002\.tar was still there when"):
        opened()


def test_an_index_that_is_damaged_or_cannot_be_written_is_no_mystery(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = packed / "train.index.npz"
    index.write_bytes(index.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"train\.index\.npz is damaged .* remove it"):
        open_dataset(DataConfig("npz", str(packed)), "train")
    index.unlink()

    def read_only(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shards, "atomic_file", read_only)
    with pytest.warns(UserWarning, match="cannot be written"):
        assert len(open_dataset(DataConfig("npz", str(packed)), "train")) == 48


LINK = tarfile.TarInfo("001.png")
LINK.type, LINK.linkname = tarfile.SYMTYPE, "/etc/passwd"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut in a member": (
        lambda p: _tar(p, _good(0)).write_bytes(p.read_bytes()[:900]),
        r"bad\.tar is truncated",
    ),
    "cut between members": (
        lambda p: _tar(p, _good(0)).write_bytes(p.read_bytes()[:2048]),
        r"bad\.tar is truncated, damaged or no \.tar \(no end mark after byte 2048\)",
    ),
    "a header overwritten": (
        lambda p: _tar(p, _good(0)).write_bytes(
            p.read_bytes()[:2048] + b"x" * 512 + p.read_bytes()[2560:]
        ),
        r"bad\.tar is truncated, damaged",
    ),
    "no tar": (lambda p: p.write_bytes(b"hello" * 300), r"bad\.tar is truncated, damaged"),
    "compressed": (
        lambda p: tarfile.open(p, "w:gz").close(),
        r"bad\.tar is truncated, damaged or no \.tar",
    ),
    "empty": (lambda p: _tar(p, []), r"bad\.tar holds no images"),
    "no label": (
        lambda p: _tar(p, [*_good(0), ("x.png", _png(1))]),
        r"x\.png in shard .*bad\.tar has no label; it needs x\.cls",
    ),
    "no image": (
        lambda p: _tar(p, [*_good(0), ("x.cls", b"1")]),
        r"x\.cls in shard .*bad\.tar has no image",
    ),
    "json without label": (
        lambda p: _tar(p, [("x.png", _png(1)), ("x.json", b"{}")]),
        r"x\.png in shard .*bad\.tar has no label",
    ),
    "a word": (
        lambda p: _tar(p, [("x.png", _png(1)), ("x.cls", b"dog")]),
        r"x\.cls in shard .*bad\.tar holds 'dog', not a label 0, 1, 2",
    ),
    "below 0": (
        lambda p: _tar(p, [("x.png", _png(1)), ("x.json", b'{"label": -1}')]),
        r"x\.json in shard .*bad\.tar holds -1, not a label",
    ),
    "no JSON": (
        lambda p: _tar(p, [("x.png", _png(1)), ("x.json", b"{")]),
        r"x\.json in shard .*bad\.tar is not JSON",
    ),
    "a key twice": (
        lambda p: _tar(p, [*_good(0), *_good(2)]),
        r"002\.png stands twice in shard .*bad\.tar",
    ),
    "two images of a key": (
        lambda p: _tar(p, [*_good(0), ("001.jpg", b"")]),
        r"001\.jpg stands twice in shard",
    ),
    "a link": (
        lambda p: _tar(p, [], LINK),
        r"001\.png in shard .*bad\.tar is a link",
    ),
    "a copy of another": (lambda p: _tar(p, _good(100)), r"a\.tar and .*bad\.tar have the same"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_shard_is_one_sentence_that_names_it(tmp_path: Path, kind: str) -> None:
    _tar(tmp_path / "train/a.tar", _good(100))
    make, sentence = BAD[kind]
    make(tmp_path / "train/bad.tar")
    with pytest.raises(InputError, match=sentence) as caught:
        _open(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_decode_is_named_with_its_shard(
    tmp_path: Path, workers: int
) -> None:
    members = _good(0, 9)
    members[8] = ("004.png", _png(4)[:50])
    _tar(tmp_path / "a.tar", members[:12])
    _tar(tmp_path / "b.tar", members[12:])
    data = _open(tmp_path)
    with pytest.raises(InputError, match=r"004\.png in shard .*a\.tar does not decode") as caught:
        list(training_loader(data, EpochSampler(9, 3, 0), workers))
    assert "\n" not in str(caught.value)
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:540])
    with pytest.raises(InputError, match=r"a\.tar ends inside image"):
        data[0]
    (tmp_path / "a.tar").unlink()
    with pytest.raises(InputError, match=r"a\.tar cannot be read"):
        data[0]


def test_classes_are_those_of_train_unless_they_are_named(tmp_path: Path) -> None:
    _tar(tmp_path / "train/0.tar", _good(0))
    _tar(tmp_path / "test/0.tar", _good(10, 1))
    assert _open(tmp_path, "test").classes == ["0", "1"]
    (tmp_path / shards.ABOUT).write_text(json.dumps({"classes": ["cat"]}))
    with pytest.raises(InputError, match="a label 1 in train, but 1 classes"):
        _open(tmp_path)
    (tmp_path / shards.ABOUT).write_text(json.dumps({"classes": ["cat", "dog", "eel"]}))
    assert _open(tmp_path, "test").classes == ["cat", "dog", "eel"]
    (tmp_path / shards.ABOUT).write_text("[]")
    with pytest.raises(InputError, match=r"shards\.json must be JSON"):
        _open(tmp_path)


def test_packing_refuses_what_it_cannot_keep_and_leaves_nothing(
    tmp_path: Path, tiny_npz: Path, call_tool: Callable[..., tuple[int, str, str]]
) -> None:
    dataset_layouts.voc07(tmp_path / "voc")
    voc = DataConfig("voc07", str(tmp_path / "voc"), partial=True)
    with pytest.raises(InputError, match="several labels"):
        pack(PackConfig(voc), tmp_path / "out" / "voc")
    npz = DataConfig("npz", str(tiny_npz))
    with pytest.raises(InputError, match="images_per_shard is 0"):
        pack(PackConfig(npz, 0), tmp_path / "out" / "npz")
    assert not (tmp_path / "out").exists()
    words = (tmp_path / "out", "data.name", "npz", "data.root", tiny_npz)
    status, said, _ = call_tool("make_shards.py", *words, "images_per_shard", "20")
    assert status == 0
    assert "48 images of train, 24 images of test" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "shards.json", "test", "test.index.npz", "train", "train.index.npz",
    ]  # fmt: skip
    status, _, said = call_tool("make_shards.py", *words)
    assert status == 2
    assert said.startswith("error: ")
    assert "is there already" in said
