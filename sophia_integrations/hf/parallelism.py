"""How a Trainer spreads its model over processes, and the sentence for each way that Sophia does not run under."""

from __future__ import annotations

from typing import Any

from torch import nn

from .readouts import base_model


def check_parallelism(args: Any, model: nn.Module, second_derivatives: bool) -> None:
    """Refuse what would hide the parameters, or put one row on several ranks; DDP and FSDP2 pass.

    Decided by what accelerate has set up, wherever the wish came from: `TrainingArguments`, `accelerate launch` or its
    configuration file. Without a GPU accelerate turns `fsdp=` into DDP, which is fine here.

    Args:
        args: the `TrainingArguments`.
        model: the model that the Trainer was given.
        second_derivatives: whether the estimator needs them, as Hutchinson's does.

    Raises:
        ValueError: DeepSpeed, Megatron-LM, FSDP1, a model split inside its layers or sequences; FSDP2 with
            `second_derivatives`.
    """
    kind, state = _accelerate_state()
    if getattr(args, "deepspeed", None) or kind == "DEEPSPEED":
        raise ValueError("Sophia does not run under DeepSpeed, which owns the gradients: use DDP or FSDP2.")
    if kind == "MEGATRON_LM":
        raise ValueError("Sophia does not run under Megatron-LM, which owns the optimizer: use DDP or FSDP2.")
    version = getattr(state.fsdp_plugin, "fsdp_version", 1) if kind == "FSDP" else None
    if version == 1:
        raise ValueError(
            "Sophia does not run under FSDP1, which flattens the parameters: set fsdp_version: 2, in accelerate's "
            "configuration (accelerate launch --fsdp_version 2) or, from transformers 5 on, in "
            "TrainingArguments(fsdp_config={'fsdp_version': 2})."
        )
    sharded_at_load = getattr(base_model(model), "is_distributed_loading_by_transformers", False)
    if second_derivatives and (version == 2 or sharded_at_load):
        raise ValueError(
            "optim='sophia_h' does not run under FSDP2, whose shards have no second derivative: use optim='sophia', "
            "or DDP."
        )
    split = _splits(model, state)
    if split:
        raise ValueError(
            f"Sophia's Trainer integration runs under DDP and FSDP2, and here {split} gives several ranks the same "
            "rows: in a loop of your own, pass GaussNewtonBartlett(model, process_group=…) the ranks that hold "
            "different rows."
        )


def _accelerate_state() -> tuple[str, Any]:
    """The name of accelerate's distributed type, and its state; ("NO", None) before there is an Accelerator."""
    from accelerate.state import AcceleratorState

    if not AcceleratorState._shared_state:
        return "NO", None
    state = AcceleratorState()
    return state.distributed_type.name, state


def _splits(model: nn.Module, state: Any) -> str:
    """The kinds of parallelism in which ranks share rows, or share out the layers."""
    base = base_model(model)
    at_load = getattr(getattr(base, "config", None), "distributed_config", None)
    sources = (at_load, getattr(state, "parallelism_config", None))
    found = {kind for short, kind in _KINDS.items() for s in sources if (getattr(s, f"{short}_size", None) or 1) > 1}
    if (getattr(base, "_tp_size", None) or 1) > 1:
        found.add("tensor")
    return " and ".join(f"{kind} parallelism" for kind in sorted(found))


_KINDS = {"tp": "tensor", "cp": "context", "sp": "sequence", "pp": "pipeline", "ep": "expert"}
