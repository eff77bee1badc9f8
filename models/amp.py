"""Mixed precision by one word: none, bf16, fp16, or auto."""

import torch

from core.errors import InputError

DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHOICES = (*DTYPES, "auto")


def resolve(amp: str, device: torch.device) -> str:
    """Return none, bf16 or fp16; ``auto`` is bf16 where the device computes in it, else none.

    Raises:
        InputError: another word.
    """
    if amp not in CHOICES:
        raise InputError(f"amp {amp!r} is not one of {', '.join(CHOICES)}")
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "none"
    return "bf16" if _cpu_has_bf16() else "none"


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass in that precision."""
    name = resolve(amp, device)
    return torch.autocast(device.type, DTYPES[name], enabled=name != "none")


def _cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 instructions (emulated ones are slower than float32)."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # newer than the oldest torch we take
    capabilities = ask() if ask else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
