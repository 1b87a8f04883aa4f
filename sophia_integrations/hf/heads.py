"""Which readout fits which Hugging Face model: the one place that knows heads, shifts and label arguments."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..curvature import Readout
from ..curvature.likelihood import IGNORE_INDEX
from ..curvature.readout import bound_arguments, find_logits
from ..curvature.tap import MicroBatch

_LABEL_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head")


class CausalLMReadout(Readout):
    """Causal language models: logits at position t predict the label at t + 1, so labels move one to the left."""

    def inputs(self, model: nn.Module, batch: MicroBatch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = bound_arguments(model, batch)
        return (), {k: v for k, v in named.items() if k not in _LABEL_ARGUMENTS}

    def labels(self, model: nn.Module, batch: MicroBatch) -> Tensor | None:
        named = bound_arguments(model, batch)
        if named.get("shift_labels") is not None:
            return F.pad(named["shift_labels"], (1, 0), value=IGNORE_INDEX)
        labels = super().labels(model, batch)
        if labels is None:
            raise ValueError(
                f"no labels reached {type(model).__name__}, so Sophia cannot tell which predictions count: pass "
                "labels=… to the model, or call estimator.note_labels(labels) before each forward."
            )
        return labels

    def predictions(self, output: Any, labels: Tensor | None, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        logits = find_logits(output)
        shifted = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1 : labels.shape[-1] + 1]
        return super().predictions(logits, shifted, batch)


def resolve_readout(model: nn.Module) -> Readout | None:
    """The readout for a transformers (or PEFT) model; None for a module that is neither.

    Raises:
        ValueError: a transformers model whose loss has no readout here.
    """
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        return None
    name = type(base).__name__
    causal = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or getattr(base, "loss_type", None) == "ForCausalLM"
    if causal and not base.config.is_encoder_decoder:
        return CausalLMReadout()
    raise ValueError(
        f"Sophia does not know the loss of {name}: only causal language models are known. For another model, build "
        "SophiaG(…, estimator=GaussNewtonBartlett(model, readout=…)) yourself and pass optimizers=(optimizer, None)."
    )
