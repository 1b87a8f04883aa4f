"""Tuning with equal budgets: every optimizer gets the same number of runs of the same lengths, spent the same way.

    learning rates, a factor apart, at a part of the horizon → the best of them at all of it → one more knob

A grid whose best value lies at its edge, for anyone, gets one more value there, for everyone. A run that diverged is a
run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...errors import UserError
from ..places import Settings
from .dials import dials_of, rounded
from .protocol import Tuning
from .rivals import Side
from .run import Run

Train = Callable[[Side, Settings, str, bool], Run]
"""Executes or finds a run of a side; the text says what of it is tried, the flag whether it extends a grid."""


@dataclass(frozen=True)
class Trial:
    """One run of a tuning.

    Attributes:
        stage: ``rates``, ``finalists`` or ``knob``.
        share: of the horizon.
        place: of its value in the grid, the recipe's own at 0, a factor from the next.
        value: that was tried.
        run: how it ended.
        settings: its recipe at the full horizon.
    """

    stage: str
    share: float
    place: int
    value: float
    run: Run
    settings: Settings


@dataclass
class Tuned:
    """A side after its tuning.

    Attributes:
        side: with the recipe that won.
        trials: all runs spent on it.
        at_edge: the stages at the full horizon whose best value still lies at the edge of what was tried.
    """

    side: Side
    trials: list[Trial] = field(default_factory=list)
    at_edge: list[str] = field(default_factory=list)

    def of(self, stage: str) -> list[Trial]:
        """The trials of a stage, in the order of their values."""
        return sorted((t for t in self.trials if t.stage == stage), key=lambda trial: trial.place)

    def best(self, stage: str) -> Trial:
        """The trial with the lowest loss; the lowest value of equal ones."""
        return min(self.of(stage), key=lambda trial: trial.run.loss)


def tune(sides: Sequence[Side], tuning: Tuning, train: Train) -> list[Tuned]:
    """Spends the budget of every side.

    Raises:
        UserError: an optimizer diverged at every learning rate, or its recipe has no weight decay to be multiplied.
    """
    tuned = [Tuned(side) for side in sides]
    if not tuning.budget:
        return tuned
    for side in sides:
        if tuning.knob == "weight_decay" and not dials_of(side.settings).get(side.settings, "weight_decay"):
            raise UserError(
                f"{side.name} has no weight decay, and 0 times a factor is 0: give its recipe one, or set "
                "compare.tuning.knob to beta1 or none"
            )
    first = -(tuning.rates // 2)
    around = list(range(first, first + tuning.rates))
    _stage("rates", tuning, tuned, [around] * len(tuned), train)
    for one in tuned:
        if one.best("rates").run.diverged:
            raise UserError(
                f"{one.side.name} diverged at every learning rate, from {one.of('rates')[0].value:g} to "
                f"{one.of('rates')[-1].value:g}: give its recipe a lower one to begin with"
            )
    finalists = [
        sorted(t.place for t in sorted(one.of("rates"), key=lambda t: t.run.loss)[: tuning.finalists]) for one in tuned
    ]
    _stage("finalists", tuning, tuned, finalists, train)
    for one in tuned:
        one.side = Side(one.side.name, one.best("finalists").settings, one.side.about)
    if tuning.knob != "none":
        for one in tuned:  # the value itself was a finalist
            own = one.best("finalists")
            value = dials_of(own.settings).get(own.settings, tuning.knob)
            one.trials.append(Trial("knob", 1.0, 0, value, own.run, own.settings))
        _stage("knob", tuning, tuned, [[-1, 1]] * len(tuned), train)
        for one in tuned:
            one.side = Side(one.side.name, one.best("knob").settings, one.side.about)
    require_equal_budgets(tuned)
    return tuned


def require_equal_budgets(tuned: Sequence[Tuned]) -> None:
    """Raises AssertionError when one side was given more runs, or longer ones, than another."""
    spent = {one.side.name: sorted((t.stage, t.share) for t in one.trials) for one in tuned}
    unequal = [name for name, runs in spent.items() if runs != spent[tuned[0].side.name]]
    assert not unequal, f"unequal budgets: {', '.join(unequal)} against {tuned[0].side.name}"


def _stage(stage: str, tuning: Tuning, tuned: list[Tuned], grids: list[list[int]], train: Train) -> None:
    """Tries the grid of every side, then one more value at an end for all, while somebody's best is there."""
    for one, grid in zip(tuned, grids, strict=True):
        for place in grid:
            _try(one, stage, tuning, place, train)
    for left in range(tuning.extensions, -1, -1):
        edges = [_edge(one, stage) for one in tuned]
        for one, edge in zip(tuned, edges, strict=True):
            if edge and not left and stage != "rates":  # rates only choose the finalists, which have edges of their own
                one.at_edge.append(stage)
        if not left or not any(edges):
            return
        direction = next(edge for edge in edges if edge)
        for one in tuned:
            places = [trial.place for trial in one.of(stage)]
            _try(one, stage, tuning, (min(places) if direction < 0 else max(places)) + direction, train, True)


def _edge(one: Tuned, stage: str) -> int:
    """-1 or 1 where the best value is the lowest or highest of the grid, 0 inside it."""
    trials = one.of(stage)
    best = one.best(stage)
    return -1 if best is trials[0] else 1 if best is trials[-1] else 0


def _try(one: Tuned, stage: str, tuning: Tuning, place: int, train: Train, extends: bool = False) -> None:
    settings = one.side.settings
    dials = dials_of(settings)
    dial = tuning.knob if stage == "knob" else "rate"
    factor = tuning.knob_factor if stage == "knob" else tuning.rate_factor
    value = _moved(dial, dials.get(settings, dial), factor**place)
    settings = dials.set(settings, dial, value)
    share = tuning.horizon if stage == "rates" else 1.0
    asked = dials.with_seed(dials.with_horizon(settings, share), tuning.seed)
    run = train(one.side, asked, f"{dial} {value:g}", extends)
    one.trials.append(Trial(stage, share, place, value, run, settings))


def _moved(dial: str, value: float, factor: float) -> float:
    """The value of a dial times a factor; of β₁ it is 1 − β₁ that is multiplied."""
    if dial == "beta1":
        return rounded(1 - min(1.0, (1 - value) * factor))
    return rounded(value * factor)
