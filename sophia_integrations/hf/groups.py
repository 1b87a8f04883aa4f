"""What transformers knows of its models' parameters: the output embeddings, what decays, and the width."""

from __future__ import annotations

from torch import nn

from ..optim import Conventions
from .readouts import base_model


def conventions_of(model: nn.Module) -> Conventions | None:
    """The conventions of a transformers (or PEFT) model; None for a module that is neither."""
    from transformers import PreTrainedModel

    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        return None
    from transformers import Trainer

    head = base.get_output_embeddings()
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    return Conventions(
        adamw=set(head.parameters()) if isinstance(head, nn.Module) else set(),
        decays={p: name in decayed for name, p in model.named_parameters()},
        width=getattr(base.config.get_text_config(), "hidden_size", None),
    )
