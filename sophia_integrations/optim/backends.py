"""Which kernel updates which tensors.

A backend is a module with `update`, in the words of `eager.update`; a fast one also has `takes`, which says what
tensors it can be given, and `DTYPES`, of the parameters. What no fast one takes is the eager one's.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import native, triton_step
from .native_library import library

CHOSEN = ("cpu",)
"""Kinds of devices whose fast backend is chosen unasked. Triton's waits to be asked for with `fused=True`: so far only
its interpreter has run it."""


def fast_backend(device_type: str) -> tuple[ModuleType | None, str]:
    """The fast backend of a kind of device; or None, and why there is none, as half a sentence."""
    if device_type == "cpu":
        found, reason = library()
        return (native, "") if found is not None else (None, reason)
    if device_type == "cuda":
        return (triton_step, "") if triton_step.available() else (None, "on a GPU it needs the package triton")
    return None, f"there is no fused step for {device_type}"


def chosen_backend(device_type: str, fused: bool | None) -> ModuleType | None:
    """The fast backend that `fused` chooses for a kind of device; None for torch operations."""
    wanted = device_type in CHOSEN if fused is None else fused
    return fast_backend(device_type)[0] if wanted else None


def require_fused(param: Tensor) -> None:
    """Raise ValueError where `fused=True` asks for what this parameter cannot have."""
    fast, reason = fast_backend(param.device.type)
    if fast is None:
        raise ValueError(f"fused=True: {reason}. Leave fused out, and the step runs in torch operations.")
    if param.dtype not in fast.DTYPES:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in fast.DTYPES)
        raise ValueError(
            f"fused=True updates {names} parameters on {param.device.type}, got {param.dtype}: leave fused out, and "
            "what cannot be fused runs in torch operations."
        )
