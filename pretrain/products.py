"""The two matrix products of every kernel here, by the fastest exact route that torch offers.

Shapes: b queries, C keys, D embedding.

On CPUs torch multiplies float32 matrices by MKL, which on AMD processors leaves AVX-512 unused;
oneDNN, which torch carries too, is about twice as fast there, and as exact. torch has no public
call that picks it for float32 without also lowering the precision, so this asks for the operator
that torch.compile uses, where it exists. The choice depends on the machine alone, never on timing:
a resumed run must compute what the first one did.
"""

import torch
from torch import Tensor

_ONEDNN = (
    torch.ops.mkldnn._linear_pointwise
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)


def similarities(queries: Tensor, keys: Tensor) -> Tensor:
    """Return q·k for every pair, b×C, from b×D and C×D."""
    return _times_transposed(queries, keys)


def weighted_sums(weights: Tensor, keys: Tensor) -> Tensor:
    """Return Σ_c w_c·k_c, b×D, from b×C and C×D."""
    return _times_transposed(weights, keys.T)


def _times_transposed(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right.T."""
    is_plain = left.dtype == torch.float32 and left.device.type == "cpu"
    if _ONEDNN is not None and is_plain and left.numel() and right.numel():
        return _ONEDNN(left, right, None, "none", [], "")
    return left @ right.T
