"""Verdicts, headlines and refusals, the table, compare.json and the figure, from runs whose figures are given."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from sophia_integrations.errors import UserError
from sophia_integrations.reports.compare.figure import draw
from sophia_integrations.reports.compare.fit import PowerLaw
from sophia_integrations.reports.compare.judge import Judged, judge
from sophia_integrations.reports.compare.price import Price
from sophia_integrations.reports.compare.protocol import read_protocol
from sophia_integrations.reports.compare.result import Result, to_json
from sophia_integrations.reports.compare.rivals import Side
from sophia_integrations.reports.compare.run import Run, read_run
from sophia_integrations.reports.compare.table import to_markdown
from sophia_integrations.reports.compare.tuning import Tuned

LAW = PowerLaw(2.0, 30.0, 0.5)
LOAD = (1.0, 3.0, 0.9, 1.0, 1.1)
"""How much slower the machine was in each turn."""
SHAKEN = (-0.002, 0.001, 0.0015)


def run(steps: int, loss: float, share: float = 0.0) -> Run:
    curve = tuple((t, loss + 1.0 - t / steps) for t in range(steps // 4, steps + 1, steps // 4))
    return Run(Path(f"run-{steps}"), loss, steps, steps * 64, share, 0.25, curve, versions=(("torch", "2"),))


def side(name: str, faster: float, protocol, seconds: float = 1.0, share: float = 0.0, flops: float = 100.0, **more):
    """A side that needs 1 / faster of the steps of the law, its seeds shaken a little."""
    finals = {
        part: [
            run(round(600 * part), LAW.at(600 * part * faster) + shake, share)
            for shake in SHAKEN[: len(protocol.seeds)]
        ]
        for part in protocol.shares(reference=name == "adamw")
    }
    turns = tuple(seconds * load for load in LOAD)
    return Judged(name, finals, Price(turns, flops=flops, pass_flops=0.0, state_bytes=8.0), **more)


def result(protocol, *sides: Judged) -> Result:
    training = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 600}
    tuned = [Tuned(Side(one.name, {"framework": "hf", "training": training}, "about it")) for one in sides]
    reference = next(one for one in sides if one.name == "adamw")
    verdicts = [judge(protocol, reference, one) for one in sides if one is not reference]
    return Result("tiny.yaml", "sophia compare tiny.yaml", protocol, tuned, sides, reference, verdicts)


def test_fit_gives_the_ratio_of_steps_tokens_operations_and_time():
    protocol = read_protocol("fit", budget=0)
    verdict = judge(protocol, side("adamw", 1.0, protocol), side("new", 1.6, protocol, 1.2, 0.1, 110.0))
    assert verdict.steps.value == pytest.approx(0.625, rel=0.01)
    assert verdict.steps.low < 0.625 < verdict.steps.high
    assert verdict.tokens.value == pytest.approx(verdict.steps.value)
    assert verdict.flops.value == pytest.approx(1.1 * verdict.steps.value)
    assert verdict.seconds.value == pytest.approx(1.2 * verdict.steps.value)
    assert verdict.seconds.low < verdict.seconds.value < verdict.seconds.high
    assert verdict.headline.startswith("new needs 0.62 of the steps of adamw to the same loss (95% interval over 3")
    assert "of its operations and 0.75 of its time" in verdict.headline and not verdict.refusal


def test_the_headline_says_nothing_of_a_time_that_may_be_equal():
    protocol = read_protocol("fit", budget=0)
    verdict = judge(protocol, side("adamw", 1.0, protocol), side("new", 1.6, protocol, 1.6))
    assert not verdict.seconds.excludes(1.0) and verdict.headline.startswith("new needs 0.62")
    assert "of its time" not in verdict.headline and "of its operations" in verdict.headline


def test_a_bound_where_the_reference_is_left_far_behind_or_never_reached():
    protocol = read_protocol("fit", budget=0)
    reference = side("adamw", 1.0, protocol)
    assert judge(protocol, reference, side("new", 5.0, protocol)).headline == (
        "new needs less than 0.50 of the steps of adamw to the same loss"
    )
    assert judge(protocol, reference, side("new", 0.2, protocol)).headline == (
        "new needs more than 2.00 of the steps of adamw to the same loss"
    )


@pytest.mark.parametrize("way", ["same", "half", "fit"])
def test_an_optimizer_against_itself_has_no_headline(way):
    protocol = read_protocol(way, budget=0)
    reference = side("adamw", 1.0, protocol)
    itself = Judged("itself", reference.finals if way != "half" else {0.5: reference.finals[1.0]}, reference.price)
    verdict = judge(protocol, reference, itself)
    assert not verdict.headline and "contains" in verdict.refusal
    interval, point = (verdict.steps, 1.0) if way == "fit" else (verdict.difference, 0.0)
    assert not interval.excludes(point)


def test_same_and_half_speak_of_losses():
    same, half = read_protocol("same", budget=0), read_protocol("half", budget=0)
    better = judge(same, side("adamw", 1.0, same), side("new", 1.5, same))
    assert better.headline.startswith("new ends 0.22") and "nats lower than adamw at 600 steps" in better.headline
    assert better.steps.value == 1.0
    reached = judge(half, side("adamw", 1.0, half), side("new", 2.5, half))
    assert "nats lower than adamw with half of its 600 steps" in reached.headline and reached.steps.value == 0.5
    missed = judge(half, side("adamw", 1.0, half), side("new", 1.5, half))
    assert "nats higher than adamw with half of its 600 steps" in missed.headline


def test_refusals():
    protocol, one_seed = read_protocol("fit", budget=0), read_protocol("fit", budget=0, seeds=[1])
    reference = side("adamw", 1.0, protocol)
    alone = judge(one_seed, side("adamw", 1.0, one_seed), side("new", 1.6, one_seed))
    assert alone.refusal == "one seed says nothing of how much another would differ"
    edge = judge(protocol, reference, side("new", 1.6, protocol, at_edge=["finalists"]))
    assert edge.refusal.startswith("new is not tuned: its best value lies at the edge")
    broken = side("new", 1.6, protocol)
    broken.finals[0.75][1] = run(450, math.inf)
    lost = judge(protocol, reference, broken)
    assert lost.refusal == "new ended without a loss in 1 of 12 runs" and math.isnan(lost.steps.value)
    flat = side("adamw", 1.0, protocol)
    for part in flat.finals:
        flat.finals[part][:] = [run(round(600 * part), 2.0 + part + shake) for shake in SHAKEN]
    assert "do not fall" in judge(protocol, flat, side("new", 1.6, protocol)).refusal
    assert not any(verdict.headline for verdict in (alone, edge, lost))


def test_a_curve_that_is_none_is_refused_and_the_losses_are_shown():
    protocol = read_protocol("fit", budget=0)
    reference, new = side("adamw", 1.0, protocol), side("new", 1.6, protocol)
    for part, loss in zip((0.5, 0.625, 0.75, 1.0), (4.4, 4.25, 4.1, 3.5), strict=True):
        reference.finals[part][:] = [run(round(600 * part), loss + shake) for shake in SHAKEN]
    verdict = judge(protocol, reference, new)
    assert not verdict.headline and math.isnan(verdict.steps.value) and math.isnan(verdict.seconds.value)
    assert re.fullmatch(
        r"a \+ b·T\^−β is no curve through adamw's losses \(it misses the loss at 450 steps by 0\.1\d*, and the seeds' "
        r"spread explains 0\.00\d*\): give the recipe more steps or compare.horizons more shares; .*",
        verdict.refusal,
    )
    table = to_markdown(result(protocol, reference, new))
    assert verdict.refusal in table and "3.50" in table and "steps / adamw's" not in table


def test_the_table_the_json_and_the_figure(tmp_path, monkeypatch):
    protocol = read_protocol("fit", budget=0)
    sides = side("new", 1.6, protocol, 1.2, 0.1), side("adamw", 1.0, protocol), side("slow", 0.9, protocol)
    found = result(protocol, *sides)
    table = to_markdown(found)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and len({len(row) for row in rows}) == 1
    cells = dict(zip([c.strip() for c in rows[0].split("|")], [c.strip() for c in rows[2].split("|")], strict=True))
    assert cells["optimizer"] == "new" and cells["steps / adamw's"].startswith("0.62 [")
    assert (cells["ms a step"], cells["of it the pass"], cells["rule and basis"]) == ("1200", "120.0", "80.0")
    assert (cells["clipped"], cells["bytes of state"]) == ("25%", "8.0")
    assert "took in turns, side by side" in table
    assert "**new needs 0.62" in table and "sophia compare tiny.yaml" in table
    read = json.loads(to_json(found))
    assert read["verdicts"][0]["steps"]["value"] == pytest.approx(0.625, rel=0.01)
    assert read["sides"]["new"]["settings"]["rate"] == 1e-3
    assert len(read["sides"]["adamw"]["finals"]) == 4
    assert read["sides"]["new"]["recipe"] == found.tuned[0].side.settings
    assert (read["command"], read["versions"]) == ("sophia compare tiny.yaml", [{"torch": "2"}])
    assert "peak" in read["units"]["rate"]
    assert "Trained with torch 2." in table and "changed between runs" not in table
    crosses = pytest.approx(600 * (1 + LAW.at(960) - LAW.at(600)), rel=0.01)
    assert read["sides"]["new"]["crosses_at_step"] == crosses
    assert read["sides"]["slow"]["crosses_at_step"] is None
    crosses_drawn, plot = [], Axes.plot

    def noted(axes, x, y, *style, **more):
        if style[:1] == ("x",):
            crosses_drawn.append(x)
        return plot(axes, x, y, *style, **more)

    monkeypatch.setattr(Axes, "plot", noted)
    draw(found, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    at = read["sides"]["new"]["crosses_at_step"]  # by steps, tokens and seconds; the side that never does has none
    assert crosses_drawn == pytest.approx([at, at * 64, at * 1.2])


def test_everything_can_be_drawn_and_told_where_a_side_has_no_loss(tmp_path):
    protocol = read_protocol("same", budget=0)
    lost = Judged("lost", {1.0: [Run(Path("x"), math.inf, 3, why="it broke off")] * 3})
    found = result(protocol, side("adamw", 1.0, protocol), lost)
    assert "no loss" in to_markdown(found)
    assert json.loads(to_json(found))["sides"]["lost"]["finals"]["1"][0]["loss"] is None
    draw(found, tmp_path / "compare.png")


def test_the_price_of_time_is_that_of_turns_side_by_side_whatever_the_load():
    protocol = read_protocol("fit", budget=0)
    reference, new = side("adamw", 1.0, protocol), side("new", 1.6, protocol, 1.2)
    quiet = judge(protocol, reference, new)
    assert quiet.seconds.value == pytest.approx(1.2 * quiet.steps.value)
    shaken = Judged("new", new.finals, Price((1.0, 4.2, 0.9, 1.2, 1.65), flops=100.0))
    noisy = judge(protocol, reference, shaken)  # pairs of 1, 1.4, 1, 1.2 and 1.5
    assert noisy.seconds.value == pytest.approx(1.2 * noisy.steps.value)
    assert noisy.seconds.high - noisy.seconds.low > 2 * (quiet.seconds.high - quiet.seconds.low)
    assert noisy.steps == quiet.steps


@pytest.mark.parametrize(("load", "said"), [(1.4, ""), (1.9, "measured beside other work (load 1.9)"), (None, "")])
def test_a_time_ratio_that_was_measured_beside_other_work_says_so(load, said):
    protocol = read_protocol("fit", budget=0)
    machine = {"device": "some processor", "cores": 2, "threads": 1, "load": load}
    sides = side("adamw", 1.0, protocol), side("new", 1.6, protocol, 1.2)
    sides = tuple(Judged(s.name, s.finals, dataclasses.replace(s.price, machine=machine)) for s in sides)
    found = result(protocol, *sides)
    (verdict,) = found.verdicts
    table, read = to_markdown(found), json.loads(to_json(found))
    assert verdict.headline.endswith(f"of its time ({said})" if said else "of its time")
    assert ("beside other work" in table) == bool(said) and read["verdicts"][0]["disturbed"] == said
    assert read["machine"] == machine
    assert "Timed on some processor, 2 cores, 1 thread" + (f", load {load}." if load else ".") in table


def test_times_that_were_not_measured_side_by_side_are_not_compared():
    protocol = read_protocol("fit", budget=0)
    apart = side("adamw", 1.0, protocol), side("new", 1.6, protocol, 3.0)
    apart = tuple(Judged(s.name, s.finals, dataclasses.replace(s.price, together=False)) for s in apart)
    verdict = judge(protocol, *apart)
    assert math.isnan(verdict.seconds.value) and "of its time" not in verdict.headline
    table = to_markdown(result(protocol, *apart))
    assert "time / adamw's" not in table and "ms a step" in table and "Time is not compared" in table


def test_a_run_is_read_from_its_folder(tmp_path):
    events = [
        {"step": 4, "seconds": 10.0, "loss": 3.0, "grad_norm": 1.2, "sophia/hessian_time_fraction": 0.2},
        {"step": 4, "seconds": 15.0, "eval_loss": 3.1},
        {"step": 8, "seconds": 18.0, "loss": 2.0, "grad_norm": 0.9, "sophia/hessian_time_fraction": 0.4},
        {"step": 8, "seconds": 20.0, "eval_loss": 2.5},
    ]
    lines = [json.dumps(event) for event in events]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "lo']))
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 8, "tokens": 640, "versions": {"torch": "2"}}))
    (tmp_path / "recipe.yaml").write_text("training: {max_grad_norm: 1.1}")
    found = read_run(tmp_path)
    assert (found.loss, found.steps, found.tokens, found.curve) == (2.5, 8, 640, ((4, 3.1), (8, 2.5)))
    assert found.pass_share == pytest.approx(0.3) and found.clipped == 0.5 and not found.diverged
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:-1]) + '\n{"step": 8, "seconds": 20, "eval_loss": null}')
    assert read_run(tmp_path).diverged
    (tmp_path / "metrics.jsonl").write_text(lines[0])
    with pytest.raises(UserError, match="the run logged no validation loss"):
        read_run(tmp_path)
    lost = read_run(tmp_path, "it took more than 1 s")
    assert lost.diverged and (lost.steps, lost.why) == (4, "it took more than 1 s")
