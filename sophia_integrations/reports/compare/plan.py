"""What a comparison takes: how many runs and how long, and how many of them have ended before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..places import Settings
from .dials import dials_of
from .price import Price
from .progress import in_words
from .protocol import Protocol
from .rivals import Side
from .run import Run
from .tuning import tune

Find = Callable[[Settings], Run | None]
"""The run of a recipe, if it has ended."""


@dataclass(frozen=True)
class Plan:
    """Of a comparison, before it begins or goes on.

    Attributes:
        runs: that are planned of each side; those at the edges of grids come on top.
        found: of these, how many have ended before.
        seconds: that all of them are expected to take.
        left: of these, what those that have not ended are expected to take.
        tuned: whether all tuning has ended, so that no grid grows any more.
    """

    runs: Mapping[str, int]
    found: Mapping[str, int]
    seconds: float
    left: float
    tuned: bool

    def sentence(self, edges: int) -> str:
        """How many runs and how long; `edges` is how many more of each there may be at the edges of grids."""
        runs, found = sum(self.runs.values()), sum(self.found.values())
        more = (
            f", and up to {edges} more of each where a best value lies at an edge" if edges and not self.tuned else ""
        )
        if not found:
            return f"{_runs(runs)} in about {in_words(self.left)}{more}"
        if found == runs:
            return f"{_runs(runs)}, which have all ended before: nothing is left to train"
        have = "has" if found == 1 else "have"
        return f"{_runs(runs)}: {found} {have} ended before, {runs - found} left, in about {in_words(self.left)}{more}"

    def of(self, side: Side, price: Price) -> str:
        """One side's part."""
        found = self.found[side.name]
        before = f", {found} of them ended before" if found else ""
        return f"{side.name} ({side.about}): {_runs(self.runs[side.name])}{before}, {price.step * 1000:.0f} ms a step"


def plan(sides: Sequence[Side], protocol: Protocol, reference: str, prices: Mapping[str, Price], find: Find) -> Plan:
    """The plan of a comparison.

    Which runs there are follows from how those before them ended, so tuning is gone through as far as they have.

    Raises:
        UserError: the tuning cannot be, as `tune` says.
    """
    found, tuned = _tuning_found(sides, protocol, find)
    for side in tuned:
        for settings in (one for runs in finals(side, protocol, reference).values() for one in runs):
            if run := find(settings):
                found[side.name][run.folder] = settings
    planned = {side.name: _planned(side, protocol, reference) for side in sides}
    seconds = {name: sum(n * prices[name].seconds(one) for one, n in runs) for name, runs in planned.items()}
    spent = {name: sum(prices[name].seconds(one) for one in runs.values()) for name, runs in found.items()}
    return Plan(
        runs={name: sum(number for _, number in runs) for name, runs in planned.items()},
        found={name: len(runs) for name, runs in found.items()},
        seconds=sum(seconds.values()),
        left=max(0.0, sum(seconds.values()) - sum(spent.values())),
        tuned=len(tuned) == len(sides),
    )


def finals(side: Side, protocol: Protocol, reference: str) -> dict[float, list[Settings]]:
    """The runs that count of a tuned side, by share of the horizon, one for each seed."""
    dials = dials_of(side.settings)
    return {
        share: [dials.with_seed(dials.with_horizon(side.settings, share), seed) for seed in protocol.seeds]
        for share in protocol.shares(reference=side.name == reference)
    }


class _Missing(Exception):
    """A run has not ended, and what is tried next depends on it; holds its side."""


def _tuning_found(
    sides: Sequence[Side], protocol: Protocol, find: Find
) -> tuple[dict[str, dict[Path, Settings]], list[Side]]:
    """The tuning runs of every side that have ended, without those at edges, and the sides that are tuned.

    A side that has not ended all is left out from there on, and the others go on among themselves.
    """
    found: dict[str, dict[Path, Settings]] = {}

    def train(side: Side, settings: Settings, what: str, extends: bool) -> Run:
        run = find(settings)
        if run is None:
            raise _Missing(side)
        if not extends:
            found[side.name][run.folder] = settings
        return run

    left = {side.name: side for side in sides}
    while True:
        found.update({name: {} for name in left})
        try:
            return found, [one.side for one in tune(list(left.values()), protocol.tuning, train)]
        except _Missing as missing:
            del left[missing.args[0].name]


def _planned(side: Side, protocol: Protocol, reference: str) -> list[tuple[Settings, int]]:
    """Recipes of a side by their length, and how many runs of each."""
    tuning, dials = protocol.tuning, dials_of(side.settings)
    planned = [(1.0, tuning.finalists + tuning.knob_runs), (tuning.horizon, tuning.rates)] if tuning.budget else []
    planned += [(share, len(protocol.seeds)) for share in protocol.shares(side.name == reference)]
    return [(dials.with_horizon(side.settings, share), number) for share, number in planned]


def _runs(number: int) -> str:
    return f"{number} run" if number == 1 else f"{number} runs"
