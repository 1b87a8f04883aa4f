"""Tuning: equal budgets, grids that grow for everyone, runs that diverge; losses are functions of the settings here."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from sophia_integrations.errors import UserError
from sophia_integrations.reports.compare.dials import dials_of
from sophia_integrations.reports.compare.protocol import Tuning, read_protocol
from sophia_integrations.reports.compare.rivals import Side
from sophia_integrations.reports.compare.run import Run
from sophia_integrations.reports.compare.tuning import Tuned, require_equal_budgets, tune

Loss = Callable[[float, float], float]
"""Of a learning rate and a weight decay."""


def side(name: str, rate: float = 1e-3, decay: float = 0.1) -> Side:
    training = {"optim": "adamw_torch", "learning_rate": rate, "weight_decay": decay, "max_steps": 400}
    return Side(name, {"framework": "hf", "training": training})


def tuning(**changes: object) -> Tuning:
    return Tuning(**{**read_protocol().tuning.model_dump(), **changes})


def valley(best_rate: float, best_decay: float = 0.1) -> Loss:
    return lambda rate, decay: 2.0 + math.log(rate / best_rate) ** 2 + 0.1 * math.log(decay / best_decay) ** 2


class Trainer:
    """Answers with a loss instead of training, and remembers what was asked."""

    def __init__(self, **losses: Loss) -> None:
        self.losses, self.asked = losses, []

    def __call__(self, side: Side, settings: dict, what: str, extends: bool) -> Run:
        dials = dials_of(settings)
        rate, decay = dials.get(settings, "rate"), dials.get(settings, "weight_decay")
        steps = settings["training"]["max_steps"]
        self.asked.append((side.name, steps, rate, decay, settings["training"]["seed"], extends))
        loss = self.losses[side.name](rate, decay)
        return Run(Path(f"{side.name}-{rate}-{decay}-{steps}"), loss, steps)

    def of(self, name: str) -> list[tuple]:
        return [asked[1:] for asked in self.asked if asked[0] == name]


def test_the_budget_is_spent_as_the_protocol_says():
    train = Trainer(a=valley(1e-3))
    (tuned,) = tune([side("a")], tuning(), train)
    assert [asked[:3] for asked in train.of("a")] == [
        *[(100, rate, 0.1) for rate in (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)],
        *[(400, rate, 0.1) for rate in (5e-4, 1e-3, 2e-3)],
        *[(400, 1e-3, decay) for decay in (0.03333, 0.3)],
    ]
    assert {seed for *_, seed, _ in train.of("a")} == {1000}
    assert not tuned.at_edge
    assert tuned.side.settings["training"]["learning_rate"] == 1e-3
    assert tuned.side.settings["training"]["max_steps"] == 400


def test_a_small_budget_tries_rates_alone_and_the_neighbours_of_the_best():
    train = Trainer(a=valley(1e-3), b=valley(1e-3))
    tuned = tune([side("a"), side("b")], read_protocol(budget=5).tuning, train)
    for one in tuned:
        assert [asked[:3] + asked[4:] for asked in train.of(one.side.name)] == [
            *[(100, rate, 0.1, False) for rate in (2.5e-4, 5e-4, 1e-3, 2e-3)],
            (400, 1e-3, 0.1, False),
            *[(400, rate, 0.1, True) for rate in (5e-4, 2e-3)],
        ]
        assert not one.at_edge and one.side.settings["training"]["learning_rate"] == 1e-3
    require_equal_budgets(tuned)


def test_a_best_value_at_the_edge_extends_the_grid_for_everyone():
    train = Trainer(a=valley(1e-3), b=valley(16e-3))
    a, b = tune([side("a"), side("b")], tuning(), train)
    assert b.side.settings["training"]["learning_rate"] == 16e-3
    assert a.side.settings["training"]["learning_rate"] == 1e-3
    assert [t.value for t in a.of("rates")] == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3]
    assert len(train.of("a")) == len(train.of("b")) == 10 + 3
    assert [extends for *_, extends in train.of("a")].count(True) == 3


def test_finalists_and_the_knob_grow_too():
    short, full = valley(1e-3), valley(16e-3, best_decay=1.0)
    losses = {"a": lambda rate, decay: full(rate, decay), "b": short}
    train = Trainer(**losses)
    a, b = tune([side("a", rate=8e-3), side("b")], tuning(), train)
    assert a.side.settings["training"]["weight_decay"] == pytest.approx(0.9)
    assert sorted((t.stage, t.share) for t in a.trials) == sorted((t.stage, t.share) for t in b.trials)


def test_a_grid_that_grew_as_far_as_it_may_says_so():
    train = Trainer(a=valley(1.0))
    (tuned,) = tune([side("a")], tuning(extensions=1), train)
    assert tuned.at_edge == ["finalists"]
    (tuned,) = tune([side("a", rate=1.0)], tuning(extensions=0), Trainer(a=valley(1.0, best_decay=9.0)))
    assert tuned.at_edge == ["knob"]


def test_runs_that_diverge_count_and_never_win():
    def loss(rate: float, decay: float) -> float:
        return math.inf if rate > 1e-3 else valley(1e-3)(rate, decay)

    train = Trainer(a=loss, b=valley(1e-3))
    a, b = tune([side("a"), side("b")], tuning(), train)
    assert a.side.settings["training"]["learning_rate"] == 1e-3
    assert len(a.trials) == len(b.trials)
    assert sum(trial.run.diverged for trial in a.trials) >= 2


def test_divergence_everywhere_is_told():
    with pytest.raises(UserError, match=r"a diverged at every learning rate, from 1\.563e-05 to 0\.004"):
        tune([side("a")], tuning(), Trainer(a=lambda rate, decay: math.inf))


def test_beta1_and_no_knob():
    train = Trainer(a=valley(1e-3))
    (tuned,) = tune([side("a")], tuning(knob="beta1", extensions=0), train)
    assert [trial.value for trial in tuned.of("knob")] == [0.9667, 0.9, 0.7]
    (tuned,) = tune([side("a")], tuning(knob="none"), train)
    assert not tuned.of("knob") and len(tuned.of("rates")) == 7


def test_a_weight_decay_of_zero_cannot_be_multiplied_and_is_told_before_any_run():
    train = Trainer(a=valley(1e-3))
    with pytest.raises(UserError, match="a has no weight decay"):
        tune([side("a", decay=0.0)], tuning(), train)
    assert not train.asked


def test_no_budget_takes_recipes_as_they_are():
    (tuned,) = tune([side("a")], tuning(budget=0), Trainer())
    assert (tuned.side, tuned.trials) == (side("a"), [])


def test_unequal_budgets_are_refused():
    train = Trainer(a=valley(1e-3), b=valley(1e-3))
    a, b = tune([side("a"), side("b")], tuning(), train)
    require_equal_budgets([a, b])
    with pytest.raises(AssertionError, match="unequal budgets: b against a"):
        require_equal_budgets([a, Tuned(b.side, b.trials[:-1])])
    longer = [t if t.stage != "rates" else type(t)(**{**vars(t), "share": 1.0}) for t in b.trials]
    with pytest.raises(AssertionError, match="unequal budgets"):
        require_equal_budgets([a, Tuned(b.side, longer)])
