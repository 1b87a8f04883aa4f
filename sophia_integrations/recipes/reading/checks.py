"""The framework's words in an ``hf`` recipe, from what the installed packages' text says: names, types, ranges.

Nothing heavy is imported; what only the frameworks' own constructors can judge is left to ``constructors.py``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...hf.arguments import parse_optim_args, refuse_foreign_arguments, without_effect
from ...text.files import matches
from . import words
from .homes import unknown_key
from .values import type_problem
from .wording import did_you_mean, found
from .yaml_places import Path

if TYPE_CHECKING:
    from .draft import Draft

NOT_HERE = {
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
    "save_total_limit", "r", "lora_alpha",
}  # fmt: skip
_POSITIVE = {"num_train_epochs", "logging_steps", "eval_steps", "save_steps"}
_NOT_NEGATIVE = {"learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "seed", "lora_dropout"}


def check_framework_words(raw: dict[str, Any], draft: Draft) -> None:
    """Adds to `draft` every problem of ``training``, ``model.config``, ``model.peft`` and the file patterns."""
    training, model, data = raw.get("training"), raw.get("model"), raw.get("data")
    if isinstance(training, dict):
        _check_training(training, raw, draft)
    if isinstance(model, dict):
        if isinstance(model.get("config"), dict):
            check_config(model["config"], ("model", "config"), str(raw.get("task")), draft, raw)
        if isinstance(model.get("peft"), dict):
            check_peft(model["peft"], ("model", "peft"), draft, raw)
    if isinstance(data, dict):
        _check_files(data, draft)


def _check_training(training: dict[str, Any], raw: dict[str, Any], draft: Draft) -> None:
    known = words.training_words()
    for name, value in training.items():
        if name in NOT_HERE:
            draft.add(("training", name), NOT_HERE[name], key=True)
        elif name not in known:
            draft.add(("training", name), unknown_key(name, "training", set(known), raw), key=True)
        else:
            _check_value(("training", name), value, known[name], draft)
    _check_optimizer(training, draft)


def _check_value(path: Path, value: Any, annotation: Any, draft: Draft) -> None:
    name = str(path[-1])
    message = type_problem(value, annotation, words.choices(name)) or _range_problem(name, value)
    if message:
        draft.add(path, message)


def _range_problem(name: str, value: Any) -> str | None:
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
    for name, message in without_effect(optim, training).items():
        draft.add(("training", name), message, key=True)
    if isinstance(arguments, str):
        try:
            refuse_foreign_arguments(optim, parse_optim_args(arguments))
        except ValueError as error:
            draft.add(("training", "optim_args"), str(error).removeprefix("optim_args: "))


def check_config(
    config: dict[str, Any], here: Path, task: str, draft: Draft, raw: dict[str, Any] | None = None
) -> None:
    """Adds to `draft` every problem of a transformers config: its type, unknown keys, values of another type.

    With `raw`, an ``hf`` recipe, a key that belongs elsewhere in it is told so.
    """
    kind = config.get("model_type")
    if kind is None:
        return draft.add(here, "the key 'model_type' is missing, such as model_type: gpt2", key=True)
    if not isinstance(kind, str):
        return draft.add((*here, "model_type"), f"expected text, found {found(kind)}")
    types = words.model_types(task) if task in words.TASKS else None
    if types is not None and kind not in types:
        name = words.TASKS[task][1]
        return draft.add((*here, "model_type"), f"{kind!r} is no {name} of transformers{did_you_mean(kind, types)}")
    known = words.config_words(kind)
    for name, value in config.items() if known is not None else ():
        if name == "model_type":
            continue
        if name not in known:
            near = did_you_mean(name, known)
            message = f"unknown key{near}" if raw is None else unknown_key(name, "model.config", set(known), raw)
            draft.add((*here, name), message, key=True)
        else:
            _check_value((*here, name), value, known[name], draft)
    return None


def check_peft(peft: dict[str, Any], here: Path, draft: Draft, raw: dict[str, Any] | None = None) -> None:
    """Adds to `draft` every problem of the words of a LoraConfig; `raw` as for `check_config`."""
    known = words.lora_words()
    if known is None:
        return
    for name, value in peft.items():
        path = (*here, name)
        if name == "peft_type" and isinstance(value, str) and value.upper() == "LORA":
            continue
        if name == "peft_type":
            draft.add(path, f"only LORA is known here, found {value!r}")
        elif name not in known:
            near = did_you_mean(name, known)
            message = f"unknown key{near}" if raw is None else unknown_key(name, "model.peft", set(known), raw)
            draft.add(path, message, key=True)
        else:
            _check_value(path, value, known[name], draft)


def _check_files(data: dict[str, Any], draft: Draft) -> None:
    for key in ("files", "validation_files"):
        patterns = data.get(key)
        for index, pattern in enumerate(patterns if isinstance(patterns, list) else []):
            if isinstance(pattern, str) and pattern and not matches(pattern):
                draft.add(("data", key, index), f"no file matches {pattern!r} (looked from the current folder)")
