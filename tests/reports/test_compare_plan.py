"""The plan of a comparison that was stopped after any of its runs: how many are found, how many are left."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sophia_integrations.reports.compare.dials import dials_of
from sophia_integrations.reports.compare.plan import Plan, finals, plan
from sophia_integrations.reports.compare.price import Price
from sophia_integrations.reports.compare.protocol import Protocol, read_protocol
from sophia_integrations.reports.compare.rivals import Side
from sophia_integrations.reports.compare.run import Run
from sophia_integrations.reports.compare.runs import digest
from sophia_integrations.reports.compare.tuning import tune

PRICES = {"own": Price((2.0,)), "adamw": Price((1.0,))}


class Stopped(Exception):
    """As Ctrl-C."""


class Kept:
    """Keeps the runs of a comparison whose best rates are given; stops after so many."""

    def __init__(self, **best: float) -> None:
        self.best, self.runs, self.extended = best, {}, set()

    def find(self, settings: dict) -> Run | None:
        return self.runs.get(digest(settings))

    def train(self, side: Side, settings: dict, what: str, extends: bool = False) -> Run:
        if (found := self.find(settings)) is not None:
            return found
        if len(self.runs) == self.most:
            raise Stopped
        loss = 2 + math.log(dials_of(settings).get(settings, "rate") / self.best[side.name]) ** 2
        if extends:
            self.extended.add(digest(settings))
        self.runs[digest(settings)] = Run(Path(digest(settings)), loss, settings["training"]["max_steps"])
        return self.runs[digest(settings)]

    def compare(self, sides: list[Side], protocol: Protocol, most: int) -> None:
        self.most = most
        for one in tune(sides, protocol.tuning, self.train):
            for runs in finals(one.side, protocol, "adamw").values():
                for settings in runs:
                    self.train(one.side, settings, "")


def side(name: str) -> Side:
    training = {"optim": name, "learning_rate": 1e-3, "weight_decay": 0.1, "max_steps": 400}
    return Side(name, {"framework": "hf", "training": training})


SIDES = [side("own"), side("adamw")]


def planned(protocol: Protocol, kept: Kept) -> Plan:
    return plan(SIDES, protocol, "adamw", PRICES, kept.find)


@pytest.mark.parametrize("best", [{"own": 1e-3, "adamw": 1e-3}, {"own": 1e-3, "adamw": 4e-3}])
def test_wherever_a_comparison_was_stopped_its_plan_counts_what_is_left(best):
    protocol = read_protocol("half", budget=5)
    whole = Kept(**best)
    whole.compare(SIDES, protocol, 99)
    all_runs = len(whole.runs) - len(whole.extended)
    assert all_runs == 2 * (5 + 3) and whole.extended
    seconds = 2 * (4 * 100 + 400 + 3 * 200) + (4 * 100 + 400 + 3 * 400)
    for stopped in range(len(whole.runs)):
        kept = Kept(**best)
        with pytest.raises(Stopped):
            kept.compare(SIDES, protocol, stopped)
        found = planned(protocol, kept)
        ended = [run for key, run in kept.runs.items() if key not in kept.extended]
        assert sum(found.found.values()) == len(ended) and found.runs == {"own": 8, "adamw": 8}
        assert found.seconds == seconds and 0 < found.left <= seconds - sum(run.steps for run in ended)
        assert (f"{len(ended)} ha" in found.sentence(8)) == bool(ended)
    found = planned(protocol, whole)
    assert found.tuned and found.left == 0 and found.sentence(8).endswith("all ended before: nothing is left to train")


def test_a_rival_that_comes_later_leaves_what_the_others_have_done():
    protocol, kept = read_protocol("same", budget=4), Kept(own=1e-3, adamw=1e-3)
    kept.compare(SIDES[:1], protocol, 99)
    found = planned(protocol, kept)
    assert found.found == {"own": 4 + 3, "adamw": 0} and not found.tuned
    assert found.left == 1.0 * (3 * 100 + 400 + 3 * 400)
    assert found.of(SIDES[0], PRICES["own"]) == "own (): 7 runs, 7 of them ended before, 2000 ms a step"
    assert found.sentence(8) == (
        "14 runs: 7 have ended before, 7 left, in about 32 min, and up to 8 more of each where a best value lies at "
        "an edge"
    )


def test_nothing_found_and_no_tuning():
    found = planned(read_protocol("fit", budget=0), Kept())
    assert found.sentence(0) == "24 runs in about 2.9 h" and found.tuned
