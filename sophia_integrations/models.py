"""A transformers model: new from a config or pretrained, in float32, with or without LoRA adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any


def build_model(
    auto_class: str,
    *,
    config: Mapping[str, Any] | None = None,
    pretrained: str | None = None,
    peft: Mapping[str, Any] | None = None,
    empty: bool = False,
    **options: Any,
) -> Any:
    """A model of the class of transformers named `auto_class`, in training mode.

    Args:
        auto_class: such as ``AutoModelForCausalLM``.
        config: words of a transformers config with its ``model_type``, for new weights.
        pretrained: a folder or hub id, instead of `config`.
        peft: words of `peft.LoraConfig`; only the adapters are trained then.
        empty: of a pretrained model read the config only; under ``torch.device("meta")`` it costs no memory.
        options: for ``from_pretrained``, such as ``revision``.

    Raises:
        OSError, ValueError: as transformers and peft do; also for a pretrained model that is not there.
    """
    import transformers

    chosen = getattr(transformers, auto_class)
    if config is not None:
        model = chosen.from_config(transformers.AutoConfig.for_model(**config))
    elif empty:
        code = {"trust_remote_code": options["trust_remote_code"]} if "trust_remote_code" in options else {}
        model = chosen.from_config(transformers.AutoConfig.from_pretrained(pretrained, **options), **code)
    else:
        model = chosen.from_pretrained(pretrained, **options)
    if config is None and not getattr(model, "is_quantized", False):
        model = model.float()
    if auto_class == "AutoModelForCausalLM" and getattr(model, "loss_type", "") is None:
        model.loss_type = "ForCausalLM"  # transformers knows no loss by this class name and warns of its default
    model.train()
    return model if peft is None else with_adapters(model, peft)


def with_adapters(model: Any, words: Mapping[str, Any]) -> Any:
    """`model` with LoRA adapters, the only weights that are trained; `words` are those of `peft.LoraConfig`."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")  # peft still asks for it
        return get_peft_model(model, LoraConfig(**words))
