"""The words that installed packages know: arguments of TrainingArguments and LoraConfig, model types, their configs.

Read from the packages' text (``sources.py``), so nothing heavy is imported; only where the text does not settle a
question is the package asked itself.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

from ...hf.arguments import NAMES
from . import signatures, sources

TASKS = {
    "pretrain": ("CAUSAL_LM", "causal language model"),
    "finetune": ("CAUSAL_LM", "causal language model"),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM", "sequence-to-sequence language model"),
    "masked-lm": ("MASKED_LM", "masked language model"),
    "classify": ("SEQUENCE_CLASSIFICATION", "sequence classifier"),
}
_AUTO = "transformers.models.auto"


@functools.lru_cache(maxsize=1)
def training_words() -> dict[str, Any]:
    """Names and types of ``transformers.TrainingArguments``."""
    source = sources.find("transformers.training_args.TrainingArguments")
    found = signatures.fields(source) if source is not None else None
    if found:
        return {name: kind for name, kind in found.items() if not name.startswith("_")}
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {item.name: hints[item.name] for item in dataclasses.fields(TrainingArguments) if item.init}


@functools.lru_cache(maxsize=1)
def lora_words() -> dict[str, Any] | None:
    """Names and types of ``peft.LoraConfig``; None when peft is not installed or its text does not say."""
    source = sources.find("peft.LoraConfig")
    return signatures.fields(source) if source is not None else None


@functools.lru_cache(maxsize=8)
def model_types(task: str) -> frozenset[str] | None:
    """The values of ``model_type`` that have a model for `task`; None when transformers' text does not say."""
    names = sources.constant(f"{_AUTO}.modeling_auto.MODEL_FOR_{TASKS[task][0]}_MAPPING_NAMES")
    return frozenset(names) if names else None


@functools.lru_cache(maxsize=1)
def config_classes() -> dict[str, str]:
    """``model_type`` to the name of its config class."""
    return sources.constant(f"{_AUTO}.configuration_auto.CONFIG_MAPPING_NAMES") or {}


@functools.lru_cache(maxsize=32)
def config_words(model_type: str) -> dict[str, Any] | None:
    """Names and types of the config class of `model_type`, its aliases included; None when its text does not say."""
    name = config_classes().get(model_type)
    special = sources.constant(f"{_AUTO}.configuration_auto.SPECIAL_MODEL_TYPE_TO_MODULE_NAME") or {}
    folder = special.get(model_type, model_type.replace("-", "_"))
    if name is None or not folder.isidentifier():
        return None
    source = sources.find(f"transformers.models.{folder}.configuration_{folder}.{name}")
    if source is None:
        return None
    owners = [owner for owner in source.line() if owner is not None]
    if any(sources.method(owner, "__init__") for owner in owners):  # transformers 4
        found: dict[str, Any] | None = {key: item.annotation for key, item in signatures.parameters(source)[0].items()}
    else:
        found = signatures.fields(source)
    if not found:
        return None
    return {**dict.fromkeys(sources.class_constant(source, "attribute_map") or {}, Any), **found}


def choices(name: str) -> tuple[str, ...]:
    """Words that text given for the training argument `name` must be among, beyond its type."""
    return NAMES if name == "optim" else ()
