"""Sharded parameters (DTensor): every coordinate is updated where it lies, on this rank's shard."""

from __future__ import annotations

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sum_over_shards(value: Tensor, param: Tensor) -> Tensor:
    """The sum over ranks of a value that each computed on its shard of `param`; all ranks must call this together."""
    if not hasattr(param, "to_local"):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    placements = [Partial() if isinstance(p, Shard) else Replicate() for p in param.placements]
    return DTensor.from_local(value, param.device_mesh, placements).full_tensor()
