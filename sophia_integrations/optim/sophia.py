"""The Sophia optimizer: momentum over a running Hessian diagonal, clipped; it never sees a model or a batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .checks import (
    check_hyperparameters,
    check_loadable,
    check_parameter,
    warn_caller,
    warn_changed_hyperparameters,
)
from .estimator import Estimate, HessianEstimator
from .functional import sophia_update
from .sharding import local
from .statistics import curvature_statistics, total

_COUNTERS = ("step", "hessian_updates", "hessian_skipped", "hessian_step")


class SophiaG(Optimizer):
    r"""Sophia with the Gauss-Newton-Bartlett estimator (arXiv 2305.14342, Algorithms 2 and 3).

    At step t, with gradient g and, every `hessian_interval` steps, an estimate ĥ of the Hessian diagonal::

        h ← β₂ h + (1 − β₂) ĥ                      only when t mod k = 0, before the update
        m ← β₁ m + (1 − β₁) g
        θ ← θ − lr · λ · θ
        θ ← θ − lr · clip(m / max(ρ h, ε), −1, 1)

    State per parameter: `exp_avg` (m) and `hessian` (h), float32 also for bf16 and fp16 parameters. The number
    of predictions is part of ĥ, so ρ keeps its meaning for every batch size and world size.

    Args:
        params: parameters, named parameters or groups of them; every hyperparameter may differ by group,
            except `hessian_interval`.
        lr: learning rate per step, a float or a 0-dim tensor; the largest change of a coordinate in one step.
        betas: β₁ of the momentum, β₂ of the Hessian average.
        rho: ρ. Larger clips less; tune it until `stats()["win_rate"]` is 0.1 to 0.5.
        eps: floor of ρ·h. Coordinates with almost no curvature move by at most lr · |m| / eps.
        weight_decay: λ, decoupled.
        hessian_interval: k, steps between two estimates.
        estimator: supplies ĥ, for example `GaussNewtonBartlett(model)`. Without one, call `update_hessian`.
        maximize: ascend instead of descend.

    Raises:
        ValueError: a hyperparameter out of range, or a sparse, complex or integer parameter.

    Example:
        >>> import torch
        >>> from sophia_integrations import GaussNewtonBartlett, SophiaG
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = SophiaG(model.parameters(), lr=1e-3, estimator=GaussNewtonBartlett(model))
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> optimizer.step()
        >>> optimizer.stats()["hessian_updates"]
        1
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        *,
        hessian_interval: int = 10,
        estimator: HessianEstimator | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            hessian_interval=hessian_interval,
            maximize=maximize,
            **dict.fromkeys(_COUNTERS, 0),
        )
        check_hyperparameters(defaults)
        self._set_session(estimator)
        super().__init__(params, defaults)
        self._arm()

    def _set_session(self, estimator: HessianEstimator | None) -> None:
        """What lives for this process only: all that training needs to go on is in the state dict."""
        self._estimator = estimator
        self.hessian_seconds = 0.0
        self._bad_coordinates: dict[torch.device, Tensor] = {}
        self._warned_bad = False
        self._last_drop = "no estimator was given and update_hessian() was never called"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "hessian_seconds"):
            self._set_session(None)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    @property
    def estimator(self) -> HessianEstimator | None:
        """Where ĥ comes from; assign to attach another one."""
        return self._estimator

    @estimator.setter
    def estimator(self, estimator: HessianEstimator | None) -> None:
        self._estimator = estimator
        self._arm()

    @property
    def hessian_due(self) -> bool:
        """Whether the next `step()` refreshes h: every k steps, and at once while there is no estimate yet."""
        group = self.param_groups[0]
        return group["step"] % group["hessian_interval"] == 0 or group["hessian_updates"] == 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `torch.optim.Optimizer` does, refusing parameters and values that Sophia cannot use."""
        super().add_param_group(param_group)
        group, first = self.param_groups[-1], self.param_groups[0]
        try:
            check_hyperparameters(group)
            for param in group["params"]:
                check_parameter(param)
            if group["hessian_interval"] != first["hessian_interval"]:
                raise ValueError("hessian_interval must be one value for all groups: there is one Hessian pass.")
        except ValueError:
            self.param_groups.pop()
            raise
        for key in _COUNTERS:
            group[key] = first[key]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; refreshes h first when it is due.

        Args:
            closure: recomputes the loss and the gradients, as for every torch optimizer.

        Returns:
            The closure's value, or None.

        Raises:
            RuntimeError: `hessian_interval` steps have passed without any estimate; a gradient is sparse.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        if self._estimator is not None and self.hessian_due:
            self._refresh()
        self._refuse_signum()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        self._count("step")
        self._warn_bad_coordinates()
        self._arm()
        return value

    @torch.no_grad()
    def update_hessian(self, num_predictions: float) -> None:
        """Fold `num_predictions · grad²` into h: the official loop's manual way.

        Call it after the backward pass of the *mean* loss over labels sampled from the model's own output,
        then clear the gradients. The product is the paper's Algorithm 2.

        Args:
            num_predictions: predictions in that mean (rows × positions that are not masked), over all ranks.

        Raises:
            ValueError: `num_predictions` is not a positive finite number.
        """
        if not (math.isfinite(num_predictions) and num_predictions > 0):
            raise ValueError(f"num_predictions must be a positive number, got {num_predictions}.")
        with_grad = [p for p in self._trainable() if p.grad is not None]
        diagonal = {p: p.grad.to(_state_dtype(p)).square().mul_(num_predictions) for p in with_grad}
        if not diagonal:
            self._fold(Estimate(None, dropped="no parameter has a gradient"))
        elif not all(torch.isfinite(local(x)).all() for x in diagonal.values()):
            self._fold(Estimate(None, dropped="it was not finite"))
        else:
            self._fold(Estimate(diagonal, int(num_predictions)))

    @torch.no_grad()
    def stats(self) -> dict[str, Any]:
        """Diagnostics of the last step; tensors stay on their device until read, nothing is computed before.

        With sharded parameters every rank must call it, as they add up their shards.

        Returns:
            `win_rate`: share of coordinates that are not clipped, |m| < ρh; healthy is 0.1 to 0.5.
            `hessian_norm`, `hessian_zero_fraction`, `hessian_quantiles`: the size of h, in loss / θ²
                (`optim.statistics.QUANTILES`).
            `hessian_age`: steps since the last estimate; None before the first.
            `hessian_updates`, `hessian_skipped`: estimates made and dropped since the run began.
            `hessian_seconds`: time spent in Hessian passes by this process.
            `nonfinite_gradients`: coordinates left untouched by this process because their gradient was not finite.
        """
        group = self.param_groups[0]
        return {
            **curvature_statistics(self.param_groups, self.state),
            "hessian_age": group["step"] - 1 - group["hessian_step"] if group["hessian_updates"] else None,
            "hessian_updates": group["hessian_updates"],
            "hessian_skipped": group["hessian_skipped"],
            "hessian_seconds": self.hessian_seconds,
            "nonfinite_gradients": total(list(self._bad_coordinates.values())),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, keeping m and h in float32 whatever the parameters' dtype.

        Groups saved by an older version get today's defaults for what they lack. Saved hyperparameters replace
        the ones given to the constructor, as in every torch optimizer; a difference is warned about.

        Raises:
            ValueError: the checkpoint belongs to another optimizer, or its groups do not match.
        """
        check_loadable(state_dict, self._all_params())
        warn_changed_hyperparameters(self.param_groups, state_dict["param_groups"])
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, param in zip(saved_ids, self._all_params(), strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    restored = torch.zeros_like(param, dtype=_state_dtype(param), memory_format=torch.preserve_format)
                    self.state[param][key] = restored.copy_(value)
        self._arm()

    def _refresh(self) -> None:
        started = self._clock()
        self._fold(self._estimator.estimate(self._trainable(), self.param_groups[0]["step"]))
        self.hessian_seconds += self._clock() - started

    def _fold(self, estimate: Estimate) -> None:
        if not estimate.captured and not any(group["lr"] for group in self.param_groups):
            return  # torch.distributed.checkpoint makes a step with lr 0 and no batch, only to create the state
        if estimate.diagonal is None:
            self._count("hessian_skipped")
            self._last_drop = estimate.dropped or "the estimate was dropped"
            step = self.param_groups[0]["step"]
            if step % self.param_groups[0]["hessian_interval"] == 0:
                warn_caller(f"Sophia made no Hessian estimate at step {step}: {self._last_drop}.")
            return
        for group in self.param_groups:
            beta2 = group["betas"][1]
            for param in group["params"]:
                if param in estimate.diagonal:
                    h = self._state_of(param)["hessian"]
                    local(h).mul_(beta2).add_(local(estimate.diagonal[param]), alpha=1 - beta2)
        for group in self.param_groups:
            group["hessian_step"] = group["step"]
        self._count("hessian_updates")

    def _refuse_signum(self) -> None:
        group = self.param_groups[0]
        if group["hessian_updates"] == 0 and group["step"] >= group["hessian_interval"]:
            raise RuntimeError(
                f"Sophia has made {group['step']} steps without a single Hessian estimate, so it would be sign "
                f"momentum under another name. Cause: {self._last_drop}."
            )

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        if param.grad.layout != torch.strided:
            raise RuntimeError("Sophia does not support sparse gradients; use sparse=False in the embedding layer.")
        state = self._state_of(param)
        bad = sophia_update(
            local(param),
            local(param.grad),
            local(state["exp_avg"]),
            local(state["hessian"]),
            lr=group["lr"],
            beta1=group["betas"][0],
            rho=group["rho"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )
        earlier = self._bad_coordinates.get(param.device)
        self._bad_coordinates[param.device] = bad if earlier is None else earlier.add_(bad)

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        for key in ("exp_avg", "hessian"):
            if key not in state:
                state[key] = torch.zeros_like(param, dtype=_state_dtype(param), memory_format=torch.preserve_format)
        return state

    def _count(self, counter: str) -> None:
        value = self.param_groups[0][counter] + 1
        for group in self.param_groups:
            group[counter] = value

    def _arm(self) -> None:
        if self._estimator is not None:
            self._estimator.arm(self.hessian_due)

    def _warn_bad_coordinates(self) -> None:
        """One warning a process; reading the count waits for the device, so elsewhere only at a refresh."""
        at_refresh = self.param_groups[0]["step"] % self.param_groups[0]["hessian_interval"] == 1
        for device, count in self._bad_coordinates.items():
            if not self._warned_bad and (device.type == "cpu" or at_refresh) and count > 0:
                self._warned_bad = True
                warn_caller(
                    f"{int(count)} gradient coordinates were not finite by step {self.param_groups[0]['step']}; "
                    "Sophia left those parameters as they were. stats()['nonfinite_gradients'] keeps count."
                )

    def _clock(self) -> float:
        for param in self._all_params():
            if param.device.type == "cuda":
                torch.cuda.synchronize(param.device)
            break
        return time.perf_counter()

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _trainable(self) -> list[Tensor]:
        return [p for p in self._all_params() if p.requires_grad]


def _state_dtype(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)
