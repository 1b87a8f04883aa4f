"""Small tensors on their way to the host: together, so that the host waits for the device once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of `tensors` on the CPU, by one transfer, and one wait, for each device."""
    found: dict[int, Tensor] = {}
    for device in dict.fromkeys(t.device for t in tensors):
        members = [i for i, t in enumerate(tensors) if t.device == device]
        parts = [tensors[i].detach().contiguous().flatten().view(torch.uint8) for i in members]
        packed = torch.cat(parts).cpu()
        for i, part in zip(members, packed.split([len(p) for p in parts]), strict=True):
            found[i] = part.clone().view(tensors[i].dtype).view(tensors[i].shape)
    return [found[i] for i in range(len(tensors))]


def numbers(values: Sequence[Tensor | float]) -> list[float]:
    """Numbers, and tensors of one element, as numbers on the host."""
    there = iter(on_host([value for value in values if isinstance(value, Tensor)]))
    return [next(there).item() if isinstance(value, Tensor) else value for value in values]


def known_to_be_zero(count: Tensor | int) -> bool:
    """Whether `count` is 0; False where asking would be waiting."""
    return (not isinstance(count, Tensor) or count.device.type == "cpu") and not count
