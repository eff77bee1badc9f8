"""The paper calculation counts what the modules hold, and the benchmarks compare like with like."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import ctc
from benchmarks.scaling import SETTINGS, Setting, instance_cost, preservation_cost, table
from core.config import CONFIG_DIR, load_config
from pretrain.memory import DTYPES
from pretrain.negatives import Drawer
from pretrain.objectives import InstanceTerm, PreservationTerm
from pretrain.recipe import CTCConfig, PretrainConfig


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_is_that_of_the_banks_and_classes(dtype: str) -> None:
    setting = Setting(300, 1, 4, dtype, dim=8, negatives=20)
    config = CTCConfig(dim1=8, dim2=8, num_negatives=20, bank_dtype=dtype)
    spare = 8 * torch.tensor([], dtype=DTYPES[dtype]).element_size()  # one row a bank
    instance = InstanceTerm(5, 300, config)
    stub: Any = nn.Linear(1, 1)
    stub.head_hidden_size = 5
    preservation = PreservationTerm(stub, torch.arange(300) % 3, config)
    held = {
        name: buffer.nbytes
        for name, buffer in preservation.named_buffers()
        if name.endswith(("storage", "classes"))
    }
    assert instance_cost(setting).memory == instance.bank.storage.nbytes - spare
    assert preservation_cost(setting).memory == sum(held.values()) - 2 * spare


def test_the_table_counts_the_pool_of_the_shipped_recipe() -> None:
    config = load_config(PretrainConfig, CONFIG_DIR / "pretrain/ctc_imagenet.yaml").ctc
    setting = SETTINGS[0]
    drawer = Drawer(config, torch.arange(setting.images) % 1000, seed=1)
    assert config.num_negatives == setting.negatives
    assert drawer.pool == setting.pool


def test_sharding_divides_memory_and_rows_read_but_not_the_work() -> None:
    for cost in (instance_cost, preservation_cost):
        whole, parts = cost(Setting(8000, 4, 2)), cost(Setting(8000, 4, 2, sharded=True))
        assert parts.memory * 4 == whole.memory
        assert parts.read * 4 == whole.read
        assert parts.flops == whole.flops
        assert parts.received > whole.received
    assert table(SETTINGS).count("\n") == len(SETTINGS) + 1


@pytest.mark.parametrize("measure", [ctc.stage2, ctc.stage2_shared])
def test_baseline_and_ours_compute_the_same_loss(measure: Any) -> None:
    baseline, ours, lines = measure(700, 150, 1)
    assert baseline > 0
    assert ours > 0
    (said,) = (line for line in lines if "relative error" in line)
    errors = [float(x) for x in re.findall(r"\d\.\de[-+]\d\d", said)]
    assert len(errors) == 3
    assert max(errors) < 1e-4
    assert errors[-1] < 1e-6  # ours
