"""The paper calculation counts what the modules hold, and the benchmarks compare like with like."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import ctc
from benchmarks.scaling import SETTINGS, Setting, instance_cost, preservation_cost, table
from pretrain.memory import DTYPES
from pretrain.terms import BankOptions, InstanceTerm, PreservationOptions, PreservationTerm


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_is_that_of_the_banks_and_groups(dtype: str) -> None:
    setting, options = Setting(300, 1, 4, dtype, dim=8, negatives=20), BankOptions(300, dtype)
    spare = 8 * torch.tensor([], dtype=DTYPES[dtype]).element_size()  # one row a bank
    instance = InstanceTerm(5, 8, 0.1, 0.9, options)
    stub: Any = nn.Linear(1, 1)
    stub.num_features = 5
    preserving = PreservationOptions(dim=8, negatives=20)
    preservation = PreservationTerm(stub, torch.arange(300) % 3, preserving, options)
    held = {
        name: buffer.nbytes
        for name, buffer in preservation.named_buffers()
        if name.endswith(("storage", "groups"))
    }
    assert instance_cost(setting).memory == instance.bank.storage.nbytes - spare
    assert preservation_cost(setting).memory == sum(held.values()) - 2 * spare


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
    baseline, ours, lines = measure(ctc.Sizes(images=700, negatives=150, repeats=1))
    assert baseline > 0
    assert ours > 0
    (said,) = (line for line in lines if "relative error" in line)
    errors = [float(x) for x in re.findall(r"\d\.\de[-+]\d\d", said)]
    assert len(errors) == 3
    assert max(errors) < 1e-4
    assert errors[0] < 1e-6
