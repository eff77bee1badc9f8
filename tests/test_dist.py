"""One process and many: the helpers are no-ops alone, and agree with a joined computation."""

from collections.abc import Callable

import pytest
import torch

from core import dist
from core.errors import LostRank

RANKS = """
import torch
from core import dist
device = dist.init("cpu")
r, w = dist.rank(), dist.world_size()
assert w == 2 and dist.is_main() == (r == 0) and device.type == "cpu"
mine = torch.arange(4).reshape(2, 2) + 10 * r
joined = dist.gather_rows(mine)
assert joined.tolist() == [[0, 1], [2, 3], [10, 11], [12, 13]], joined
assert dist.all_sum(torch.tensor([1.0 + r])).item() == 3.0
kept = torch.tensor([1.0 + r])
assert dist.all_mean(kept).item() == 1.5 and kept.item() == 1.0 + r
assert dist.broadcast_object({"rank": r}) == {"rank": 0}
dist.barrier()
dist.shutdown()
assert dist.world_size() == 1
"""


def test_two_ranks_gather_in_rank_order_and_leave_their_inputs_alone(
    run_ranks: Callable[..., None],
) -> None:
    run_ranks(RANKS, 2, torchrun=True)


def test_alone_every_helper_is_the_identity() -> None:
    tensor = torch.ones(2, 3)
    assert dist.gather_rows(tensor) is tensor
    assert dist.all_sum(tensor) is tensor
    assert dist.all_mean(tensor) is tensor
    assert dist.broadcast_object("x") == "x"
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1", True),
        ("Application timeout caused pair closure", True),  # a collective after one that timed out
        ("Timed out waiting 8000ms for send operation to complete", True),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_only_what_a_lost_rank_causes_is_called_one(
    monkeypatch: pytest.MonkeyPatch, said: str, lost: bool
) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    with pytest.raises(LostRank if lost else RuntimeError) as caught, dist.naming_lost_ranks():
        raise RuntimeError(said)
    assert isinstance(caught.value, LostRank) == lost
