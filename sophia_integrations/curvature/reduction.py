"""The sum over units and ranks: one flat accumulator per device, one large all-reduce, one division by N."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..optim import Coordinates, Estimate, local
from ..optim.gradients import all_finite
from ..optim.sharding import is_distributed
from .transfer import numbers

NO_COORDINATES: Mapping[Tensor, Coordinates] = MappingProxyType({})


class DiagonalSum:
    """Σ_u of per-parameter diagonals, as views of one flat float32 buffer per device, and the count N.

    Replicated parameters (one process, DDP): every rank sums its own units; the sums are added over ranks once.
    Sharded parameters (FSDP2): a backward pass already adds the ranks' gradients, so one unit spans all ranks, the
    sums live on the shards and only N is added over ranks.

    Args:
        params: what the diagonal is for.
        model: the module they belong to.
        group: the ranks.
        coordinates: parameters whose gradients are squared in another basis.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        model: nn.Module,
        group: dist.ProcessGroup | None,
        coordinates: Mapping[Tensor, Coordinates] = NO_COORDINATES,
    ) -> None:
        self.sharded = is_sharded(model)
        self.squared_in_parts = False
        self.coordinates = coordinates
        self._group = group
        self._predictions: Tensor | int = 0
        self._batch_predictions: Tensor | float = 0
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for param in params:
            by_device[param.device].append(param)
        self._flat: list[Tensor] = []
        self._sums: dict[Tensor, Tensor] = {}
        for device, members in by_device.items():
            shards = [local(p) for p in members]
            dtype = torch.float64 if any(p.dtype == torch.float64 for p in members) else torch.float32
            flat = torch.zeros(sum(s.numel() for s in shards), dtype=dtype, device=device)
            self._flat.append(flat)
            for param, shard, part in zip(members, shards, flat.split([s.numel() for s in shards]), strict=True):
                self._sums[param] = part.view(shard.shape)

    @property
    def params(self) -> list[Tensor]:
        """The parameters that the diagonal is for."""
        return list(self._sums)

    @property
    def trainable(self) -> list[Tensor]:
        """Those that have gradients."""
        return [p for p in self._sums if p.requires_grad]

    def units_to_run(self, own: int) -> int:
        """How many units this rank must run: its own, or with shards as many as the rank that has the most."""
        if not (self.sharded and is_distributed(self._group)):
            return own
        most = torch.tensor(own, device=self._flat[0].device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._group)
        return int(most)

    def count(self, predictions: Tensor | int) -> None:
        """Add to N."""
        self._predictions += predictions

    @property
    def predictions(self) -> Tensor | int:
        """N on this rank; a 0-dim tensor where nobody has waited for it."""
        return self._predictions

    def count_batch(self, predictions: Tensor | float) -> None:
        """Add to the predictions of this rank's training batch, which are rounded in the end."""
        self._batch_predictions += predictions

    def gradients_are_finite(self) -> bool:
        """Whether every parameter's `.grad` is finite, on all ranks where a unit spans them."""
        finite = bool(all_finite([local(p.grad) for p in self._sums if p.grad is not None]))
        if self.sharded and is_distributed(self._group):
            agreed = torch.tensor(int(finite), device=self._flat[0].device)
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self._group)
            return bool(agreed)
        return finite

    def clear(self) -> None:
        """Begin anew; `.grad` stays."""
        self.squared_in_parts = False
        self._predictions = self._batch_predictions = 0
        for flat in self._flat:
            flat.zero_()

    def discard_gradients(self) -> None:
        """Clear every parameter's `.grad`."""
        for param in self._sums:
            param.grad = None

    def add_squared_gradients(self, scale: float = 1.0) -> None:
        """Add (`.grad` / scale)² for each parameter and clear `.grad`; with shards it is the ranks' mean gradient."""
        factor = (world_size_of(self._group) if self.sharded else 1) / scale
        for param in self._sums:
            if param.grad is not None:
                self._add_square(param, factor)

    def _add_square(self, param: Tensor, factor: float) -> None:
        total = self._sums[param]
        gradient = local(param.grad).to(torch.promote_types(param.dtype, torch.float32))
        if factor != 1:
            gradient = gradient * factor
        if param in self.coordinates:
            gradient = self.coordinates[param].into(gradient)
        gradient = gradient.to(total.dtype)
        total.addcmul_(gradient, gradient)
        param.grad = None

    @contextlib.contextmanager
    def squared_on_arrival(self) -> Iterator[None]:
        """Around a unit's backward: add each gradient's square as it arrives, and let the gradient go.

        So a pass holds one gradient at a time, not a second set of them. Where the gradient of a parameter comes in
        parts, as that of a weight shared with reentrant checkpointing does, this sum is of no use in the end, and
        `squared_in_parts` says so: autograd runs a backward of its own there, and tells nobody before.
        """
        squared: set[Tensor] = set()

        def arrived(param: Tensor) -> None:
            self.squared_in_parts |= param in squared
            squared.add(param)
            self._add_square(param, 1.0)

        hooks = [param.register_post_accumulate_grad_hook(arrived) for param in self.trainable]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, diagonals: Mapping[Tensor, Tensor]) -> None:
        """Add one unit's diagonal for each parameter."""
        for param, diagonal in diagonals.items():
            self._sums[param].add_(local(diagonal))

    def reduced(self, captured: bool, nothing_seen: str) -> Estimate:
        """The estimate over all units and ranks; every rank gets the same answer, and none waits in vain.

        Args:
            captured: whether this rank had remembered a micro-batch.
            nothing_seen: the reason to give when no rank had.
        """
        finite = all_finite(self._flat)
        device = self._flat[0].device if self._flat else torch.device("cpu")
        counts = (self._predictions, self._batch_predictions)
        agreed = all_reduce_status(counts, finite, captured, nothing_seen, device, self._group)
        if agreed.dropped is not None:
            return agreed
        for flat in self._flat:
            if is_distributed(self._group) and not self.sharded:
                dist.all_reduce(flat, group=self._group)
            flat.div_(agreed.num_predictions)
        return replace(agreed, diagonal=self._sums)


def all_reduce_status(
    counts: tuple[Tensor | float, Tensor | float],
    finite: Tensor | bool,
    captured: bool,
    nothing_seen: str,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> Estimate:
    """What the ranks say together: an estimate that only lacks its diagonal, or the reason why it gets none.

    Args:
        counts: this rank's predictions in its units, and in its training batch.
        finite: whether this rank's sum is.
        captured: whether this rank had remembered a micro-batch.
        nothing_seen: the reason to give when no rank had.
        device: where the ranks' messages lie.
        group: the ranks.
    """
    said = [*counts, ~finite if isinstance(finite, Tensor) else not finite, captured]
    if is_distributed(group):
        agreed = torch.stack([_number_on(device, x) for x in said])
        dist.all_reduce(agreed, group=group)
        said = agreed.tolist()
    predictions, in_batch, bad_ranks, captured_ranks = (round(x) for x in numbers(said))
    finite, captured = bad_ranks == 0, captured_ranks > 0
    if not captured:
        return Estimate(None, dropped=nothing_seen, captured=False)
    if not finite:
        return Estimate(None, predictions, dropped="its sum over the batch was not finite")
    if predictions == 0:
        return Estimate(None, dropped="every label of the rows that it used is masked")
    return Estimate(None, predictions, batch_predictions=in_batch)


def _number_on(device: torch.device, value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def is_sharded(model: nn.Module) -> bool:
    """Whether `model` went through `fully_shard` (FSDP2)."""
    return any(hasattr(module, "set_requires_gradient_sync") for module in model.modules())


def is_flattened(model: nn.Module) -> bool:
    """Whether `model` is under FSDP1 (`FullyShardedDataParallel`), whose parameters have lost their shapes."""
    return not is_sharded(model) and any(getattr(m, "_is_fsdp_managed_module", False) for m in model.modules())


def rank_of(group: dist.ProcessGroup | None) -> int:
    """This process's rank in `group`, 0 without torch.distributed."""
    return dist.get_rank(group) if is_distributed(group) else 0


def world_size_of(group: dist.ProcessGroup | None) -> int:
    """Ranks in `group`, 1 without torch.distributed."""
    return dist.get_world_size(group) if is_distributed(group) else 1
