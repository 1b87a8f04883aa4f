"""Checks that hold for any optimizer: what the loss, the gradient norm and the learning rate say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median, quantiles

from ..recipe_lines import Edit
from ..run_folder import Run
from .finding import Finding

ADAMW_RATES = ((131e3, 8e-3), (1.4e6, 4.5e-3), (125e6, 6e-4), (355e6, 3e-4), (770e6, 2e-4))
"""AdamW's best learning rate from scratch, by parameters: ours (recipes/RESULTS.md), then the paper's table."""
FINE_TUNING_RATES = {"full": 1.5e-4, "adapters": 1e-3}
"""The same for pretrained weights (recipes/RESULTS.md, "Fine-tuning real weights")."""
PAPER_FACTOR = 0.5
"""Sophia's rate in the weights' own coordinates, in multiples of AdamW's: 0.25 to 0.5 in marin's re-test, 0.2 to 0.5 in
our recipes, 1 to 2.3 in the paper's table. In the eigenbasis the rate is AdamW's own (README)."""
RATE_MARGIN = 10.0
"""How far a rate may be from that rule; tuned ones were within a factor of 5."""
DIVERGED = 1.5
"""Times the first loss: no loss of a model that learns stays above it for `SPIKE_WINDOW` logs."""
CLIPPED_SHARE = 0.9
"""Of the logged gradient norms above max_grad_norm after warm-up. The paper: with Sophia, clipping is rare."""
SCALER_SHARE = 0.1
"""Of the logs: fewer gradient norms that are not finite are a gradient scaler looking for its scale in float16."""
SPIKE_RISE, SPIKE_NOISE, SPIKE_WINDOW = 0.05, 5.0, 5
"""A spike is above the median of the last 5 logs by 5 % of it, and by 5 times the usual change between two logs."""
WARMUP_SHARE = 0.01
"""Of the schedule. The paper warms up for 2,000 of 100,000 steps; marin's runs diverged below 1,000 to 2,000."""


def finite(run: Run) -> Iterator[Finding]:
    """The loss or the gradient became NaN or infinite."""
    for name, what in (("loss", "training loss"), ("grad_norm", "gradient norm"), ("eval_loss", "validation loss")):
        steps, logged = run.not_finite(name), [step for step, row in run.rows.items() if name in row]
        if not steps or (name == "grad_norm" and steps[-1] != logged[-1] and len(steps) < SCALER_SHARE * len(logged)):
            continue
        before = [step for step in run.series("loss") if step < steps[0]]
        until = f"; the loss was {run.series('loss')[before[-1]]:.4g} at step {before[-1]}" if before else ""
        rate = _peak(run)
        shown = f", learning rate at most {rate:.4g}" if rate else ""
        yield Finding(
            "not-finite",
            "error",
            f"the {what} is not finite from step {steps[0]} on{until}{shown}",
            (steps[0], steps[-1]),
            _lower_rate(run),
        )
        return


def learning_rate(run: Run) -> Iterator[Finding]:
    """The rate is far from AdamW's rule, or the loss says that it is too high."""
    rate, rule = run.recipe.value("learning_rate") or _peak(run), _rule(run)
    diverged = _diverged(run)
    far = rate is not None and rule is not None and not 1 / RATE_MARGIN <= rate / rule <= RATE_MARGIN
    if any(finite(run)) or not (diverged or far):
        return
    by_rule = f"AdamW's rule gives about {rule:.2g} here" if rule else ""
    if not far or (diverged and rate < rule):
        yield Finding("learning-rate", "error", diverged, (run.last_step,), _lower_rate(run))
        return
    times = f"about {_digit(max(rate / rule, rule / rate)):g} times too {'high' if rate > rule else 'low'}"
    yield Finding(
        "learning-rate",
        "error" if diverged else "warning",
        f"the learning rate {rate:.4g} is {times}: {by_rule}" + (f"; {diverged}" if diverged else ""),
        (run.warmup_end,),
        (run.recipe.edit("learning_rate", _digit(rule), rate),),
    )


def gradient_clipping(run: Run) -> Iterator[Finding]:
    """Every gradient is clipped, so that none has a length of its own."""
    most = run.max_grad_norm
    norms = {step: norm for step, norm in run.series("grad_norm").items() if step > run.warmup_end}
    if not most or len(norms) < SPIKE_WINDOW:
        return
    clipped = [step for step, norm in norms.items() if norm > most]
    if len(clipped) < CLIPPED_SHARE * len(norms):
        return
    usual = _digit(quantiles(norms.values(), n=10)[-1], up=True)
    yield Finding(
        "gradient-clipping",
        "warning",
        f"{len(clipped)} of {len(norms)} logged gradient norms are above max_grad_norm {most:.4g} (median "
        f"{median(norms.values()):.2g}): the gradient's length is lost at every step",
        (clipped[0], clipped[-1]),
        (run.recipe.edit("max_grad_norm", usual, most),),
    )


def warmup(run: Run) -> Iterator[Finding]:
    """The peak of the learning rate comes too early, and the loss shows it."""
    asked, rates = run.recipe.value("warmup_steps"), run.series("lr")
    if asked is None and run.recipe.found and not run.recipe.lightning:
        asked = run.recipe.value("warmup_ratio") or 0
    if isinstance(asked, float) and 0 < asked < 1:  # warmup_ratio, and warmup_steps of transformers 5
        asked *= run.horizon
    steps = run.warmup_end if asked is None else asked
    first = min(rates, default=0)
    if not rates or steps >= max(WARMUP_SHARE * run.horizon, 1) or (asked is None and run.warmup_end > first):
        return
    early = [step for step in spike_steps(run, after=1) if step <= run.horizon / 4]
    norms = run.series("grad_norm")
    burst = first in norms and len(norms) >= SPIKE_WINDOW and norms[first] > 3 * median(norms.values())
    if not early and not burst and not run.sophia:
        return
    shown = "; the first gradients were the largest" if burst else ""
    if early:
        shown = f"; the loss jumped at step {early[0]}"
    yield Finding(
        "warm-up",
        "warning",
        f"warm-up of {f'{steps:.0f}' if asked is not None else f'at most {first}'} steps of {run.horizon}: the "
        f"learning rate is at its peak before h and the momentum are averages of anything{shown}",
        tuple(early[:1] or [first]),
        (run.recipe.edit("warmup_steps", min(2000, max(1, run.horizon // 10)), asked),),
    )


def spikes(run: Run) -> Iterator[Finding]:
    """The loss jumped: where, and what came before."""
    found = spike_steps(run)
    if not found:
        return
    loss, logged = run.series("loss"), list(run.series("loss"))
    parts = []
    for step in found[:3]:
        at = logged.index(step)
        usual = median(loss[s] for s in logged[max(0, at - SPIKE_WINDOW) : at])
        causes = _before(run, step, logged[at - 1])
        unknown = f"nothing logged tells why, look at the batches of steps {logged[at - 1] + 1} to {step}"
        parts.append(f"step {step} ({usual:.3g} → {loss[step]:.3g}): {', '.join(causes) or unknown}")
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    yield Finding(
        "spike", "warning", f"the loss jumped at {'; '.join(parts)}{more}", tuple(found), _calmer(run, found[0])
    )


def interrupted(run: Run) -> Iterator[Finding]:
    """The run ended before its last step."""
    if run.complete is not False or run.training:
        return
    of = f" of {run.max_steps}" if run.max_steps else ""
    ours = f": sophia train {run.folder / 'recipe.yaml'} goes on from the last checkpoint" if run.recipe.found else ""
    yield Finding(
        "interrupted",
        "warning",
        f"the last log is of step {run.last_step}{of}, and the run did not end{ours}",
        (run.last_step,),
    )


def spike_steps(run: Run, after: int = SPIKE_WINDOW) -> list[int]:
    """Steps whose loss is far above the logs before it; the first of a stretch. `after` logs must come before."""
    items = list(run.series("loss").items())
    changes = [abs(b - a) for (_, a), (_, b) in zip(items, items[1:], strict=False)]
    if len(changes) < SPIKE_WINDOW:
        return []
    found, high = [], False
    for i, (step, loss) in enumerate(items):
        usual = median(value for _, value in items[max(0, i - SPIKE_WINDOW) : i]) if i >= after else math.inf
        rises = loss - usual > max(SPIKE_RISE * abs(usual), SPIKE_NOISE * median(changes))
        if rises and not high:
            found.append(step)
        high = rises
    return found


def _before(run: Run, step: int, before: int) -> list[str]:
    """What the logs at `step` and `before`, the one before it, say of a spike."""
    said = []
    rates, norms, rate = run.series("lr"), run.series("grad_norm"), _peak(run)
    if rate and rates.get(before, 0.0) >= 0.9 * rate:
        said.append(f"the learning rate was at its peak of {rate:.3g}")
    for series, name, factor in ((norms, "gradient norm", 3.0), (run.series("sophia/win_rate"), "win rate", 0.5)):
        earlier = [value for s, value in series.items() if s < before]
        recent = [series[s] for s in (before, step) if s in series]
        if not earlier or not recent:
            continue
        usual = median(earlier[-SPIKE_WINDOW:])
        moved = max(recent) if factor > 1 else min(recent)
        if (moved > factor * usual) if factor > 1 else (moved < factor * usual):
            said.append(f"the {name} went from {usual:.2g} to {moved:.2g}")
    dropped = run.series("sophia/hessian_skipped")
    if dropped.get(step, 0.0) > dropped.get(before, 0.0):
        said.append(f"a Hessian estimate was dropped after step {before}")
    return said


def _calmer(run: Run, step: int) -> tuple[Edit, ...]:
    """Against a spike: a clip near the usual gradient norm where there is none near it, half the rate at its peak."""
    norms = [norm for s, norm in run.series("grad_norm").items() if s < step]
    most, rate = run.max_grad_norm, _peak(run)
    edits = []
    if norms and run.recipe.found and (not most or most > 3 * median(norms)):
        edits.append(run.recipe.edit("max_grad_norm", _digit(1.5 * median(norms), up=True)))
    if rate and run.series("lr").get(step, 0.0) >= 0.9 * rate:
        edits.append(run.recipe.edit("learning_rate", _digit(rate / 2), rate))
    return tuple(edits)


def _diverged(run: Run) -> str:
    """How the loss says that the run came to nothing; empty where it does not."""
    loss = list(run.series("loss").values())
    if len(loss) < 2 * SPIKE_WINDOW:
        return ""
    first, best, last = loss[0], min(loss), median(loss[-3:])
    if sum(value > DIVERGED * first > 0 for value in loss) >= SPIKE_WINDOW:
        return f"the loss rose from {first:.4g} to {max(loss):.4g}"
    if last >= first:
        return f"the loss did not fall: {first:.4g} at the first log, {last:.4g} at the last"
    if last - best > (first - best) / 2:
        return f"the loss fell from {first:.4g} to {best:.4g} and rose to {last:.4g} again"
    return ""


def _peak(run: Run) -> float | None:
    """The highest learning rate that was logged, else the recipe's."""
    return max(run.series("lr").values(), default=None) or run.recipe.value("learning_rate")


def _rule(run: Run) -> float | None:
    """About the learning rate that AdamW's rule gives for this model and optimizer; None where its size is unknown."""
    if not _is_ruled(run):
        return None
    factor = _factor(run)
    if run.recipe.value("pretrained"):
        return factor * FINE_TUNING_RATES["adapters" if run.recipe.value("peft") else "full"]
    size = run.summary.get("parameters")
    if not size:
        return None
    (small, rate), *larger = ADAMW_RATES
    if size <= small:
        return factor * rate
    for big, at in larger:
        if size <= big:
            share = math.log(size / small) / math.log(big / small)
            return factor * rate * (at / rate) ** share
        small, rate = big, at
    return factor * rate


def _lower_rate(run: Run) -> tuple[Edit, ...]:
    """The rule's rate where it is lower than the run's, a tenth of a rate that is as low already, and where there is no
    rule for this run, why."""
    rate, rule = _peak(run), _rule(run)
    if not rate:
        return ()
    lower: float | str = _no_rule(run) if rule is None else _digit(rule if rule < rate / 2 else rate / 10)
    return (run.recipe.edit("learning_rate", lower, rate),)


def _no_rule(run: Run) -> str:
    """Why `_rule` knows none, and what it would say."""
    if run.optimizer and not _is_ruled(run):
        return f"lower; how much is not known here: the rule of thumb is AdamW's, and says nothing of {run.optimizer}"
    rates = ", ".join(f"{_factor(run) * rate:.2g} at {size / 1e6:g}M" for size, rate in ADAMW_RATES)
    return f"by the model's size, which is not known here: AdamW's rule gives {rates} parameters"


def _is_ruled(run: Run) -> bool:
    """Whether the rule speaks of the run's optimizer."""
    return any(name in (run.optimizer or "").lower() for name in ("adamw", "sophia"))


def _factor(run: Run) -> float:
    """The rule's rate in multiples of AdamW's."""
    return PAPER_FACTOR if "sophia" in (run.optimizer or "").lower() and not run.eigen else 1.0


def _digit(value: float, up: bool = False) -> float:
    """To one digit, upwards if asked."""
    power = 10.0 ** math.floor(math.log10(value))
    return float(f"{(math.ceil(value / power - 1e-9) if up else round(value / power)) * power:.1g}")
