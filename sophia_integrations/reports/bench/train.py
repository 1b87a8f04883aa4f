"""A whole training step of the default recipe's optimizer beside AdamW's, and what the difference is made of."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...curvature import GaussNewtonBartlett
from ...optim import SophiaG, param_groups
from ...optim.basis import average, batches, carry_hessian, into, known_bases, out_of
from ...optim.eigenvectors import refresh
from ...optim.state import sophia_members
from .models import task
from .step import CYCLE
from .timing import in_turns, ratio, seconds_of, sums

_LR = 1e-6
_REPEATS = 3


def measure(size: str, device: str, cycles: int) -> dict[str, Any]:
    """Forward, backward, clip and step under AdamW and under Sophia in the eigenbasis, in cycles of `CYCLE` steps.

    A cycle has one Hessian pass and, as after warm-up, one refresh of the eigenvectors. The parts are timed by
    themselves on copies of the state and given as shares of an AdamW training step.
    """
    ours, theirs = task(size, device), task(size, device)
    adamw = torch.optim.AdamW(theirs.model.parameters(), lr=_LR, fused=True)
    groups = param_groups(ours.model, basis="eigen")
    sophia = SophiaG(groups, lr=_LR, basis_warmup=0, estimator=GaussNewtonBartlett(ours.model))

    def adamw_step() -> None:
        theirs.backward()
        adamw.step()

    def sophia_step() -> None:
        ours.backward()
        sophia.step()

    runs: dict[str, Callable[[], object]] = {"AdamW fused": adamw_step, "SophiaG eigen": sophia_step}
    in_turns(runs, 1, device)
    spent = sophia.hessian_seconds
    seconds = in_turns(runs, CYCLE * cycles, device)
    base = statistics.median(seconds["AdamW fused"])
    parts = {"pass": (sophia.hessian_seconds - spent) / (CYCLE * cycles), **_parts(sophia, device)}
    whole = ratio(sums(seconds["SophiaG eigen"], CYCLE), sums(seconds["AdamW fused"], CYCLE))
    rows: list[dict[str, Any]] = []
    for name, own in seconds.items():
        per_step = statistics.median(sums(own, CYCLE)) / CYCLE
        rows.append(
            {
                "part": name,
                "ms a step": 1000 * per_step,
                "of AdamW's": whole if own is not seconds["AdamW fused"] else 1.0,
            }
        )
    rows += [{"part": f"  {name}", "ms a step": 1000 * each, "of AdamW's": each / base} for name, each in parts.items()]
    title = f"training step, GPT-2 {size}, {ours.tokens:,} tokens, pass and refresh every {CYCLE} steps"
    return {"title": title, "size": size, "rows": rows}


def _parts(sophia: SophiaG, device: str) -> dict[str, float]:
    """Seconds a step of the products into and out of the eigenbasis, of the factors, and of QR (the refresh)."""
    state: dict[Tensor, dict[str, Tensor]] = {p: copy.deepcopy(s) for p, s in sophia.state.items()}
    bases = known_bases(sophia.param_groups, state)
    known, moments = list(bases.values()), [state[param]["exp_avg"] for param in bases]
    group = next(group for _, group in sophia_members(sophia.param_groups))

    def products() -> None:
        for members in batches(known, moments, "basis"):
            some = [known[i] for i in members]
            out_of(some, into(some, [moments[i] for i in members]))

    def factors() -> None:
        average(known, [param.grad for param in bases], 0.9)

    def turn() -> None:
        carry_hessian(known, refresh([side for basis in known for side in basis.sides()]))

    found = {}
    with torch.no_grad():
        for name, run, every in (
            ("products", products, 1),
            ("factors", factors, group["basis_factor_interval"]),
            ("QR", turn, CYCLE),
        ):
            run()
            found[name] = statistics.median(seconds_of(run, device) for _ in range(_REPEATS)) / every
    return found
