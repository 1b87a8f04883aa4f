"""What a comparison found, in Markdown: the headlines, the table, and what to know when reading it."""

from __future__ import annotations

import math

from ..bench.tables import machine_line
from ..markdown import table
from .dials import dials_of
from .fit import Interval
from .judge import Judged
from .price import other_work
from .result import DIALS, Result

_NOTHING = "–"


def to_markdown(result: Result) -> str:
    """All of it."""
    protocol, reference = result.protocol, result.reference.name
    lines = [f"# {result.recipe}: {', '.join(side.name for side in result.judged)}", "", f"`{result.command}`", ""]
    for verdict in result.verdicts:
        if verdict.headline:
            lines.append(f"**{verdict.headline}.**")
        else:
            lines.append(f"{verdict.name} against {reference}: no headline: {verdict.refusal}.")
    head = ["optimizer", "rate", "weight decay", "β₁", "tuning runs", "loss", f"− {reference}'s"]
    head += [f"{what} / {reference}'s" for what in ("steps", "tokens", "operations", "time")]
    head += ["ms a step", "of it the pass", "rule and basis", "clipped", "bytes of state"]
    rows = [_row(result, index, side) for index, side in enumerate(result.judged)]
    used = [column for column in range(len(head)) if any(row[column] not in (_NOTHING, "") for row in rows)]
    lines += ["", *table([[row[column] for column in used] for row in (head, *rows)]), ""]
    lines += [f"{_READ[protocol.judge]} Brackets: {protocol.confidence:.0%} intervals over seeds "
              f"{', '.join(map(str, protocol.seeds))}, none of which tuned anything."]  # fmt: skip
    if protocol.tuning.budget:
        tuning = protocol.tuning
        extended = len(result.tuned[0].trials) - tuning.budget - (tuning.knob != "none")
        lines.append(
            f"Each had {tuning.budget} tuning runs{f' and {extended} more at the edges' if extended else ''}: "
            f"rates a factor {tuning.rate_factor:g} apart at {tuning.horizon:g} of the steps, the best"
            f"{f' {tuning.finalists}' if tuning.finalists > 1 else ''} at all of them"
            + (f", then {tuning.knob}." if tuning.knob != "none" else ".")
        )
        lost = [f"{one.side.name} {n}" for one in result.tuned if (n := sum(t.run.diverged for t in one.trials))]
        if lost:
            lines.append(f"Tuning runs that diverged, counted as runs: {', '.join(lost)}.")
    lines.append(
        "Operations are those of matrix products, counted over a few steps. "
        + (_TIME if all(side.price and side.price.together for side in result.judged) else _NO_TIME)
        + f" Rule and basis is what remains of a step beside the pass, less {reference}'s; clipped is the share of "
        "logged gradients that were longer than max_grad_norm; the state is the optimizer's, for each parameter."
    )
    disturbed = other_work(result.machine)
    if disturbed:
        lines.append(
            f"Time was {disturbed}, which slows one more than another: to measure it again when nothing else runs, "
            "delete measured-*.json among the runs and repeat the command."
        )
    if result.versions:
        lines += ["", f"Trained with {result.trained_with}."]
    if result.machine:
        lines.append(f"Timed on {machine_line(result.machine)}.")
    if len(result.versions) > 1:
        lines.append("Versions of packages changed between runs.")
    return "\n".join(lines) + "\n"


_READ = {
    "same": "Loss: validation, in nats, at the end of the whole schedule; all train the same number of steps.",
    "half": "Loss: validation, in nats, at the end of the whole schedule: half the steps against all of them.",
    "fit": "Ratios are to the same loss, by a + b·T^−β, a ≥ 0, through the reference's losses at its horizons.",
}

_TIME = "Time is that of steps, without evaluations, which the optimizers took in turns, side by side."
_NO_TIME = "Time is not compared: the optimizers could not take their steps in turns on this machine."


def _row(result: Result, index: int, side: Judged) -> list[str]:
    tuned = result.tuned[index]
    dials = [f"{dials_of(tuned.side.settings).get(tuned.side.settings, dial):.3g}" for dial in DIALS]
    runs = str(len({trial.run.folder for trial in tuned.trials})) if tuned.trials else _NOTHING
    verdict = result.verdict(side.name)
    loss = result.final(side)
    shown = _interval(loss, 4) if math.isfinite(loss.value) else "no loss"
    row = [side.name, *dials, runs, shown]
    if verdict is None:
        row += ["", *[""] * 4]
    else:
        sign = {"below": "< ", "above": "> "}.get(verdict.bound, "")
        costs = (verdict.steps, verdict.tokens, verdict.flops, verdict.seconds)
        row += [_interval(verdict.difference, 4, plus=True), *(sign * bool(math.isfinite(c.value)) + _interval(c, 2)
                for c in costs)]  # fmt: skip
    row += [_number(side.step_seconds * 1000, 0)]
    passes = side.pass_seconds
    row.append(_number(passes * 1000, 1) if passes else _NOTHING)
    rest = side.step_seconds - passes - (result.reference.step_seconds - result.reference.pass_seconds)
    row.append(_number(rest * 1000, 1) if side is not result.reference else _NOTHING)
    state = side.price.state_bytes if side.price else None
    return [*row, f"{side.clipped:.0%}" if math.isfinite(side.clipped) else _NOTHING, _number(state or math.nan, 1)]


def _interval(interval: Interval, digits: int, plus: bool = False) -> str:
    sign = "+" if plus else ""
    if not math.isfinite(interval.value):
        return _NOTHING
    value = f"{interval.value:{sign}.{digits}f}"
    if not math.isfinite(interval.low):
        return value
    return f"{value} [{interval.low:{sign}.{digits}f}, {interval.high:{sign}.{digits}f}]"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else _NOTHING
