"""The engine that every estimator shares: units of remembered micro-batches, isolation, one reduction over ranks."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..optim import Coordinates, Estimate
from ..optim.checks import warn_caller
from ..optim.sharding import is_distributed
from ..ranges import require_in_range
from .isolation import isolated
from .readout import Readout, readout_for
from .reduction import NO_COORDINATES, DiagonalSum, is_flattened, is_sharded, rank_of
from .rows import rows_stand_alone, shape_of_selection
from .sampling import choose_units, key_to_seed, keyed_generator
from .tap import MicroBatch, Tap, model_device, taps_paused


class UnitEstimator:
    """Base of the estimators that average over units; a subclass says in `add_unit` what one unit adds.

    Args:
        model: the module that the training loop calls with the batch.
        fraction: share of the rows of the accumulation window used on each rank, in (0, 1]: of 24 rows a sixteenth is
            one or two, in turns by chance. At least one row is used.
        units: units to form from them on each rank. With batch normalization in training mode a unit is always a
            whole micro-batch, and `fraction` a share of the micro-batches.
        seed: key of all that is drawn, with the optimizer step, the rank and the unit.
        readout: where predictions and labels are; found from the model by default.
        process_group: ranks that hold different rows of one batch; the default group when None. Tensor-parallel
            ranks, which share rows, must not be in it together.

    Raises:
        ValueError: `fraction` or `units` out of range.
    """

    hears_the_loss = False
    """Whether the readout is to compare the likelihood with the training loss."""

    def __init__(
        self,
        model: nn.Module,
        *,
        fraction: float = 0.0625,
        units: int = 8,
        seed: int = 0,
        readout: Readout | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        require_in_range(fraction=fraction, units=units)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        self.model = model
        self.fraction, self.units, self.seed = fraction, units, seed
        self.readout = readout or readout_for(model)
        self.process_group = process_group
        self.forward_context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        self._tap = Tap(model)
        self._rows_tried: dict[tuple[bool, ...], bool] = {}

    def __repr__(self) -> str:
        kind, model = type(self).__name__, type(self.model).__name__
        drawn = f"fraction={self.fraction}, units={self.units}, seed={self.seed}"
        return f"{kind}({model}, {drawn}, readout={self.readout!r})"

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to this process: the tap, which holds batches, and the ranks."""
        own = ("_tap", "process_group", "forward_context")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            state, process_group=None, forward_context=contextlib.nullcontext, _tap=Tap(state["model"])
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> UnitEstimator:
        """A copy for the copied model, which is the one that `copy.deepcopy((model, optimizer))` returns beside it."""
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.process_group = self.process_group
        return twin

    def __reduce_ex__(self, protocol: int) -> Any:
        """In a file an estimator goes with its model; where that cannot be pickled it stays behind, as None."""
        return super().__reduce_ex__(protocol) if _can_be_pickled(self.__getstate__()) else (_left_behind, ())

    def add_unit(self, batch: MicroBatch, key: tuple[int, ...], total: DiagonalSum, counts: bool) -> None:
        """Add one unit's contribution to the sum and its predictions to the count.

        Args:
            batch: the unit's rows.
            key: (seed, step, rank, unit), for `keyed_generator`.
            total: where the contribution goes.
            counts: False for a unit that only keeps the ranks' collectives in step and must add 0.
        """
        raise NotImplementedError

    def arm(self, due: bool) -> None:
        """Remember the coming micro-batches when the next step is due, forget them otherwise."""
        self._tap.open = due
        self._tap.listener = self.readout if due and self.hears_the_loss else None
        self._tap.noted_labels = None
        self._tap.take()

    def note_labels(self, labels: Tensor | None) -> None:
        """Say which labels belong to the coming forward, when the model itself is not given them.

        Only their mask (-100) is read. Call it before the forward; it holds until the next call or step.
        """
        self._tap.noted_labels = labels

    def remember(self, *args: Any, **kwargs: Any) -> None:
        """Remember a micro-batch by hand: for a `model` that only the pass calls, with these arguments.

        Call it inside the autocast of the training forward. It does nothing unless the next step is due.
        """
        self._tap.remember(args, kwargs)

    def estimate(
        self, params: Sequence[Tensor], step: int, coordinates: Mapping[Tensor, Coordinates] = NO_COORDINATES
    ) -> Estimate:
        """One estimate from the remembered micro-batches, the same on every rank of the process group.

        Args:
            params: what ĥ is wanted for.
            step: the optimizer step, a key of what is drawn.
            coordinates: parameters whose diagonal is wanted in another orthonormal basis.

        Raises:
            ValueError: the readout finds no predictions, or no labels where it needs them; the optimizer trains
                no parameter of the model; the model is under FSDP1.
        """
        if is_flattened(self.model):
            raise ValueError(
                f"{type(self).__name__} does not run under FSDP1 (FullyShardedDataParallel), which flattens the "
                "parameters: use FSDP2 (torch.distributed.fsdp.fully_shard, or fsdp_version: 2 in accelerate)."
            )
        self._check_trains_model(params)
        batches = self._tap.take()
        if self._only_some_ranks_have_rows(batches):
            return Estimate(
                None,
                dropped="some ranks have no rows of the batch, and sharded parameters (FSDP2) need every rank for each "
                "forward: give all ranks as many micro-batches, in training mode",
            )
        total = DiagonalSum(params, self.model, self.process_group, coordinates)
        self._add_units(batches, total, step)
        return total.reduced(bool(batches), self._nothing_seen())

    def _add_units(self, batches: list[MicroBatch], total: DiagonalSum, step: int) -> None:
        rank = rank_of(self.process_group)
        generator = keyed_generator(torch.device("cpu"), self.seed, step, rank, "rows")
        chosen = self._choose_units(batches, generator, total.sharded)
        if batches or total.sharded:
            with taps_paused(), isolated(self.model, total.params, key_to_seed(self.seed, step, rank, "forward")):
                for unit in range(total.units_to_run(len(chosen))):
                    batch, rows = chosen[min(unit, len(chosen) - 1)]
                    key = (self.seed, step, rank, unit)
                    self.add_unit(self._part(batches[batch], rows), key, total, counts=unit < len(chosen))
        total.count_batch(self._predictions_of(batches, chosen, total.predictions))

    def _predictions_of(
        self, batches: list[MicroBatch], chosen: list[tuple[int, Tensor | None]], seen: Tensor | int
    ) -> Tensor | float:
        """The predictions of the accumulation window: those that had a gradient, where a witness counted them; else in
        proportion to those `seen` in the rows that were used."""
        sizes = [self.readout.num_rows(self.model, batch) or 1 for batch in batches]
        used = sum(sizes[batch] if rows is None else len(rows) for batch, rows in chosen)
        heard = [batch.witness.number if batch.witness is not None else None for batch in batches]
        return sum(seen * n / max(used, 1) if c is None else c for n, c in zip(sizes, heard, strict=True))

    def _only_some_ranks_have_rows(self, batches: list[MicroBatch]) -> bool:
        """Whether shards keep the ranks from going on: one without rows has nothing to run the model with."""
        if not (is_sharded(self.model) and is_distributed(self.process_group)):
            return False
        some = any(self.readout.num_rows(self.model, batch) != 0 for batch in batches)
        seen = torch.tensor([some, not some], dtype=torch.int64, device=model_device(self.model))
        dist.all_reduce(seen, group=self.process_group)
        return bool(seen.all())

    def _check_trains_model(self, params: Sequence[Tensor]) -> None:
        own = set(self.model.parameters())
        if not any(param in own for param in params):
            raise ValueError(
                f"the optimizer trains no parameter of the {type(self.model).__name__} given to {type(self).__name__}: "
                "build both from the same model."
            )

    def _part(self, batch: MicroBatch, rows: Tensor | None) -> MicroBatch:
        return batch if rows is None else self.readout.rows(self.model, batch, rows)

    def _choose_units(
        self, batches: list[MicroBatch], generator: torch.Generator, sharded: bool
    ) -> list[tuple[int, Tensor | None]]:
        """(micro-batch, its rows) for each unit; None for all of them."""
        if not batches:
            return []
        sizes = [self.readout.num_rows(self.model, batch) for batch in batches]
        if None not in sizes and not _rows_depend_on_each_other(self.model):
            chosen = choose_units(sizes, self.fraction, self.units, generator)
            split = sorted({batch for batch, rows in chosen if len(rows) < sizes[batch]})
            if all(self._rows_stand_alone(batches[batch], sizes[batch], sharded) for batch in split):
                return chosen
        parts = choose_units([1] * len(batches), self.fraction, len(batches), generator)
        return [(batch, None) for batch, _ in parts]

    def _rows_stand_alone(self, batch: MicroBatch, size: int, sharded: bool) -> bool:
        """Whether rows may be taken, where the readout does not know: tried once for each layout of the arguments.

        Shards forbid the trial, in which every rank would have to take part; there the modules' `batch_first` decides.
        """
        dim = self.readout.batch_dim
        if self.readout.rows_are_known or dim is None:
            return True
        layout = shape_of_selection(batch, dim, size)
        if layout not in self._rows_tried:
            alone = None if sharded else self._try_rows(batch, dim, size)
            if alone is None:
                alone = dim != 0 or all(getattr(m, "batch_first", True) for m in self.model.modules())
            self._rows_tried[layout] = alone
            if not alone:
                warn_caller(_ROWS_DO_NOT_STAND_ALONE.format(type(self.model).__name__, dim))
        return self._rows_tried[layout]

    def _try_rows(self, batch: MicroBatch, dim: int, size: int) -> bool | None:
        model = getattr(self.model, "_orig_mod", self.model)
        index = torch.arange(1, size, 2)

        def predict(some: MicroBatch) -> Tensor:
            args, kwargs = self.readout.inputs(self.model, some)
            with self.forward_context():
                return self.readout.logits(model(*args, **kwargs))

        part = self.readout.rows(self.model, batch, index)
        return rows_stand_alone(model, predict, batch, part, index, dim, size)

    @contextlib.contextmanager
    def autocast_of(self, batch: MicroBatch) -> Iterator[None]:
        """`forward_context`, and the autocast state that the training forward ran under."""
        dtype = batch.autocast_dtype
        device_type = model_device(self.model).type
        with self.forward_context(), torch.autocast(device_type, dtype=dtype) if dtype else contextlib.nullcontext():
            yield

    def _nothing_seen(self) -> str:
        return (
            f"{type(self.model).__name__} was not called in training mode with gradients enabled before the step, so "
            "there is no batch to estimate from. Give the estimator the very module that the training loop calls (the "
            "compiled one after torch.compile), and call it (not a method of it) to compute the loss"
        )


_ROWS_DO_NOT_STAND_ALONE = (
    "Sophia uses whole micro-batches for {}: what it predicts for some entries along dimension {} of its arguments "
    "depends on the others, so they are not rows of a batch that can be taken one by one. If another "
    "dimension numbers the rows (1 with batch_first=False), pass readout=Readout(batch_dim=…) for less noise at less "
    "cost; if an argument has no rows, Readout(rows=…). Readout(batch_dim=None) asks for whole micro-batches."
)


class _Skeleton(pickle.Pickler):
    """Pickles everything but tensors."""

    def persistent_id(self, obj: Any) -> str | None:
        return "tensor" if isinstance(obj, Tensor) else None


def _can_be_pickled(obj: Any) -> bool:
    try:
        _Skeleton(io.BytesIO()).dump(obj)
    except (AttributeError, TypeError, pickle.PicklingError):
        return False
    return True


def _left_behind() -> None:
    """What an estimator becomes that could not be pickled."""


def _rows_depend_on_each_other(model: nn.Module) -> bool:
    """Batch normalization in training mode: a part of a micro-batch would be another function of the parameters."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())
