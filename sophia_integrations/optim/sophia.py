"""The Sophia optimizer: momentum over a running Hessian diagonal, clipped; it never sees a model or a batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .basis import known_bases, turn_bases
from .checkpoint import exactly_loaded, saved_with
from .checks import check_group, check_hyperparameters, refuse_sparse_gradients, warn_caller
from .estimator import Estimate, HessianEstimator
from .functional import fold, squared_gradients, update_groups
from .groups import completed
from .later import Stopwatch
from .nonfinite import NonFiniteGradients
from .progress import Progress, taken_from
from .rule import Rule
from .sharding import equal_on_all_ranks
from .staleness import is_stale, refuse_stale_curvature
from .state import no_autocast, sophia_members
from .statistics import curvature_statistics
from .trust import UNCLIPPED, deciles_of, measured_ratios, set_rho

Value = TypeVar("Value")


class SophiaG(Optimizer):
    r"""Sophia with the Gauss-Newton-Bartlett estimator (arXiv 2305.14342, Algorithms 2 and 3).

    At step t, with gradient g and, every `hessian_interval` steps, an estimate ĥ of the Hessian diagonal::

        h ← β₂ h + (1 − β₂) ĥ                      only when t mod k = 0, before the update
        m ← β₁ m + (1 − β₁) g
        θ ← θ − lr · λ · θ
        θ ← θ − lr · clip(m / max(ρ h, ε), −1, 1)

    State per parameter: `exp_avg` (m) and `hessian` (h), float32 also for bf16 and fp16 parameters. The number of
    predictions is part of ĥ, so ρ keeps its meaning for every batch and world size; `progress` has what a run counts.

    With `basis="eigen"` the clip is taken in the eigenbasis of the matrix (`optim.basis`), h is the diagonal there, and
    the state has factors and eigenvectors besides::

        θ ← θ − lr · Q_L clip(Q_Lᵀ m Q_R / max(ρ h, c √(h/N), ε), −1, 1) Q_Rᵀ

    A group with `update="adamw"` is updated by torch's AdamW; `param_groups(model)` makes both kinds.

    Args:
        params: parameters or groups of them, named or not; all but `hessian_interval` may differ by group.
        lr: learning rate per step, a float or a 0-dim tensor: the largest change of a coordinate.
        betas: β₁ of the momentum, β₂ of the Hessian average.
        rho: ρ. Larger clips less. "auto" sets it after each estimate so that the share of `unclipped` is left alone.
        eps: floor of ρ·h. Coordinates with almost no curvature move by at most lr · |m| / eps.
        weight_decay: λ, decoupled.
        hessian_interval: k, steps between two estimates.
        estimator: supplies ĥ, for example `GaussNewtonBartlett(model)`. Without one, call `update_hessian`.
        maximize: ascend.
        nesterov: follow β₁ m + (1 − β₁) g instead of m.
        bias_correction: divide m by 1 − β₁ᵗ, and h by 1 − β₂ⁿ after n estimates.
        noise_floor: c, for a denominator of at least c √(h/N): h/N is the variance of a gradient of N predictions.
        unclipped: for rho="auto", the share of coordinates to leave alone at the peak of the learning rate, and at 0.
        momentum_dtype: "bfloat16" keeps m in two bytes a parameter, stochastically rounded (`optim.rounding`).
        basis: None for the coordinates of the weights, "eigen" for the eigenbasis of matrices.
        basis_interval: steps between two refreshes of the eigenvectors, after `basis_warmup` steps with one each.
        basis_beta: decay of the factors.
        basis_factor_interval: steps between two gradients that the factors see, after `basis_warmup` steps with all.
        basis_max_dim: p, longest piece of a side, for at most 2p (1/rows + 1/columns) numbers of state an element; by
            default the shorter side of the matrix, at least 128.
        basis_flatten: take tensors of three dimensions for convolutions, [rows, rest], not for batches of matrices.
        fused: None takes the compiled step on a CPU that has a compiler, torch operations elsewhere. True insists on a
            fused step, Triton's on a GPU; False is torch operations. It is no part of a checkpoint.

    Raises:
        ValueError: a hyperparameter out of range; a sparse, complex or integer parameter; basis="eigen" without a
            matrix; fused=True where a parameter's device or dtype, or a missing compiler, allows none.

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
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float | str = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        *,
        hessian_interval: int = 10,
        estimator: HessianEstimator | None = None,
        maximize: bool = False,
        nesterov: bool = False,
        bias_correction: bool = False,
        noise_floor: float = 0.0,
        unclipped: tuple[float, float] = UNCLIPPED,
        momentum_dtype: str = "float32",
        basis: str | None = None,
        basis_interval: int = 10,
        basis_warmup: int = 100,
        basis_beta: float = 0.95,
        basis_factor_interval: int = 1,
        basis_max_dim: int | None = None,
        basis_flatten: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = dict(
            update="sophia",
            lr=lr,
            betas=betas,
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            hessian_interval=hessian_interval,
            maximize=maximize,
            nesterov=nesterov,
            bias_correction=bias_correction,
            noise_floor=noise_floor,
            unclipped=unclipped,
            momentum_dtype=momentum_dtype,
            basis=basis,
            basis_interval=basis_interval,
            basis_warmup=basis_warmup,
            basis_beta=basis_beta,
            basis_factor_interval=basis_factor_interval,
            basis_max_dim=basis_max_dim,
            basis_flatten=basis_flatten,
        )
        check_hyperparameters(defaults)
        self.progress = Progress()
        self._set_session(estimator, fused)
        super().__init__(params, defaults)
        self._arm()

    def _set_session(self, estimator: HessianEstimator | None, fused: bool | None) -> None:
        """What lives for this process only; the rest is in the state dict."""
        self._estimator, self._fused = estimator, fused
        self._watch = Stopwatch()
        self._nonfinite = NonFiniteGradients()
        self._last_drop = "no estimator was given and update_hessian() was never called"
        self._ratios: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        own = ("progress", "_estimator", "_fused")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "progress"):
            self.progress = taken_from([self.defaults, *self.param_groups])
        for group in self.param_groups:
            group.update({**self.defaults, **group})
        if not hasattr(self, "_watch"):
            self._set_session(state.get("_estimator"), state.get("_fused"))
            self._arm()

    @property
    def estimator(self) -> HessianEstimator | None:
        """Where ĥ comes from; assign to attach another one."""
        return self._estimator

    @estimator.setter
    def estimator(self, estimator: HessianEstimator | None) -> None:
        self._estimator = estimator
        self._arm()

    @property
    def hessian_seconds(self) -> float:
        """Time spent in Hessian passes by this process; on a GPU reading it waits for the last one."""
        return self._watch.seconds

    @property
    def hessian_due(self) -> bool:
        """Whether the next `step()` refreshes h: every k steps, and at once while there is no estimate yet."""
        return self._begins_interval or self.progress.hessian_updates == 0

    @property
    def _interval(self) -> int:
        return self.param_groups[0]["hessian_interval"]

    @property
    def _begins_interval(self) -> bool:
        return self.progress.step % self._interval == 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `torch.optim.Optimizer` does, refusing parameters and values that Sophia cannot use.

        A group with `lr_scale` and no `lr` gets that multiple of the optimizer's.
        """
        super().add_param_group(completed(param_group, self.defaults["lr"]))
        taken_from(self.param_groups[-1:])
        try:
            check_group(self.param_groups[-1], self._interval, self._fused)
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Value]) -> Value: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; refreshes h first when it is due.

        Args:
            closure: recomputes the loss and the gradients, as for every torch optimizer.

        Returns:
            The closure's value, or None.

        Raises:
            RuntimeError: `hessian_interval` steps without any estimate, or 5 times as many without another one; a
                gradient is sparse.
        """
        value = None if closure is None else torch.enable_grad()(closure)()
        with no_autocast(self.param_groups):
            self._advance()
        return value

    def _advance(self) -> None:
        groups, states, progress = self.param_groups, self.state, self.progress
        refuse_sparse_gradients(groups)
        last_chance = is_stale(progress, self._interval)
        if last_chance:
            self._refresh_when_due()
        refuse_stale_curvature(progress, self._interval, self._last_drop, self._estimator is not None)
        ranks = getattr(self._estimator, "process_group", None)
        turn_bases(groups, states, progress.step, functools.partial(equal_on_all_ranks, group=ranks))
        if not last_chance:
            self._refresh_when_due()
        measured = self._begins_interval or progress.hessian_step == progress.step
        if measured:
            self._ratios = measured_ratios(groups, states, progress, known_bases(groups, states))
            set_rho(groups, progress, self._ratios)
        for bad in update_groups(groups, states, progress, measured, self._fused):
            self._nonfinite.add(bad)
        progress.step += 1
        self._nonfinite.warn(progress.step, wait=progress.step % self._interval == 1)
        self._arm()

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
        with no_autocast(self.param_groups):
            self._take(squared_gradients(self.param_groups, self.state, num_predictions))

    @torch.no_grad()
    def stats(self) -> dict[str, Any]:
        """Diagnostics: of the clip at the last refresh, of h now; tensors stay on their device until read.

        With sharded parameters every rank must call it, as they add up their shards.

        Returns:
            `win_rate`: share of Sophia's coordinates that the clip left alone at the last refresh,
                |m| < max(ρh, c √(h/N), ε).
            `curvature_share`: share of those whose denominator was ρh.
            `rho`: ρ of the first Sophia group, as given or as rho="auto" has set it.
            `hessian_norm`, `hessian_zero_fraction`, `hessian_quantiles`: of h, in loss / θ² (`optim.statistics`).
            `ratio_quantiles`: of |m|/h at the last refresh in this process, the values of ρ that would leave 10, 20, …,
                90 % alone; None before it.
            `hessian_age`: steps since the last estimate; None before the first.
            `hessian_updates`, `hessian_skipped`: estimates made and dropped since the run began.
            `hessian_seconds`: time spent in Hessian passes by this process.
            `nonfinite_gradients`: coordinates left untouched by this process because their gradient was not finite.
        """
        progress, members = self.progress, list(sophia_members(self.param_groups))
        return {
            "win_rate": progress.win_rate,
            "curvature_share": progress.curvature_share,
            "rho": Rule.of(members[0][1], progress).rho if members else 0.0,
            **curvature_statistics([p for p, _ in members], self.state),
            "ratio_quantiles": deciles_of(self._ratios),
            "hessian_age": progress.step - 1 - progress.hessian_step if progress.hessian_updates else None,
            "hessian_updates": progress.hessian_updates,
            "hessian_skipped": progress.hessian_skipped,
            "hessian_seconds": self.hessian_seconds,
            "nonfinite_gradients": self._nonfinite.total(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        with saved_with(self.progress, self):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, keeping m and h in float32 whatever the parameters' dtype.

        Groups of an older version get today's defaults for what they lack. Saved hyperparameters replace those of the
        constructor, and a difference is warned about. Pre-hooks see the checkpoint first, and may convert it.

        Raises:
            ValueError: the checkpoint belongs to another optimizer or another basis, or its groups do not match.
        """
        with exactly_loaded(self):
            super().load_state_dict(state_dict)
        self._arm()

    def _refresh_when_due(self) -> None:
        if self._estimator is None or not self.hessian_due:
            return
        self._watch.start(self.param_groups[0]["params"][0].device)
        bases = known_bases(self.param_groups, self.state)
        coordinates = {"coordinates": bases} if bases else {}
        trainable = [p for p, _ in sophia_members(self.param_groups) if p.requires_grad]
        self._take(self._estimator.estimate(trainable, self.progress.step, **coordinates))
        self._watch.stop()

    def _take(self, estimate: Estimate) -> None:
        progress = self.progress
        if not estimate.captured and not any(group["lr"] for group in self.param_groups):
            return  # torch.distributed.checkpoint makes a step with lr 0 and no batch, only to create the state
        if estimate.diagonal is not None:
            return fold(self.param_groups, self.state, progress, estimate)
        progress.hessian_skipped += 1
        self._last_drop = estimate.dropped or "the estimate was dropped"
        if self._begins_interval:
            warn_caller(f"Sophia made no Hessian estimate at step {progress.step}: {self._last_drop}.")

    def _arm(self) -> None:
        if self._estimator is not None:
            self._estimator.arm(self.hessian_due)
