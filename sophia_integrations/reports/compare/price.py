"""What a step of each optimizer costs on this machine: seconds, operations and memory, from one short run of each.

The runs are processes that take turns, some steps of one, then of the next: what else the machine does meanwhile slows
all of them, and what is compared was timed side by side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...recipes.running.events import read_metrics
from ...recipes.running.run_folder import write_text
from ..bench.timing import in_turns
from ..places import Settings
from ..run_folder import read_json
from .dials import dials_of
from .rivals import Side
from .runs import digest
from .short_run import ShortRun

TURNS = 5
"""That are timed, each as long as a Hessian interval; one before them warms up, in one after them operations count."""
_QUIET = 0.5
"""Load above the threads of a training that nothing but the comparison itself makes."""


@dataclass(frozen=True)
class Price:
    """Of one optimizer on this machine.

    Attributes:
        turns: seconds of an optimizer step, the mean of each turn.
        once: seconds of a run besides its steps and further evaluations.
        evaluation: seconds.
        steps_per_epoch: of the recipe.
        flops: multiply-adds of matrix products, times two, in a step; None where they could not be counted.
        pass_flops: of these, what Hessian passes took.
        state_bytes: of the optimizer's state, for each trained parameter.
        together: whether the turns alternated with those of the others.
        machine: `bench.timing.machine` just after the turns; empty where it was not recorded.
    """

    turns: tuple[float, ...]
    once: float = 0.0
    evaluation: float = 0.0
    steps_per_epoch: float = math.nan
    flops: float | None = None
    pass_flops: float | None = None
    state_bytes: float | None = None
    together: bool = True
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> float:
        """Seconds of an optimizer step."""
        return statistics.median(self.turns)

    def steps(self, settings: Settings) -> int:
        """How many steps a run has."""
        steps, epochs = dials_of(settings).length(settings)
        return steps if steps is not None else max(1, math.ceil((epochs or 0) * self.steps_per_epoch))

    def seconds(self, settings: Settings) -> float:
        """How long a run is expected to take."""
        steps = self.steps(settings)
        evaluations = dials_of(settings).evaluations(settings, steps)
        return self.once + steps * self.step + (evaluations - 1) * self.evaluation


def machine_of(prices: Iterable[Price | None]) -> dict[str, Any]:
    """The machine on which they were measured, with the highest load; empty where none says."""
    machines = [price.machine for price in prices if price is not None and price.machine]
    return dict(max(machines, key=lambda one: one["load"] or 0.0, default={}))


def other_work(machine: Mapping[str, Any]) -> str:
    """``measured beside other work (load 1.9)``, where more ran than a training's threads; empty where not."""
    load = machine.get("load")
    return f"measured beside other work (load {load})" if load and load > machine["threads"] + _QUIET else ""


def measure(sides: Sequence[Side], folder: Path, say: Callable[[str], object]) -> dict[str, Price]:
    """Measures all sides, or finds what was measured of the same ones before.

    Where they cannot train at the same time, for lack of memory perhaps, each is measured by itself.

    Args:
        sides: all of a comparison.
        folder: of its runs.
        say: receives a line for the reader.

    Raises:
        UserError: one of them does not train.
    """
    record = folder / f"measured-{digest([side.settings for side in sides])}.json"
    found = read_json(record).get("prices")
    if found is None:
        say("A step of each optimizer is measured first.")
        place = folder / "measured"
        shutil.rmtree(place, ignore_errors=True)
        try:
            prices = _measure(sides, place)
        except UserError:
            say("The optimizers cannot train at the same time here, so each is measured by itself.")
            apart = (_measure([side], place)[0] for side in sides)
            prices = [dataclasses.replace(price, together=False) for price in apart]
        shutil.rmtree(place)
        found = [dataclasses.asdict(price) for price in prices]
        write_text(record, json.dumps({"prices": found}, indent=1) + "\n")
    return {
        side.name: Price(**{**price, "turns": tuple(price["turns"])}) for side, price in zip(sides, found, strict=True)
    }


def _measure(sides: Sequence[Side], folder: Path) -> list[Price]:
    with contextlib.ExitStack() as processes:
        runs = []
        for number, side in enumerate(sides):
            runs.append(processes.enter_context(contextlib.closing(ShortRun(side, folder / str(number), TURNS))))
            runs[-1].begin()
        turns = {str(number): run.turn for number, run in enumerate(runs)}
        seconds = in_turns(turns, TURNS, "cpu")  # where there is a GPU, each process waits for it by itself
        return [_price(run, own) for run, own in zip(runs, seconds.values(), strict=True)]


def _price(run: ShortRun, seconds: Sequence[float]) -> Price:
    run.end()
    turns = tuple(each / run.period for each in seconds)
    events = read_metrics(run.place / "metrics.jsonl")
    ends = [event["seconds"] for event in events if event["step"] == run.steps]
    besides = run.beginning + run.ending - 2 * run.period * statistics.median(turns)
    epoch = events[-1].get("epoch")
    return Price(
        turns=turns,
        once=max(0.0, besides),
        evaluation=ends[-1] - ends[0] if len(ends) > 1 else 0.0,
        steps_per_epoch=run.steps / epoch if epoch else math.nan,
        **read_json(run.costs),
    )
