"""The empirical Fisher, a biased stand-in for curvature: it squares the training gradient itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..optim import Coordinates, Estimate, local
from ..optim.gradients import all_finite
from .engine import UnitEstimator
from .readout import Readout
from .reduction import NO_COORDINATES, all_reduce_status


class EmpiricalFisher(UnitEstimator):
    """ĥ = N · g², with g the training gradient of the step. BIASED: an ablation, not an estimator of curvature.

    It costs nothing, has the scale of `GaussNewtonBartlett` with one unit (Algorithm 2 of arXiv 2305.14342 at the
    real labels), and answers one question: does *curvature* help, or would any second moment? It differs from the
    Gauss-Newton diagonal because

    - real labels are not drawn from the model, so a prediction's squared gradient is not its curvature, and the
      expected gradient is not 0: the cross terms of the N predictions stay, and N·g² grows with N;
    - what happens to `.grad` before the step counts: after clipping it is smaller by the square of the factor.

    N counts the predictions of the whole accumulation window over all ranks, from the labels alone; micro-batches
    without labels count their rows. There is no forward, and nothing is put aside.

    Args:
        model, readout, process_group: as for `UnitEstimator`.

    Example:
        >>> from sophia_integrations import SophiaG
        >>> model = nn.Linear(4, 3)
        >>> optimizer = SophiaG(model.parameters(), lr=1e-3, estimator=EmpiricalFisher(model))
        >>> torch.nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
        >>> optimizer.step()
        >>> torch.allclose(optimizer.state[model.bias]["hessian"], 0.01 * 8 * model.bias.grad**2)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        readout: Readout | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(model, fraction=1.0, units=1, readout=readout, process_group=process_group)

    def estimate(
        self, params: Sequence[Tensor], step: int, coordinates: Mapping[Tensor, Coordinates] = NO_COORDINATES
    ) -> Estimate:
        """N · g² for the parameters that have a gradient, the same on every rank of the process group."""
        self._check_trains_model(params)
        batches = self._tap.take()
        count = sum(self.readout.count(self.model, batch) for batch in batches)
        grads = {p: p.grad for p in params if p.grad is not None}
        finite = all_finite([local(g) for g in grads.values()])
        group, device = self.process_group, params[0].device
        agreed = all_reduce_status((count, count), finite, bool(batches), self._nothing_seen(), device, group)
        if agreed.dropped is not None:
            return agreed
        diagonal = {}
        for param, grad in grads.items():
            full = local(grad).to(torch.promote_types(param.dtype, torch.float32), copy=True)
            full = coordinates[param].into(full) if param in coordinates else full
            diagonal[param] = full.square_().mul_(agreed.num_predictions)
        return replace(agreed, diagonal=diagonal)
