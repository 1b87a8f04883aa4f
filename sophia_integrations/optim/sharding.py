"""Sharded parameters (DTensor): every coordinate is updated where it lies, on this rank's shard."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

WHOLE = (Tensor, torch.nn.Parameter)
"""The types of tensors that lie in one piece of memory of this process: torch's own, no subclass."""


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; any other tensor itself."""
    return tensor if type(tensor) in WHOLE or not hasattr(tensor, "to_local") else tensor.to_local()


def sum_over_shards(value: Tensor, param: Tensor) -> Tensor:
    """The sum over ranks of a value that each computed on its shard of `param`; all ranks must call this together."""
    if not hasattr(param, "to_local"):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    placements = [Partial() if isinstance(p, Shard) else Replicate() for p in param.placements]
    return DTensor.from_local(value, param.device_mesh, placements).full_tensor()


def is_distributed(group: dist.ProcessGroup | None) -> bool:
    """Whether `group` (None: the default group) has several ranks in this process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def equal_on_all_ranks(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Make `tensor` on every rank of `group` the first rank's, bit for bit; sent only where a checksum differs.

    Ranks compute it from equal gradients, but not always on equal processors. All ranks must call this together.
    """
    if not is_distributed(group):
        return
    bits = tensor.detach().contiguous().view(-1).view(torch.int32).long()
    checksum = (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()
    extremes = torch.stack([checksum, -checksum])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    if int(extremes[0]) != -int(extremes[1]):
        whole = tensor.contiguous()
        dist.broadcast(whole, src=dist.get_global_rank(group, 0) if group is not None else 0, group=group)
        tensor.copy_(whole)


def sharding_of(param: Tensor) -> object:
    """What parameters that are sharded alike have in common; None for whole ones."""
    if type(param) in WHOLE or not hasattr(param, "to_local"):
        return None
    return param.device_mesh, tuple(param.placements)


class SumOverShards:
    """A sum over parameters and, where these are sharded, over ranks; one collective for all that are sharded alike."""

    def __init__(self) -> None:
        self._sums: dict[object, tuple[Tensor, Tensor]] = {}

    def add(self, param: Tensor, value: Tensor) -> None:
        """Add what was computed on this rank's shard of `param`; values have one shape."""
        key = sharding_of(param) or value.device
        held = self._sums.get(key)
        self._sums[key] = (param, value.clone() if held is None else held[1].add_(value))

    def total(self) -> Tensor | None:
        """The sum, on the CPU, so this waits for the device; None when nothing was added. All ranks must call it."""
        sums = [sum_over_shards(value, param).cpu() for param, value in self._sums.values()]
        return torch.stack(sums).sum(0) if sums else None
