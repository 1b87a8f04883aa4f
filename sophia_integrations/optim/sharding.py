"""Sharded parameters (DTensor): every coordinate is updated where it lies, on this rank's shard."""

from __future__ import annotations

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(value: Tensor) -> Tensor:
    """A DTensor gathered from all ranks, which must call this together; any other tensor itself."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
