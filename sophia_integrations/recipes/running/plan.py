"""What a training would take, worked out from the recipe and shapes, and in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .disk import require_room
from .folder import RunFolder
from .memory import Weight


@dataclass(frozen=True)
class Batch:
    """One optimizer step: rows of one micro-batch on one process, how many of them, and the tokens of a row."""

    rows: int
    accumulated: int
    processes: int
    tokens_per_row: float

    @property
    def all_rows(self) -> int:
        """Rows of all processes."""
        return self.rows * self.accumulated * self.processes

    def describe(self) -> str:
        """The arithmetic, written out."""
        factors = [f"{self.rows} rows"]
        factors += [f"{self.accumulated} accumulated"] if self.accumulated > 1 else []
        factors += [f"{self.processes} processes"] if self.processes > 1 else []
        whole = self.tokens_per_row == int(self.tokens_per_row)
        tokens = f"{self.tokens_per_row:,.0f} tokens" if whole else f"{self.tokens_per_row:,.1f} tokens on average"
        total = f"{'' if whole else 'about '}{self.all_rows * self.tokens_per_row:,.0f}"
        return f"optimizer step: {' × '.join([*factors, tokens])} = {total} tokens"


@dataclass(frozen=True)
class Length:
    """How long training is: optimizer steps, epochs (None for a stream) and training rows (None for a stream)."""

    steps: int
    epochs: float | None
    rows: int | None

    def describe(self, batch: Batch) -> str:
        """Steps, epochs and tokens."""
        tokens = f"{self.steps * batch.all_rows * batch.tokens_per_row:,.0f} tokens"
        if self.epochs is None:
            return f"steps: {self.steps:,} ({tokens} of a stream)"
        return f"steps: {self.steps:,} ({tokens}), {self.epochs:.2f} epochs of {self.rows:,} rows"


@dataclass(frozen=True)
class Passes:
    """The Hessian passes: one every `interval` steps on `fraction` of a step's rows, split into up to `units`; `cost`
    is that of a row, in forward and backward passes of training."""

    interval: int
    fraction: float
    units: int
    cost: float = 1.0

    @property
    def share(self) -> float:
        """Estimated share of the time."""
        extra = self.cost * self.fraction / self.interval
        return extra / (1 + extra)

    def describe(self, steps: int) -> str:
        """Their number and share, and where the share comes from."""
        twice = ", differentiated twice" if self.cost == 2 else ""
        return (
            f"Hessian passes: {math.ceil(steps / self.interval):,}, about {self.share:.1%} of the time: an estimate "
            f"from {self.fraction:.3g} of a step's rows every {self.interval} steps{twice}; the small units that they "
            f"are split into (up to {self.units} on each process) cost somewhat more"
        )


@dataclass(frozen=True)
class Plan:
    """A training, worked out; `kept` checkpoints stand on the disk at once."""

    model: str
    optimizer: str
    weight: Weight
    batch: Batch
    length: Length
    passes: Passes | None
    kept: int

    @property
    def disk(self) -> int:
        """Bytes of disk that checkpoints and the model need."""
        return self.weight.checkpoints(self.kept)

    def describe(self) -> Iterator[str]:
        """One line for each thing that it takes."""
        yield f"model: {self.model}, {size_in_words(self.weight)}, optimizer {self.optimizer}"
        weight, state = self.weight, self.weight.state
        parts = [("weights", weight.weights), ("gradients", weight.gradients), ("optimizer state", state)]
        shown = " + ".join(f"{name} {memory(size)}" for name, size in parts if size is not None)
        total = memory(weight.weights + weight.gradients + (state or 0))
        note = "" if state is not None else "; this optimizer's state is not known before it runs"
        yield f"memory of each process: {shown} = {total}; activations come on top{note}"
        yield self.batch.describe()
        yield self.length.describe(self.batch)
        if self.passes is not None:
            yield self.passes.describe(self.length.steps)


def disk_in_words(plan: Plan, folder: RunFolder) -> str:
    """What a plan needs of the disk of its run folder; raises `UserError` when that has less."""
    place = folder.path.absolute()
    while not place.is_dir():
        place = place.parent
    free = require_room(place, plan.disk, folder.setting)
    return (
        f"disk: {memory(plan.disk)} for up to {plan.kept} checkpoint(s), one more while it is written, and the model, "
        f"in {folder.path} ({memory(free)} free)"
    )


def size_in_words(weight: Weight) -> str:
    """``1,421,760 parameters``, and how many of them are trained when not all are."""
    if weight.trained == weight.parameters:
        return f"{weight.parameters:,} parameters"
    share = weight.trained / weight.parameters
    return f"{weight.parameters:,} parameters of which {weight.trained:,} are trained ({share:.2%})"


def memory(size: int) -> str:
    """Bytes as kB, MB or GB (powers of ten)."""
    if size >= 1e9:
        return f"{size / 1e9:,.2f} GB"
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def length_of(arguments: Any, rows: int | None, processes: int) -> Length:
    """Steps and epochs as the Trainer counts them, from TrainingArguments and the number of training rows."""
    if rows is None:
        return Length(arguments.max_steps, None, None)
    batch = arguments.train_batch_size * processes
    batches = rows // batch if arguments.dataloader_drop_last else math.ceil(rows / batch)
    per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)
    return Length(steps, steps / per_epoch, rows)


def checkpoints_kept(arguments: Any, length: Length) -> int:
    """How many checkpoints stand in the run folder at once, the last one included; 0 when none are saved."""
    strategy = str(getattr(arguments.save_strategy, "value", arguments.save_strategy))
    if strategy == "no":
        return 0
    every = (
        arguments.save_steps if arguments.save_steps >= 1 else max(1, math.ceil(arguments.save_steps * length.steps))
    )
    number = math.ceil(length.epochs or 1) if strategy == "epoch" else math.ceil(length.steps / every)
    return max(1, min(arguments.save_total_limit or number, number))


def passes_of(optimizer: str, options: dict[str, Any]) -> Passes | None:
    """The Hessian passes of an optimizer by its name in ``training.optim``; None without any."""
    from ...hf import parse_optim_args

    if not optimizer.startswith("sophia"):
        return None
    given = parse_optim_args(options.get("optim_args"))
    return Passes(
        int(given.get("hessian_interval", 10)),
        float(given.get("hessian_fraction", 0.25)),
        int(given.get("hessian_units", 8)),
        2.0 if optimizer == "sophia_h" else 1.0,
    )
