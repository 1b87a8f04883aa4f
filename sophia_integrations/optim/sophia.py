"""The Sophia optimizer: momentum over a running Hessian diagonal, clipped; it never sees a model or a batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import adamw
from .basis import Basis, Layout, layout_of, refresh
from .checks import check_group, check_hyperparameters, check_loadable, warn_caller, warn_changed_hyperparameters
from .estimator import Estimate, HessianEstimator
from .functional import Rule, Tally, eigenbasis_update, sophia_update, usable_gradient
from .sharding import SumOverShards, equal_on_all_ranks, local
from .statistics import curvature_statistics, total
from .trust import UNCLIPPED, log_ratio_histogram, quantile_of, share_at

_COUNTERS = {
    "step": 0,
    "hessian_updates": 0,
    "hessian_skipped": 0,
    "hessian_step": 0,
    "batch_predictions": 0,
    "auto_rho": 0.0,
    "peak_lr": 0.0,
    "win_rate": 0.0,
    "curvature_share": 0.0,
}
"""What the run knows of itself; equal in all groups, and part of them so that every kind of checkpoint has it."""

_WARN_AFTER, _RAISE_AFTER = 2, 5
"""Intervals without an estimate until a sentence, and until an error."""


class SophiaG(Optimizer):
    r"""Sophia with the Gauss-Newton-Bartlett estimator (arXiv 2305.14342, Algorithms 2 and 3).

    At step t, with gradient g and, every `hessian_interval` steps, an estimate ĥ of the Hessian diagonal::

        h ← β₂ h + (1 − β₂) ĥ                      only when t mod k = 0, before the update
        m ← β₁ m + (1 − β₁) g
        θ ← θ − lr · λ · θ
        θ ← θ − lr · clip(m / max(ρ h, ε), −1, 1)

    State per parameter: `exp_avg` (m) and `hessian` (h), float32 also for bf16 and fp16 parameters. The number
    of predictions is part of ĥ, so ρ keeps its meaning for every batch size and world size.

    With `basis="eigen"` the clip is taken in the eigenbasis of the matrix (`optim.basis`), h is the diagonal there, and
    the state has factors and eigenvectors besides::

        θ ← θ − lr · Q_L clip(Q_Lᵀ m Q_R / max(ρ h, c √(h/N), ε), −1, 1) Q_Rᵀ

    A group with `update="adamw"` is updated by torch's AdamW; `param_groups(model)` makes both kinds.

    Args:
        params: parameters, named parameters or groups of them; every hyperparameter may differ by group,
            except `hessian_interval`.
        lr: learning rate per step, a float or a 0-dim tensor; the largest change of a coordinate in one step.
        betas: β₁ of the momentum, β₂ of the Hessian average.
        rho: ρ. Larger clips less. "auto" sets it after each estimate so that the share of `unclipped` is left alone.
        eps: floor of ρ·h. Coordinates with almost no curvature move by at most lr · |m| / eps.
        weight_decay: λ, decoupled.
        hessian_interval: k, steps between two estimates.
        estimator: supplies ĥ, for example `GaussNewtonBartlett(model)`. Without one, call `update_hessian`.
        maximize: ascend instead of descend.
        nesterov: follow β₁ m + (1 − β₁) g instead of m.
        bias_correction: divide m by 1 − β₁ᵗ, and h by 1 − β₂ⁿ after n estimates.
        noise_floor: c, above 0 for a denominator of at least c √(h/N), with N the predictions of a step's gradient,
            counted by the estimator: h/N is the variance of that gradient.
        unclipped: for rho="auto", the share of coordinates to leave alone at the peak of the learning rate, and at 0.
        basis: None for the coordinates of the weights, "eigen" for the eigenbasis of matrices; what is no matrix stays
            in its own.
        basis_interval: steps between two refreshes of the eigenvectors; the factors see every gradient.
        basis_warmup: steps from the start at which every one refreshes them.
        basis_beta: decay of the factors.
        basis_max_dim: longest piece of a side of a matrix, which bounds the extra state to 2 (p/rows + q/columns)
            numbers an element for pieces of p and q; by default the shorter side, at least 128.
        basis_flatten: take tensors of three dimensions for convolutions, [rows, rest], not for batches of matrices.

    Raises:
        ValueError: a hyperparameter out of range; a sparse, complex or integer parameter; basis="eigen" without a
            matrix.

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
        basis: str | None = None,
        basis_interval: int = 10,
        basis_warmup: int = 100,
        basis_beta: float = 0.95,
        basis_max_dim: int | None = None,
        basis_flatten: bool = False,
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
            basis=basis,
            basis_interval=basis_interval,
            basis_warmup=basis_warmup,
            basis_beta=basis_beta,
            basis_max_dim=basis_max_dim,
            basis_flatten=basis_flatten,
            **_COUNTERS,
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
        self._ratio_quantiles: list[float | None] | None = None

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
        if param_group.get("update") == "adamw":
            param_group = {**adamw.DEFAULTS, **param_group}
        super().add_param_group(param_group)
        group, first = self.param_groups[-1], self.param_groups[0]
        try:
            check_group(group, first["hessian_interval"])
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
            RuntimeError: `hessian_interval` steps have passed without any estimate, or 5 times as many since the last
                one; a gradient is sparse.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        with self._no_autocast():
            self._advance()
        return value

    def _advance(self) -> None:
        first = self.param_groups[0]
        self._refuse_sparse_gradients()
        self._turn_bases()
        if self._estimator is not None and self.hessian_due:
            self._refresh()
        self._refuse_signum()
        measured = first["step"] % first["hessian_interval"] == 0 or first["hessian_step"] == first["step"]
        if measured:
            self._set_rho()
        counts = SumOverShards() if measured else None
        for group in self.param_groups:
            if group["update"] == "adamw":
                self._update_adamw(group)
            else:
                rule = self._rule(group)
                for param in group["params"]:
                    if param.grad is not None:
                        self._update(param, group, rule, counts)
        if counts is not None:
            self._note(counts)
        self._count("step")
        self._warn_bad_coordinates()
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
        with_grad = [p for p in self._trainable() if p.grad is not None]
        bases = self._bases()
        diagonal = {}
        with self._no_autocast():
            for p in with_grad:
                grad = p.grad.to(_state_dtype(p))
                diagonal[p] = (bases[p].into(grad) if p in bases else grad).square().mul_(num_predictions)
        if not diagonal:
            self._fold(Estimate(None, dropped="no parameter has a gradient"))
        elif not bases and any(self._layout(p, g) for g in self.param_groups for p in g["params"]):
            self._fold(Estimate(None, dropped="the eigenbasis is known after the first step(): call it after that"))
        elif not all(torch.isfinite(local(x)).all() for x in diagonal.values()):
            self._fold(Estimate(None, dropped="it was not finite"))
        else:
            self._fold(Estimate(diagonal, int(num_predictions)))

    @torch.no_grad()
    def stats(self) -> dict[str, Any]:
        """Diagnostics of the last step; tensors stay on their device until read, nothing is computed before.

        With sharded parameters every rank must call it, as they add up their shards.

        Returns:
            `win_rate`: share of Sophia's coordinates that the clip left alone at the last refresh,
                |m| < max(ρh, c √(h/N), ε).
            `curvature_share`: share of those whose denominator was ρh.
            `rho`: ρ of the first Sophia group, as given or as rho="auto" has set it.
            `hessian_norm`, `hessian_zero_fraction`, `hessian_quantiles`: the size of h, in loss / θ²
                (`optim.statistics.QUANTILES`).
            `ratio_quantiles`: of |m|/h at the last refresh in this process, the values of ρ that would leave 10, 20, …,
                90 % alone; None before it.
            `hessian_age`: steps since the last estimate; None before the first.
            `hessian_updates`, `hessian_skipped`: estimates made and dropped since the run began.
            `hessian_seconds`: time spent in Hessian passes by this process.
            `nonfinite_gradients`: coordinates left untouched by this process because their gradient was not finite.
        """
        group = self.param_groups[0]
        return {
            "win_rate": group["win_rate"],
            "curvature_share": group["curvature_share"],
            "rho": next((_rho(g) for g in self.param_groups if g["update"] == "sophia"), 0.0),
            **curvature_statistics(self._sophia_params(), self.state),
            "ratio_quantiles": self._ratio_quantiles,
            "hessian_age": group["step"] - 1 - group["hessian_step"] if group["hessian_updates"] else None,
            "hessian_updates": group["hessian_updates"],
            "hessian_skipped": group["hessian_skipped"],
            "hessian_seconds": self.hessian_seconds,
            "nonfinite_gradients": total(list(self._bad_coordinates.values())),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, keeping m and h in float32 whatever the parameters' dtype.

        Groups saved by an older version get today's defaults for what they lack. Saved hyperparameters replace
        the ones given to the constructor, as in every torch optimizer; a difference is warned about. Hooks of
        `register_load_state_dict_pre_hook` see the checkpoint first, and may convert it.

        Raises:
            ValueError: the checkpoint belongs to another optimizer or another basis, or its groups do not match.
        """
        loaded: dict[str, Any] = {}

        def checked(_: Optimizer, final: dict[str, Any]) -> None:
            check_loadable(final, self.param_groups)
            warn_changed_hyperparameters(self.param_groups, final["param_groups"])
            loaded.update(final)

        def exact(_: Optimizer) -> None:
            saved_ids = [i for group in loaded["param_groups"] for i in group["params"]]
            sophia = self._sophia_params()
            for i, param in zip(saved_ids, self._all_params(), strict=True):
                self._restore(
                    param, loaded["state"].get(i, {}), _state_dtype(param) if param in sophia else param.dtype
                )

        hooks = [self.register_load_state_dict_pre_hook(checked)]
        hooks.append(self.register_load_state_dict_post_hook(exact, prepend=True))
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._arm()

    def _restore(self, param: Tensor, saved: dict[str, Tensor], dtype: torch.dtype) -> None:
        for key, value in saved.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                if key == "step":
                    self.state[param][key] = value.to(param.device, torch.float32, copy=True)
                elif value.shape == param.shape:
                    restored = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
                    self.state[param][key] = restored.copy_(value)
                else:
                    self.state[param][key] = value.to(param.device, dtype, copy=True)

    def _turn_bases(self) -> None:
        """Let the factors see this step's gradients, and refresh the eigenvectors that are due; h is carried over."""
        due: list[Basis] = []
        for group in self.param_groups:
            at_interval = group["step"] % group["basis_interval"] == 0 or group["step"] < group["basis_warmup"]
            for param in group["params"]:
                layout = self._layout(param, group) if param.grad is not None else None
                if layout is None:
                    continue
                basis = Basis(layout, self._state_of(param))
                basis.average(usable_gradient(param.grad, _state_dtype(param), False)[1], group["basis_beta"])
                if at_interval or not basis.is_known:
                    due.append(basis)
        turned = refresh([side for basis in due for side in basis.sides()], self._agree)
        for basis in due:
            basis.carry_hessian(turned)

    def _agree(self, tensor: Tensor) -> None:
        equal_on_all_ranks(tensor, getattr(self._estimator, "process_group", None))

    def _layout(self, param: Tensor, group: dict[str, Any]) -> Layout | None:
        if group["update"] != "sophia" or group["basis"] is None:
            return None
        layout = layout_of(param.shape, group["basis_max_dim"], group["basis_flatten"])
        if layout is not None and hasattr(param, "to_local"):
            raise ValueError(
                "basis='eigen' rotates whole matrices, and these are sharded over ranks (FSDP2 or tensor parallelism): "
                "use DDP, or basis=None."
            )
        return layout

    def _bases(self) -> dict[Tensor, Basis]:
        """The parameters that have an eigenbasis by now."""
        layouts = {p: self._layout(p, g) for g in self.param_groups for p in g["params"]}
        bases = {p: Basis(layout, self.state[p]) for p, layout in layouts.items() if layout and p in self.state}
        return {p: basis for p, basis in bases.items() if basis.is_known}

    def _refresh(self) -> None:
        started = self._clock()
        bases = self._bases()
        coordinates = {"coordinates": bases} if bases else {}
        self._fold(self._estimator.estimate(self._trainable(), self.param_groups[0]["step"], **coordinates))
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
        bases = self._bases()
        for group in self.param_groups:
            beta2 = group["betas"][1]
            for param in group["params"]:
                unknown = self._layout(param, group) is not None and param not in bases
                if param in estimate.diagonal and not unknown:
                    h = self._state_of(param)["hessian"]
                    local(h).mul_(beta2).add_(local(estimate.diagonal[param]), alpha=1 - beta2)
        for group in self.param_groups:
            group["hessian_step"] = group["step"]
            group["batch_predictions"] = estimate.batch_predictions or estimate.num_predictions
        self._count("hessian_updates")

    def _refuse_sparse_gradients(self) -> None:
        for group in self.param_groups:
            if any(p.grad is not None and p.grad.layout != torch.strided for p in group["params"]):
                rule = "Sophia does" if group["update"] == "sophia" else "AdamW groups do"
                raise RuntimeError(
                    f"{rule} not support sparse gradients; use sparse=False in the embedding layer, or give it an "
                    "optimizer of its own such as torch.optim.SparseAdam."
                )

    def _refuse_signum(self) -> None:
        """No estimate at all is sign momentum, and no more of them is the curvature of another model."""
        group = self.param_groups[0]
        age = group["step"] - group["hessian_step"]
        interval = group["hessian_interval"]
        if group["hessian_updates"] == 0 and group["step"] >= interval:
            raise RuntimeError(
                f"Sophia has made {group['step']} steps without a single Hessian estimate, so it would be sign "
                f"momentum under another name. Cause: {self._last_drop}."
            )
        if not group["hessian_updates"] or age < _WARN_AFTER * interval:
            return
        stale = f"Sophia's last Hessian estimate is {age} steps old, and one is due every {interval}"
        remedy = f"Cause: {self._last_drop}."
        if self._estimator is None:
            remedy = "Set optimizer.estimator = GaussNewtonBartlett(model), or call update_hessian()."
        if age >= _RAISE_AFTER * interval:
            raise RuntimeError(f"{stale}: it would train on with the curvature of another model. {remedy}")
        if self._estimator is None and age == _WARN_AFTER * interval:
            warn_caller(f"{stale}; at {_RAISE_AFTER * interval} steps it stops. {remedy}")

    def _rule(self, group: dict[str, Any]) -> Rule:
        """The numbers of this step."""
        (beta1, beta2), corrected = group["betas"], group["bias_correction"]
        predictions, updates = group["batch_predictions"], group["hessian_updates"]
        return Rule(
            lr=group["lr"],
            beta1=beta1,
            rho=_rho(group),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            nesterov=group["nesterov"],
            momentum_scale=1 / (1 - beta1 ** (group["step"] + 1)) if corrected else 1.0,
            hessian_scale=1 / (1 - beta2**updates) if corrected and updates else 1.0,
            noise=group["noise_floor"] / math.sqrt(predictions) if predictions else 0.0,
        )

    def _set_rho(self) -> None:
        """Measure |m|/h as this step will use it and, in groups with rho="auto", set ρ to its quantile."""
        histogram = SumOverShards()
        bases = self._bases()
        for group in self.param_groups:
            if group["update"] != "sophia":
                continue
            rule = self._rule(group)
            for param in group["params"]:
                if param.grad is not None:
                    state = self._state_of(param)
                    tensors = (local(x) for x in (param.grad, state["exp_avg"], state["hessian"]))
                    histogram.add(param, log_ratio_histogram(*tensors, rule, bases.get(param)))
        counts = histogram.total()
        if counts is None:
            return
        self._ratio_quantiles = [quantile_of(counts, tenths / 10) for tenths in range(1, 10)]
        automatic = [g for g in self.param_groups if g["update"] == "sophia" and g["rho"] == "auto"]
        if automatic:
            lr = float(automatic[0]["lr"])
            peak = max(lr, automatic[0]["peak_lr"], float(automatic[0].get("initial_lr", 0.0)))
            rho = quantile_of(counts, share_at(lr, peak, *automatic[0]["unclipped"]))
            for group in self.param_groups:
                group["peak_lr"] = peak
                group["auto_rho"] = group["auto_rho"] if rho is None else rho

    def _note(self, counts: SumOverShards) -> None:
        """Keep the shares that the clip left alone, out of (unclipped, curved, all) coordinates."""
        sums = counts.total()
        if sums is not None:
            unclipped, curved, coordinates = sums.tolist()
            for group in self.param_groups:
                group["win_rate"], group["curvature_share"] = unclipped / coordinates, curved / coordinates

    def _update(self, param: Tensor, group: dict[str, Any], rule: Rule, counts: SumOverShards | None) -> None:
        state = self._state_of(param)
        tally = Tally(param.device) if counts is not None else None
        tensors = [local(x) for x in (param, param.grad, state["exp_avg"], state["hessian"])]
        layout = self._layout(param, group)
        if layout is None:
            bad = sophia_update(*tensors, rule, tally)
        else:
            bad = eigenbasis_update(*tensors, Basis(layout, state), rule, tally)
        if counts is not None and tensors[0].numel():
            size = torch.tensor(tensors[0].numel(), device=param.device)
            counts.add(param, torch.stack([tally.unclipped, tally.curved, size]))
        self._count_bad(param, bad)

    def _update_adamw(self, group: dict[str, Any]) -> None:
        by_device: dict[torch.device, list[Tensor]] = {}
        for param in group["params"]:
            if param.grad is not None:
                by_device.setdefault(param.device, []).append(param)
        for params in by_device.values():
            self._count_bad(params[0], adamw.adamw_update(params, self.state, group))

    def _count_bad(self, param: Tensor, bad: Tensor) -> None:
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

    def _no_autocast(self) -> torch.autocast:
        return torch.autocast(self._all_params()[0].device.type, enabled=False)

    def _clock(self) -> float:
        for param in self._all_params():
            if param.device.type == "cuda":
                torch.cuda.synchronize(param.device)
            break
        return time.perf_counter()

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _sophia_params(self) -> dict[Tensor, None]:
        return {p: None for group in self.param_groups if group["update"] == "sophia" for p in group["params"]}

    def _trainable(self) -> list[Tensor]:
        """What h is estimated for."""
        return [p for p in self._sophia_params() if p.requires_grad]


def _rho(group: dict[str, Any]) -> float:
    return group["auto_rho"] if group["rho"] == "auto" else group["rho"]


def _state_dtype(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)
