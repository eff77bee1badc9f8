"""Checkpoints: whole or absent, plain, and refused with a sentence when they are not."""

import argparse
import collections
import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import InputError, NonFiniteLoss
from models import checkpoint
from models.resnet import create_model

FACTS = checkpoint.Facts(
    "resnet18_cifar_w16", 3, "ce", 2, 1, "tiny", 16, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "epoch_0002.pth"
    model = create_model("resnet18_cifar_w16", 3)
    checkpoint.save_checkpoint(path, model.state_dict(), FACTS)
    return path


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return (Path.touch, (self.sentinel,))


def test_a_checkpoint_gives_back_weights_and_facts_and_reads_without_our_code(saved: Path) -> None:
    loaded = checkpoint.load_checkpoint(saved)
    assert loaded.facts == FACTS
    create_model("resnet18_cifar_w16", 3).load_state_dict(loaded.model)
    plain = torch.load(saved, weights_only=True)  # no allow-list: any torch can read it
    assert plain["facts"]["arch"] == "resnet18_cifar_w16"


def test_wrapper_prefixes_are_cleaned_when_saved(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    checkpoint.save_checkpoint(path, {"module._orig_mod.fc.weight": torch.ones(2)}, FACTS)
    assert list(checkpoint.load_checkpoint(path).model) == ["fc.weight"]


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved: Path, kept: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    with pytest.raises(InputError, match=r"epoch_0002\.pth"):
        checkpoint.load_checkpoint(saved)


def test_a_flipped_bit_in_a_weight_is_noticed(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    with pytest.raises(InputError, match="corrupt"):
        checkpoint.load_checkpoint(saved)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, legacy: bool) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "bomb.pth"
    content = {"model": {"w": torch.ones(2)}, "extra": Bomb(sentinel)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"code or foreign objects.*\(getattr\)"):
        checkpoint.load_plain(path)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"bomb\.pth"):
        checkpoint.load_plain(path)
    assert not sentinel.exists()


def test_the_settings_that_moco_saves_beside_its_weights_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "moco.pth"
    state = collections.OrderedDict(w=torch.ones(2))
    torch.save({"args": argparse.Namespace(lr=0.03), "state_dict": state}, path)
    assert checkpoint.load_plain(path)["args"].lr == 0.03


def test_what_is_not_ours_is_sent_to_the_converter(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pth"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(InputError, match="convert_to_d2"):
        checkpoint.load_checkpoint(path)
    with pytest.raises(InputError, match="does not exist"):
        checkpoint.load_checkpoint(tmp_path / "missing.pth")


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match="w is not finite"):
        checkpoint.save_checkpoint(tmp_path / "c.pth", {"w": torch.tensor([1.0, torch.nan])}, FACTS)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file_and_says_so(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left"):
        checkpoint.save_checkpoint(saved, {"w": torch.ones(2)}, FACTS)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_interrupted_save_leaves_no_partial_file(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(KeyboardInterrupt), checkpoint.atomic_file(saved) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_the_newest_valid_of_several_is_found(saved: Path) -> None:
    broken = saved.with_name("epoch_0003.pth")
    broken.write_bytes(saved.read_bytes()[:-100])
    found = checkpoint.newest_valid([broken, saved], checkpoint.load_checkpoint)
    assert found is not None
    assert found[0] == saved
    assert checkpoint.newest_valid([broken], checkpoint.load_checkpoint) is None
