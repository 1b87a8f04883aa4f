"""The rivals as optimizers: matrices by one rule and the rest by AdamW, and what `transformers.Trainer` builds of them.

Used only in the runs of a comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ...optim import param_groups
from ..places import optim_args
from .dials import OURS


class _MatricesAndRest(Optimizer):
    """Parameter groups that say ``update: adamw`` by torch's AdamW, the others by `matrices`; plain parameters by their
    number of dimensions. One state and one list of groups, so that schedules and checkpoints see one optimizer."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float,
        matrices: Callable[[list[dict[str, Any]]], Optimizer],
    ) -> None:
        given = list(params)
        if not isinstance(given[0], dict):
            parts = [[p for p in given if (p.ndim == 2) is two] for two in (True, False)]
            given = [{"params": parts[0]}, {"params": parts[1], "update": "adamw", "weight_decay": 0.0}]
        wanted = [{"lr": lr, "update": "matrices", **group} for group in given if group["params"]]
        super().__init__(wanted, {"lr": lr, "weight_decay": weight_decay})
        rest = AdamW(self._groups(True), lr=lr, weight_decay=weight_decay, fused=True)
        self._parts = [(matrices(self._groups(False)), False), (rest, True)]
        for part, _ in self._parts:
            part.part_of_another = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step of both rules."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, adamw in self._parts:
            part.param_groups, part.state = self._groups(adamw), self.state
            part.step()
        return loss

    def _groups(self, adamw: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if (group["update"] == "adamw") is adamw]


class Muon(_MatricesAndRest):
    """torch's Muon with the step size of AdamW, on matrices.

    Args:
        params: parameters or groups; those of one of `param_groups` that are AdamW's stay AdamW's.
        lr: of both.
        weight_decay: of both.
        momentum: of Muon.

    Raises:
        ValueError: a parameter for Muon has more than two dimensions.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        options = dict(momentum=momentum, adjust_lr_fn="match_rms_adamw")
        super().__init__(
            params,
            lr,
            weight_decay,
            lambda groups: torch.optim.Muon(groups, lr=lr, weight_decay=weight_decay, **options),
        )


class Soap(_MatricesAndRest):
    """pytorch_optimizer's SOAP, on matrices; arguments as for `Muon`, `betas` those of SOAP."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.95, 0.95),
    ) -> None:
        from pytorch_optimizer import SOAP

        super().__init__(
            params, lr, weight_decay, lambda groups: SOAP(groups, lr=lr, weight_decay=weight_decay, betas=betas)
        )


def for_trainer(name: str) -> Callable[[Any, nn.Module], tuple[type[Optimizer], dict[str, Any]]]:
    """What makes class and keyword arguments of a rival from TrainingArguments and a model."""
    rival = name.removeprefix(OURS)

    def build(args: Any, model: nn.Module) -> tuple[type[Optimizer], dict[str, Any]]:
        words = optim_args(args.optim_args)
        first = float(words.pop("beta1")) if "beta1" in words else None
        if words:
            raise ValueError(f"optim_args: only beta1 is known to {rival}, not {', '.join(words)}")
        kwargs: dict[str, Any] = {"lr": args.learning_rate}
        if rival in ("muon", "soap"):
            adamw = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
            kwargs["params"] = param_groups(model, weight_decay=args.weight_decay, adamw=adamw)
        if rival == "muon":
            return Muon, {**kwargs, "weight_decay": args.weight_decay, **({} if first is None else {"momentum": first})}
        import pytorch_optimizer

        cls, second = {
            "soap": (Soap, 0.95),
            "lion": (pytorch_optimizer.Lion, 0.99),
            "adahessian": (pytorch_optimizer.AdaHessian, 0.999),
        }[rival]
        if first is not None:
            kwargs["betas"] = (first, second)
        return cls, kwargs

    return build


TRAINER_NAMES = tuple(OURS + name for name in ("muon", "soap", "lion", "adahessian"))
"""For ``training.optim``."""
