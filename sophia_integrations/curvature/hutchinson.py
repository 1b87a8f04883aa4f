"""The Hutchinson estimator: random probes times Hessian-vector products of the loss at the real labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..optim import Coordinates, Estimate
from ..ranges import require_in_range
from .engine import UnitEstimator
from .float16 import at_fitting_scale, runs_in_float16
from .graph import nodes_of
from .readout import Readout
from .reduction import NO_COORDINATES, DiagonalSum, is_sharded
from .sampling import keyed_generator
from .tap import MicroBatch

LossFunction = Callable[[Any, MicroBatch], Tensor]
"""(output of the model, micro-batch) -> 0-dim mean loss over the predictions that count."""


class Hutchinson(UnitEstimator):
    """ĥ = Σ_u n_u · mean_v(v ⊙ H_u v) / N, unbiased for the Hessian diagonal of the mean loss (arXiv 2305.14342, §2.3).

    H_u is the Hessian of unit u's mean loss, n_u its predictions that count, N = Σ n_u. A probe v has independent
    entries with E[v vᵀ] = I, so E[v_i (Hv)_i] = Σ_j H_ij E[v_i v_j] = H_ii (Bekas, Kokiopoulou and Saad, 2007),
    and Σ_u n_u H_u / N is the Hessian of the mean over all N predictions. Unlike the Gauss-Newton estimate it can
    be negative; Sophia then falls back to its ε.

    Every unit gets a forward of its own with the real labels, and a double backward on that graph alone: the
    training graph is freed as always. One unit costs about three times one of `GaussNewtonBartlett`. Attention
    runs its math kernel in the pass, the one with a second derivative.

    n_u comes from the labels, those of the call or of `note_labels`; without any, a unit weighs as many as its
    rows. A loss that the trainer changes outside the model (label smoothing) is seen here only through `loss`.

    Args:
        model, fraction, units, seed, readout, process_group: as for `UnitEstimator`.
        probe: "rademacher" (±1, the least noise) or "gaussian".
        probes: Hessian-vector products per unit; the noise of one falls with its square root.
        loss: (output, micro-batch) -> mean loss, for loops that compute the loss outside the model. The
            micro-batch has `args`, `kwargs` and the noted `labels`. By default the model's own loss: `output.loss`,
            `output["loss"]`, a 0-dim output, or the first element of a tuple.

    Raises:
        ValueError: an option out of range. In the pass: there is no loss, the parameters are sharded (FSDP2), the
            model uses reentrant checkpointing or an operation without a second derivative.

    Example:
        >>> from sophia_integrations import Hutchinson, SophiaH
        >>> model = nn.Linear(4, 3)
        >>> estimator = Hutchinson(model, loss=lambda output, batch: nn.functional.cross_entropy(output, batch.labels))
        >>> optimizer = SophiaH(model.parameters(), lr=1e-3, estimator=estimator)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> estimator.note_labels(y)
        >>> nn.functional.cross_entropy(model(x), y).backward()
        >>> optimizer.step()
        >>> optimizer.stats()["hessian_updates"]
        1
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        probe: Literal["rademacher", "gaussian"] = "rademacher",
        probes: int = 1,
        loss: LossFunction | None = None,
        fraction: float = 0.0625,
        units: int = 8,
        seed: int = 0,
        readout: Readout | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if probe not in _DRAW:
            raise ValueError(f"probe must be one of {', '.join(_DRAW)}, got {probe!r}.")
        require_in_range(probes=probes)
        super().__init__(model, fraction=fraction, units=units, seed=seed, readout=readout, process_group=process_group)
        self.probe, self.probes = probe, probes
        self._loss = loss or self._own_loss

    def estimate(
        self, params: Sequence[Tensor], step: int, coordinates: Mapping[Tensor, Coordinates] = NO_COORDINATES
    ) -> Estimate:
        if is_sharded(self.model):
            raise ValueError(
                "Hutchinson does not run on sharded parameters (FSDP2), which have no second derivative: use "
                "GaussNewtonBartlett, or DDP."
            )
        return super().estimate(params, step, coordinates)

    def add_unit(self, batch: MicroBatch, key: tuple[int, ...], total: DiagonalSum, counts: bool) -> None:
        predictions = int(self.readout.count(self.model, batch))  # the mean loss of none is not finite
        if predictions:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                diagonals = at_fitting_scale(
                    lambda: self._mean_loss(batch),
                    lambda loss, scale: self._scaled_diagonals(loss, scale, key, total),
                    lambda found: all(bool(diagonal.isfinite().all()) for _, diagonal in found),
                )
                for param, diagonal in diagonals:
                    total.add({param: diagonal.mul_(predictions / self.probes)})
        total.count(predictions)

    def _mean_loss(self, batch: MicroBatch) -> tuple[Tensor, bool]:
        """The loss, and whether it ran in float16."""
        with self.autocast_of(batch):
            args, kwargs = self.readout.loss_inputs(self.model, batch)
            loss = self._loss(self.model(*args, **kwargs), batch)
        return loss, runs_in_float16(self.model, batch, loss)

    def _scaled_diagonals(
        self, loss: Tensor, scale: float | None, key: tuple[int, ...], total: DiagonalSum
    ) -> Iterable[tuple[Tensor, Tensor]]:
        if scale is None:
            return self._diagonals(loss, key, total)
        return [(p, d.div_(scale)) for p, d in self._diagonals(loss.float() * scale, key, total)]

    def _diagonals(self, loss: Tensor, key: tuple[int, ...], total: DiagonalSum) -> Iterator[tuple[Tensor, Tensor]]:
        """For each probe and each parameter that the loss bends in: v ⊙ Hv, at least float32.

        In coordinates with the orthonormal basis Q the probe has the coordinates v: v ⊙ QᵀHQv.
        """
        params, coordinates = total.params, total.coordinates
        first = _derivatives([loss], params, None, create_graph=True)
        curved = [(i, p, g) for i, (p, g) in enumerate(zip(params, first, strict=True)) if g is not None]
        curved = [(i, p, g) for i, p, g in curved if g.requires_grad]
        _refuse_dead_ends([g for _, _, g in curved])
        del loss, first
        for probe in range(self.probes if curved else 0):
            vectors = [
                _DRAW[self.probe](p, keyed_generator(p.device, *key, "probe", probe, index)) for index, p, _ in curved
            ]
            more = probe + 1 < self.probes
            probes = [
                coordinates[p].out_of(_wide(v)).to(p.dtype) if p in coordinates else v
                for (_, p, _), v in zip(curved, vectors, strict=True)
            ]
            products = _derivatives([g for _, _, g in curved], [p for _, p, _ in curved], probes, retain_graph=more)
            for (_, param, _), vector, product in zip(curved, vectors, products, strict=True):
                if product is not None:
                    product = _wide(product.detach())
                    product = coordinates[param].into(product) if param in coordinates else product
                    yield param, product.mul(vector)

    def _own_loss(self, output: Any, batch: MicroBatch) -> Tensor:
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if loss is None:
            loss = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(loss, Tensor) or loss.ndim > 0:
            raise ValueError(
                f"Hutchinson found no loss in the output of {type(self.model).__name__}: pass the labels to the model "
                "if it computes its own loss, else give Hutchinson loss=lambda output, batch: … (a 0-dim mean loss)."
            )
        return loss


def _derivatives(outputs: list[Tensor], inputs: list[Tensor], vectors: list[Tensor] | None, **options: bool):
    """`torch.autograd.grad` with None for unused inputs, and sentences for what has no second derivative."""
    try:
        return torch.autograd.grad(outputs, inputs, vectors, allow_unused=True, **options)
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise ValueError(
                "Hutchinson cannot differentiate through reentrant gradient checkpointing: use use_reentrant=False "
                "(gradient_checkpointing_kwargs={'use_reentrant': False} for the Trainer)."
            ) from error
        if "derivative for" in str(error) or "double backward" in str(error):
            raise ValueError(_NO_SECOND_DERIVATIVE.format(error)) from error
        raise


def _refuse_dead_ends(gradients: list[Tensor]) -> None:
    """A backward marked `once_differentiable` would add nothing to Hv, in silence: torch never runs its error node."""
    if any(node.name().endswith("autograd::Error") for node in nodes_of(gradients)):
        raise ValueError(_NO_SECOND_DERIVATIVE.format("a backward marked once_differentiable"))


_NO_SECOND_DERIVATIVE = (
    "Hutchinson needs second derivatives, and an operation of the model has none ({}). Use a plain implementation of "
    "it, for attention attn_implementation='sdpa' or 'eager'; or use GaussNewtonBartlett."
)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rademacher(param: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(2, param.shape, generator=generator, device=param.device, dtype=param.dtype)
    return signs.mul_(2).sub_(1)


def _gaussian(param: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(param.shape, generator=generator, device=param.device, dtype=param.dtype)


_DRAW = {"rademacher": _rademacher, "gaussian": _gaussian}
