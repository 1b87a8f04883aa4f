"""Σ_u S_u² and N over units and ranks: one flat accumulator per device, one large all-reduce."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class SquaredGradients:
    """Accumulates Σ_u S_u² for each parameter, as views of one flat float32 buffer per device."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.predictions = 0
        self.units = 0
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for param in params:
            by_device[param.device].append(param)
        self._flat: list[Tensor] = []
        self.sums: dict[Tensor, Tensor] = {}
        for device, group in by_device.items():
            dtype = torch.float64 if any(p.dtype == torch.float64 for p in group) else torch.float32
            flat = torch.zeros(sum(p.numel() for p in group), dtype=dtype, device=device)
            self._flat.append(flat)
            for param, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
                self.sums[param] = part.view(param.shape)

    def add_unit(self, num_predictions: int) -> None:
        """Square the parameters' `.grad`, the gradient of one unit's summed loss, and clear it."""
        for param, total in self.sums.items():
            if param.grad is not None:
                total.addcmul_(*[param.grad.to(total.dtype)] * 2)
                param.grad = None
        self.predictions += num_predictions
        self.units += 1

    def reduce(self, group: dist.ProcessGroup | None, captured: bool) -> tuple[int, bool, bool]:
        """Sum over the ranks of `group`, unless all of them agree that there is nothing usable.

        Returns:
            N over all ranks; whether every rank's sums are finite; whether any rank had captured a micro-batch.
        """
        finite = all(bool(torch.isfinite(flat.max())) for flat in self._flat if flat.numel())
        if not is_distributed(group):
            return self.predictions, finite, captured
        device = self._flat[0].device if self._flat else torch.device("cpu")
        agreed = torch.tensor([self.predictions, not finite, captured], dtype=torch.float64, device=device)
        dist.all_reduce(agreed, group=group)
        predictions, bad_ranks, captured_ranks = (int(x) for x in agreed.tolist())
        if predictions and not bad_ranks:
            for flat in self._flat:
                dist.all_reduce(flat, group=group)
        return predictions, not bad_ranks, captured_ranks > 0

    def diagonal(self, num_predictions: int) -> dict[Tensor, Tensor]:
        """ĥ = Σ_u S_u² / N for each parameter, in the accumulator's own memory."""
        for flat in self._flat:
            flat.div_(num_predictions)
        return self.sums


def is_distributed(group: dist.ProcessGroup | None) -> bool:
    """Whether `group` (None: the default group) has several ranks in this process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def rank_of(group: dist.ProcessGroup | None) -> int:
    """This process's rank in `group`, 0 without torch.distributed."""
    return dist.get_rank(group) if is_distributed(group) else 0
