"""Checks that need transformers: ``training`` against TrainingArguments, ``model.config`` against its class.

Importing this module imports torch and transformers; nothing is built, downloaded or written.
"""

from __future__ import annotations

import dataclasses
import math
import typing
import warnings
from typing import TYPE_CHECKING, Any

import pydantic

from ...text.documents import matches
from .wording import choices, describe, did_you_mean, found

if TYPE_CHECKING:
    from .loader import Draft

_NOT_HERE = {
    "output_dir": "the run folder is set by run_dir, at the top level",
    "resume_from_checkpoint": "leave it out: a run resumes from its last good checkpoint by itself",
    "restore_callback_states_from_checkpoint": "leave it out: a run resumes exactly by itself",
    "disable_tqdm": "leave it out: progress is a bar on a terminal and plain lines elsewhere",
    "save_only_model": "leave it out: a checkpoint without the optimizer cannot be resumed",
    "do_train": "has no effect here: a recipe always trains",
    "do_eval": "has no effect here: set eval_strategy",
    "do_predict": "has no effect here",
}
_AT_LEAST_ONE = {
    "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "save_total_limit",
}  # fmt: skip
_POSITIVE = {"num_train_epochs", "logging_steps", "eval_steps", "save_steps"}
_NOT_NEGATIVE = {"learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "seed"}
_ADAM_ONLY = ("adam_beta1", "adam_beta2", "adam_epsilon")


def check_training(training: dict[str, Any], draft: Draft) -> None:
    """Adds to `draft` every problem of the ``training`` section: names, types, ranges, then combinations."""
    from transformers import TrainingArguments

    before = len(draft.problems)
    hints = typing.get_type_hints(TrainingArguments)
    names = {item.name for item in dataclasses.fields(TrainingArguments) if item.init}
    for name, value in training.items():
        if name in _NOT_HERE:
            draft.add(("training", name), _NOT_HERE[name], key=True)
        elif name not in names:
            near = did_you_mean(name, names)
            draft.add(("training", name), f"unknown key{near or '; transformers.TrainingArguments has none like it'}",
                      key=True)  # fmt: skip
        else:
            message = _value_problem(name, value, hints[name])
            if message:
                draft.add(("training", name), message)
    _check_optimizer(training, draft)
    if len(draft.problems) == before:
        _check_together(training, draft)


def _value_problem(name: str, value: Any, annotation: Any) -> str | None:
    words = choices(annotation)
    try:
        config = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True)
        pydantic.TypeAdapter(annotation, config=config).validate_python(value)
    except pydantic.ValidationError:
        return f"expected {describe(annotation)}, found {found(value)}"
    if words and isinstance(value, str) and value not in words:
        return f"{value!r} is not known{did_you_mean(value, words)}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value):
        return f"expected a finite number, found {value}"
    if name in _AT_LEAST_ONE and value < 1:
        return f"expected at least 1, found {value}"
    if name in _POSITIVE and value <= 0:
        return f"expected a number above 0, found {value}"
    if name in _NOT_NEGATIVE and value < 0:
        return f"expected 0 or more, found {value}"
    return None


def _check_optimizer(training: dict[str, Any], draft: Draft) -> None:
    optim, arguments = training.get("optim"), training.get("optim_args")
    if not isinstance(optim, str) or not optim.startswith("sophia"):
        if isinstance(arguments, str):
            for part in arguments.replace(" ", "").split(","):
                if part.count("=") != 1:
                    draft.add(("training", "optim_args"), f"expected name=value,name=value, found {part!r} in it")
        return
    for name in _ADAM_ONLY:
        if name in training:
            draft.add(("training", name), f"has no effect with optim: {optim}; use beta1, beta2, eps in optim_args",
                      key=True)  # fmt: skip
    if isinstance(arguments, str):
        from ...hf import parse_optim_args

        try:
            parse_optim_args(arguments)
        except ValueError as error:
            draft.add(("training", "optim_args"), str(error).removeprefix("optim_args: "))


def _check_together(training: dict[str, Any], draft: Draft) -> None:
    from transformers import TrainingArguments

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TrainingArguments(output_dir="unused", **training)
    except (ValueError, TypeError, ImportError) as error:
        message = " ".join(str(error).split())
        named = [name for name in training if name in message]
        draft.add(("training", max(named, key=len)) if named else ("training",), message, key=True)


def check_files(data: dict[str, Any], draft: Draft) -> None:
    """Adds to `draft` every file pattern of ``data`` that matches nothing."""
    for key in ("files", "validation_files"):
        patterns = data.get(key)
        for index, pattern in enumerate(patterns if isinstance(patterns, list) else []):
            if isinstance(pattern, str) and not matches(pattern):
                draft.add(("data", key, index), f"no file matches {pattern!r} (looked from the current folder)")


def check_model(raw: dict[str, Any], draft: Draft) -> None:
    """Adds to `draft` every problem of ``model.config``: its type, unknown keys, values its class refuses."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = dict(raw["model"]["config"])
    here = ("model", "config")
    kind = config.pop("model_type", None)
    if kind is None:
        return draft.add(here, "the key 'model_type' is missing, such as model_type: gpt2", key=True)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind not in CONFIG_MAPPING:
        near = did_you_mean(str(kind), list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
        return draft.add((*here, "model_type"), f"{kind!r} is no causal language model of transformers{near}")
    config_class = CONFIG_MAPPING[kind]
    names = {item.name for item in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    unknown = [name for name in config if name not in names]
    for name in unknown:
        draft.add((*here, name), f"unknown key{did_you_mean(name, names)}", key=True)
    try:
        built = config_class(**{name: value for name, value in config.items() if name not in unknown})
    except Exception as error:  # the config classes raise their own, undocumented types
        message = " ".join(str(error).split())
        named = [name for name in config if name in message]
        return draft.add((*here, max(named, key=len)) if named else here, message)
    context, data = getattr(built, "max_position_embeddings", None), raw.get("data")
    block_size = data.get("block_size") if isinstance(data, dict) else None
    if isinstance(context, int) and isinstance(block_size, int) and block_size > context:
        draft.add(("data", "block_size"), f"{block_size} is longer than the model's context of {context} tokens")
    return None
