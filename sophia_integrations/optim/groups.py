"""Which parameter gets which rule: matrices are Sophia's; embeddings, heads, norms and biases are AdamW's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..ranges import require_in_range
from .adamw import AS_TORCH

EIGEN_DEFAULTS: dict[str, Any] = {
    "basis": "eigen",
    "betas": (0.9, 0.9),
    "rho": "auto",
    "eps": 1e-8,
    "nesterov": True,
    "bias_correction": True,
    "unclipped": (0.8, 0.3),
    "basis_beta": 0.8,
    "basis_factor_interval": 5,
}
"""What `basis="eigen"` means for the Sophia groups, unless the caller says otherwise."""

EIGEN_LR_SCALE = 2.0
"""And the learning rate of the AdamW groups beside it, in multiples of the optimizer's."""

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Conventions:
    """What a framework knows of a model's parameters.

    Attributes:
        adamw: parameters that are AdamW's besides embeddings and vectors, such as the output embeddings.
        decays: whether a parameter has weight decay; where nothing is said, all but those of one dimension.
        width: the length of the model's hidden states, the longest piece that a side is cut into; None if unknown.
    """

    adamw: set[Tensor] = field(default_factory=set)
    decays: dict[Tensor, bool] = field(default_factory=dict)
    width: int | None = None


ConventionsResolver = Callable[[nn.Module], "Conventions | None"]
_resolvers: list[ConventionsResolver] = []


def register_conventions(resolver: ConventionsResolver) -> None:
    """Let `resolver` tell what it knows of the models it recognises; a framework's row registers its own here."""
    if resolver not in _resolvers:
        _resolvers.append(resolver)


def param_groups(
    model: nn.Module,
    *,
    basis: str | None = None,
    weight_decay: float | None = None,
    adamw: dict[str, Any] | None = None,
    **sophia: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for `SophiaG` or `SophiaH`: matrices by Sophia, everything else by AdamW.

    AdamW's are embeddings, the output embeddings of a transformers model, what is tied to either, and everything of one
    dimension. In a plain module a last `nn.Linear` is a matrix like any other. Frozen parameters are in no group.

    Args:
        model: any module.
        basis: None for Sophia in the coordinates of the weights, "eigen" for the eigenbasis with the settings that
            were measured best (`EIGEN_DEFAULTS`).
        weight_decay: for what decays; the optimizer's own by default. Vectors do not decay, in a transformers model
            what its Trainer exempts.
        adamw: options of the AdamW groups, such as `lr`, `betas` (0.9, 0.999) and `eps` (1e-8). In the eigenbasis their
            learning rate is twice the optimizer's (`lr_scale`).
        sophia: options of the Sophia groups, as for `SophiaG`.

    Returns:
        The groups, each with a "name".

    Raises:
        ValueError: nothing to train, or no matrix.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
        >>> [(g["name"], len(g["params"])) for g in param_groups(model, basis="eigen")]
        [('matrices', 1), ('embeddings', 1), ('vectors', 1)]
    """
    known = _conventions(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"param_groups: {type(model).__name__} has no parameter that requires a gradient.")
    embeddings = {p for m in model.modules() if isinstance(m, _EMBEDDINGS) for p in m.parameters(recurse=False)}
    embeddings |= known.adamw
    flattened = {m.weight for m in model.modules() if isinstance(m, _CONVOLUTIONS) and m.weight.ndim == 3}

    options = {**(EIGEN_DEFAULTS if basis == "eigen" else {"basis": basis}), **sophia}
    if known.width and options["basis"] is not None:
        options.setdefault("basis_max_dim", known.width)
    scale = {"lr_scale": EIGEN_LR_SCALE} if basis == "eigen" else {}
    members: dict[tuple[str, bool], list[Tensor]] = {}
    for p in parameters:
        kind = "embeddings" if p in embeddings else "vectors" if is_vector(p) else "matrices"
        kind = "kernels" if kind == "matrices" and p in flattened else kind
        members.setdefault((kind, known.decays.get(p, not is_vector(p))), []).append(p)
    if not any(kind in ("matrices", "kernels") for kind, _ in members):
        raise ValueError(
            f"param_groups: {type(model).__name__} has no matrices to train beside embeddings and vectors, so there is "
            "nothing for Sophia: use torch.optim.AdamW."
        )
    order = ("matrices", "kernels", "embeddings", "vectors")
    groups = []
    for (kind, decays), params in sorted(members.items(), key=lambda item: (order.index(item[0][0]), not item[0][1])):
        own = dict(options) if kind in ("matrices", "kernels") else {"update": "adamw", **scale, **(adamw or {})}
        if kind == "kernels":
            own["basis_flatten"] = True
        if not decays:
            own["weight_decay"] = 0.0
        elif weight_decay is not None:
            own.setdefault("weight_decay", weight_decay)
        groups.append(
            {"params": params, "name": kind if decays or kind == "vectors" else f"{kind} without decay", **own}
        )
    return groups


def completed(group: dict[str, Any], lr: float | Tensor) -> dict[str, Any]:
    """A group as the optimizer takes it: AdamW's own options where it says nothing, `lr_scale` as a learning rate."""
    if group.get("update") == "adamw":
        group = {**AS_TORCH, **group}
    if "lr_scale" in group:
        require_in_range(lr_scale=group["lr_scale"])
        group = {"lr": lr * group["lr_scale"], **group}
    return group


def _conventions(module: nn.Module) -> Conventions:
    """Those of `module`, or of the outermost modules in it that a framework knows, together."""
    for resolver in _resolvers:
        found = resolver(module)
        if found is not None:
            return found
    together = Conventions()
    for child in module.children():
        found = _conventions(child)
        width = max(together.width or 0, found.width or 0) or None
        together = Conventions(together.adamw | found.adamw, {**together.decays, **found.decays}, width)
    return together


def is_vector(param: Tensor) -> bool:
    """Whether all elements lie along one dimension."""
    return param.numel() == max(param.shape, default=1)
