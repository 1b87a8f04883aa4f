"""What only the frameworks' own constructors can judge of an ``hf`` recipe: they are called, and build next to nothing.

Importing this module is cheap, calling `construct` imports torch and transformers; nothing is downloaded or written.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import TYPE_CHECKING, Any

from . import words
from .yaml_places import Path

if TYPE_CHECKING:
    from .draft import Draft


def construct(raw: dict[str, Any], draft: Draft) -> None:
    """Adds to `draft` what the constructors refuse, section by section where the section has no problem so far."""
    training, model = raw.get("training"), raw.get("model")
    if isinstance(training, dict) and not draft.has_problem(("training",)):
        _construct_training(training, draft)
    if isinstance(model, dict):
        if isinstance(model.get("config"), dict) and not draft.has_problem(("model", "config")):
            _construct_config(raw, draft)
        if isinstance(model.get("peft"), dict) and not draft.has_problem(("model", "peft")):
            _construct_peft(model["peft"], draft)


def _construct_training(training: dict[str, Any], draft: Draft) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = TrainingArguments(output_dir="unused", **training)
    except Exception as error:  # it raises of every kind, ImportError for a missing package among them
        return _add_named(error, training, ("training",), draft)
    if str(getattr(arguments.optim, "value", arguments.optim)).startswith("sophia"):
        probe = torch.nn.Linear(2, 2)
        try:
            chosen, options = Trainer.get_optimizer_cls_and_kwargs(arguments, probe)
            chosen(options.pop("params", None) or probe.parameters(), **options)
        except ValueError as error:
            message = str(error).removeprefix("optim_args: ")
            draft.add(("training", "optim_args" if "optim_args" in training else "optim"), message)
    return None


def _construct_config(raw: dict[str, Any], draft: Draft) -> None:
    from transformers import CONFIG_MAPPING

    config, here = dict(raw["model"]["config"]), ("model", "config")
    kind = config.pop("model_type")
    if kind not in CONFIG_MAPPING:
        return draft.add((*here, "model_type"), f"{kind!r} is no model type of transformers")
    try:
        built = CONFIG_MAPPING[kind](**config)
    except Exception as error:  # the config classes raise their own, undocumented types
        return _add_named(error, config, here, draft)
    _lay_out(built, str(raw.get("task")), draft)
    context, data = getattr(built, "max_position_embeddings", None), raw.get("data")
    block_size = data.get("block_size") if isinstance(data, dict) else None
    if isinstance(context, int) and isinstance(block_size, int) and block_size > context > 0:
        draft.add(("data", "block_size"), f"{block_size} is longer than the model's context of {context} tokens")
    return None


def _lay_out(config: Any, task: str, draft: Draft) -> None:
    """Makes the model without memory for its weights: sizes that do not fit each other are refused here."""
    import torch
    import transformers

    classes = getattr(transformers, f"MODEL_FOR_{words.TASKS[task][0]}_MAPPING") if task in words.TASKS else {}
    if type(config) not in classes:
        return
    chosen = classes[type(config)]
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (chosen[0] if isinstance(chosen, tuple) else chosen)(config)
    except Exception as error:  # a model's own assertions, or those of its layers
        if "meta" not in str(error):  # a few models compute with their weights while they are made
            _add_named(error, {}, ("model", "config"), draft)


def _construct_peft(peft: dict[str, Any], draft: Draft) -> None:
    here = ("model", "peft")
    if importlib.util.find_spec("peft") is None:
        return draft.add(here, "this needs peft, which is not installed: pip install 'sophia-integrations[recipes]'",
                         key=True)  # fmt: skip
    from peft import LoraConfig

    options = {name: value for name, value in peft.items() if name != "peft_type"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            LoraConfig(**options)
    except Exception as error:
        _add_named(error, options, here, draft)
    return None


def _add_named(error: Exception, given: dict[str, Any], here: Path, draft: Draft) -> None:
    """Notes a constructor's own words at the key that they name, or at the section."""
    message = " ".join(str(error).split()) or type(error).__name__
    named = [name for name in given if name in message]
    draft.add((*here, max(named, key=len)) if named else here, message, key=True)
