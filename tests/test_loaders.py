"""Batches: the same from any worker and on any rank, and errors that stay one sentence."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import InputError
from data.datasets import DataConfig, open_dataset
from data.loaders import evaluation_loader, training_loader
from data.sampler import EpochSampler


@pytest.fixture
def data(tiny_npz):
    cfg = DataConfig(name="npz", root=str(tiny_npz), image_size=16)
    return open_dataset(cfg, "train", train=True, seed=3)


def _epochs(data, workers, batch_size=12, rank=0, world=1):
    sampler = EpochSampler(len(data), batch_size, 1, rank, world)
    loader = training_loader(data, sampler, workers)
    batches = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert len(loader) == 4
        batches += list(loader)
    return batches


def test_workers_give_what_the_main_process_gives(data):
    alone, workers = _epochs(data, 0), _epochs(data, 2)
    assert len(alone) == len(workers) == 8
    for batch, other in zip(alone, workers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))
    images, labels, index = alone[0]
    assert (images.shape, images.dtype) == ((12, 3, 16, 16), torch.uint8)
    assert torch.equal(labels, data.labels[index])


def test_ranks_together_give_the_images_of_one_process(data):
    alone = _epochs(data, 0)
    parts = [_epochs(data, 0, rank=rank, world=3) for rank in range(3)]
    for whole, *shares in zip(alone, *parts, strict=True):
        for k in range(3):
            assert torch.equal(whole[k], torch.cat([share[k] for share in shares]))


def test_loading_resumes_inside_an_epoch(data):
    whole = _epochs(data, 0)
    sampler = EpochSampler(len(data), 12, 1)
    sampler.set_epoch(1, start=2)
    rest = list(training_loader(data, sampler))
    assert len(rest) == 2
    for batch, other in zip(whole[6:], rest, strict=True):
        assert torch.equal(batch[0], other[0])


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_covers_every_image_once_and_unaugmented(data, world):
    seen = []
    for rank in range(world):
        for images, labels, index in evaluation_loader(data, 5, 0, rank, world):
            assert torch.equal(labels, data.labels[index])
            assert torch.equal(images[0], data[int(index[0])][0])
            seen += index.tolist()
    assert sorted(seen) == list(range(len(data)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_decode_stops_with_its_name(tmp_path, workers):
    for k in range(6):
        path = tmp_path / "train" / "abc"[k % 3] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    broken = tmp_path / "train" / "b" / "4.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    data = open_dataset(DataConfig(name="folder", root=str(tmp_path), image_size=16), "train")
    with pytest.raises(InputError) as caught:
        list(evaluation_loader(data, 2, workers))
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


class _Threads:
    def __len__(self):
        return 2

    def __getitem__(self, key):
        return torch.get_num_threads(), 0, key


def test_each_worker_keeps_to_one_thread():
    for threads, _, _ in evaluation_loader(_Threads(), 1, workers=2):
        assert threads.tolist() == [1]


def test_negative_workers_are_refused(data):
    with pytest.raises(InputError, match="workers is -1"):
        evaluation_loader(data, 2, workers=-1)


def test_dataset_can_travel_to_another_process(data):
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[1, 5][0], data[1, 5][0])
