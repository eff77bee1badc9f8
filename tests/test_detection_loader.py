"""The stream of training batches: entered anywhere, the same; grouped; shared out over ranks."""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.samplers import TrainingSampler

from detection import cfg as configs
from detection import data as datasets
from detection import loader
from tests.detection_tiny import CONFIG, SMALL, write_pair


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pair = datasets.open_pair(*write_pair(tmp_path_factory.mktemp("data") / "tiny"), split="train")
    datasets.register([pair])
    cfg = configs.load_cfg(CONFIG, [*SMALL, "SEED", "3", "SOLVER.IMS_PER_BATCH", "3"])
    cfg.DATASETS.TRAIN = (pair.catalog_name,)
    return cfg


def _same(one: list[list[torch.Tensor]], other: list[list[torch.Tensor]]) -> bool:
    pairs = zip(chain.from_iterable(one), chain.from_iterable(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _pixels(batches: Iterator[list[dict[str, Any]]], count: int) -> list[list[torch.Tensor]]:
    return [[item["image"] for item in batch] for batch in islice(batches, count)]


def test_a_stream_entered_later_goes_on_as_if_from_the_start(cfg: Any) -> None:
    records = loader.training_records(cfg)
    whole = _pixels(iter(loader.EndlessBatches(cfg, records)), 6)
    np.random.rand(7)  # noqa: NPY002  whatever was drawn meanwhile
    rest = _pixels(iter(loader.EndlessBatches(cfg, records).again(start=4)), 2)
    assert _same(whole[4:], rest)


def test_loading_processes_do_not_change_the_stream(cfg: Any) -> None:
    records = loader.training_records(cfg)
    other = cfg.clone()
    other.DATALOADER.NUM_WORKERS = 2
    one = _pixels(iter(loader.EndlessBatches(cfg, records)), 3)
    two = _pixels(iter(loader.EndlessBatches(other, records)), 3)
    assert _same(one, two)


def test_augmentation_varies_and_the_seed_rules_it(cfg: Any) -> None:
    records = loader.training_records(cfg)
    dataset = loader.NumberedDataset(records, loader.Mapper(cfg, True), seed=3)
    first = [dataset[position, 0]["image"] for position in range(12)]
    assert len({tuple(image.shape) for image in first}) == 2  # both training sizes
    assert torch.equal(first[5], dataset[5, 0]["image"])
    other = loader.NumberedDataset(records, loader.Mapper(cfg, True), seed=4)
    assert any(not torch.equal(first[p], other[p, 0]["image"]) for p in range(12))


def test_a_batch_holds_one_orientation_and_an_epoch_misses_no_image() -> None:
    wide = [True, False] * 5
    batches = loader.GroupedBatches(TrainingSampler(10, seed=1), wide, size=5)
    found = list(islice(batches, 4))
    assert all(len({wide[index] for _, index in batch}) == 1 for batch in found)
    assert sorted(index for batch in found[:2] for _, index in batch) == list(range(10))
    positions = [position for batch in found for position, _ in batch]
    assert len(set(positions)) == len(positions)


def test_ranks_share_the_stream_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    from detectron2.utils import comm

    drawn = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        batches = loader.GroupedBatches(TrainingSampler(8, seed=1), None, size=2)
        drawn.append([item for batch in islice(batches, 2) for item in batch])
    assert sorted(index for share in drawn for _, index in share) == list(range(8))
    assert sorted(position for share in drawn for position, _ in share) == list(range(8))


def test_seeding_an_item_leaves_the_global_generators_alone() -> None:
    np.random.seed(0)  # noqa: NPY002
    expected = np.random.rand(3)  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    with loader.seeded(1, 2):
        np.random.rand()  # noqa: NPY002
    assert np.array_equal(np.random.rand(3), expected)  # noqa: NPY002


def test_records_are_detectron2s_and_changing_one_changes_no_other_look(cfg: Any) -> None:
    plain = get_detection_dataset_dicts(cfg.DATASETS.TRAIN)
    records = loader.training_records(cfg)
    assert list(records) == plain
    assert records.wide.tolist() == [r["width"] > r["height"] for r in plain]
    records[0]["annotations"].clear()
    assert (records[0], records[-1], records[1:3]) == (plain[0], plain[-1], plain[1:3])
    with pytest.raises(IndexError):
        records[len(plain)]


def test_the_batches_of_precise_bn_and_of_a_resume_hold_no_second_copy(cfg: Any) -> None:
    batches = loader.EndlessBatches(cfg, loader.training_records(cfg))
    assert batches.again(start=3, workers=0).dataset is batches.dataset


SHARED = """
import glob
import os
import tempfile

import detection
from core import dist
from detection import loader
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

dist.init("cpu")
comm.create_local_process_group(dist.world_size())
rank = dist.rank()
loads = []

def load():
    loads.append(rank)
    return [{"width": n, "height": 5, "annotations": [{"iscrowd": 0}]} for n in range(9)]

DatasetCatalog.register("counted_train", load)
from detection.cfg import default_cfg

cfg = default_cfg()
cfg.DATASETS.TRAIN = ("counted_train",)
records = loader.training_records(cfg)
assert [record["width"] for record in records] == list(range(9))
assert loads == ([0] if rank == 0 else []), loads
mapped = [line.split()[4] for line in open("/proc/self/maps") if "records-" in line]
inodes = comm.all_gather(mapped)
assert inodes[0] and inodes[0] == inodes[1], inodes  # one file in the memory of both
assert not glob.glob(os.path.join(tempfile.gettempdir(), "records-*"))
dist.shutdown()
"""


def test_one_rank_of_a_machine_loads_and_all_map_the_same_memory(
    run_ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run_ranks(SHARED, 2)
