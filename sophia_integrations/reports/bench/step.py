"""`optimizer.step()` on the shapes of a GPT-2, without a model: our backends, torch's AdamW and other packages."""

from __future__ import annotations

import importlib
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...optim import Estimate, SophiaG
from .timing import in_turns, ratio, sums

SIZES = {"10m": (6, 320, 8_192, 512), "124m": (12, 768, 50_257, 1_024)}
"""Blocks, width, vocabulary and positions."""

CYCLE = 10
"""Steps from one estimate of h to the next."""

_LR = 1e-6


def measure(size: str, dtype: str, device: str, cycles: int) -> dict[str, Any]:
    """Times and ratios to `AdamW(fused=True)`.

    All optimizers train the same parameters with the same gradients, each with its own state. An estimate is given to
    Sophia at every tenth step: what is timed is the step, not the pass.
    """
    if size not in SIZES:
        raise UserError(f"--size {size}: bench step knows {' and '.join(SIZES)}.")
    params = _parameters(size, getattr(torch, dtype), device)
    runs = {name: make(params) for name, make in _arms(device).items()}
    for run in runs.values():
        run()
    seconds = in_turns(runs, CYCLE * cycles, device)
    first = next(iter(runs))
    rows = []
    for name, own in seconds.items():
        ordinary = [i for i in range(len(own)) if i % CYCLE != CYCLE - 1]
        base = seconds[first]
        rows.append(
            {
                "optimizer": name,
                "ms a step": 1000 * statistics.median(own[i] for i in ordinary),
                "ratio": ratio([own[i] for i in ordinary], [base[i] for i in ordinary]),
                "ms with an estimate": 1000 * statistics.median(own[CYCLE - 1 :: CYCLE]),
                "ratio over 10 steps": ratio(sums(own, CYCLE), sums(base, CYCLE)),
            }
        )
    count = sum(p.numel() for p in params)
    return {
        "title": f"step(), {count / 1e6:.1f}M {dtype} parameters in {len(params)} tensors, ratios to {first}",
        "size": size,
        "dtype": dtype,
        "rows": rows,
    }


def _parameters(size: str, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    blocks, width, vocabulary, positions = SIZES[size]
    block = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,), (width,), (width,)]
    block += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in [(vocabulary, width), (positions, width), *blocks * block, (width,), (width,)]:
        param = nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        param.grad = torch.randn(shape, generator=generator).to(device, dtype)
        params.append(param)
    return params


class _Given:
    """An estimator that costs nothing."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        generator = torch.Generator().manual_seed(1)
        draws = (torch.rand(p.shape, generator=generator).mul_(8).to(p.device) for p in params)
        self._estimate = Estimate(dict(zip(params, draws, strict=True)), 1)

    def arm(self, due: bool) -> None:
        pass

    def estimate(self, params: Sequence[Tensor], step: int) -> Estimate:
        return self._estimate


Arm = Callable[[list[nn.Parameter]], Callable[[], object]]


def _arms(device: str) -> dict[str, Arm]:
    adamw = torch.optim.AdamW
    arms: dict[str, Arm] = {
        "AdamW fused": lambda params: adamw(params, lr=_LR, fused=True).step,
        "AdamW foreach": lambda params: adamw(params, lr=_LR, foreach=True).step,
        "SophiaG": lambda params: _sophia(params, None),
        "SophiaG fused=False": lambda params: _sophia(params, False),
    }
    if _importable("sophia_opt"):
        arms["sophia-opt SophiaG"] = _official
    if _importable("pytorch_optimizer"):
        arms["pytorch_optimizer SophiaH"] = _sophia_h
        arms["pytorch_optimizer Lion"] = _lion
    return arms


def _importable(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def _sophia(params: list[nn.Parameter], fused: bool | None) -> Callable[[], object]:
    return SophiaG(params, lr=_LR, hessian_interval=CYCLE, estimator=_Given(params), fused=fused).step


def _official(params: list[nn.Parameter]) -> Callable[[], object]:
    """With `update_hessian` before every tenth step, from the gradients that are there."""
    optimizer = importlib.import_module("sophia_opt").SophiaG(params, lr=_LR)

    def with_estimate() -> None:
        optimizer.update_hessian()
        optimizer.step()

    return _alternating(optimizer.step, with_estimate)


def _sophia_h(params: list[nn.Parameter]) -> Callable[[], object]:
    optimizer = importlib.import_module("pytorch_optimizer").SophiaH(params, lr=_LR, update_period=10**9)
    given = [torch.rand_like(p) for p in params]
    return _alternating(optimizer.step, lambda: optimizer.step(hessian=given))


def _lion(params: list[nn.Parameter]) -> Callable[[], object]:
    return importlib.import_module("pytorch_optimizer").Lion(params, lr=_LR).step


def _alternating(ordinary: Callable[[], object], with_estimate: Callable[[], object]) -> Callable[[], object]:
    """Every tenth call is `with_estimate`, from the first."""
    calls = itertools.count()
    return lambda: ordinary() if next(calls) % CYCLE else with_estimate()
