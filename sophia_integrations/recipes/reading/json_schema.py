"""The JSON Schema of recipes: our own keys and those of the installed transformers, peft and Lightning.

Making a document imports these packages; ``schema_cache.py`` keeps it, so that reading a recipe does not.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import warnings
from importlib import metadata
from typing import Any

from ...tasks import TASKS
from .schema import Recipe
from .signatures import Schema, arguments

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
_RANGES: dict[str, Schema] = {
    **dict.fromkeys(("max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"), {"minimum": 1}),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit", "r", "lora_alpha"), {"minimum": 1}),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps"), {"exclusiveMinimum": 0}),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"), {"minimum": 0}),
    **dict.fromkeys(("seed", "lora_dropout"), {"minimum": 0}),
}
_OWN = "sophia_integrations.lightning"
CLASSES = {
    "model": ("lightning.pytorch.LightningModule", (_OWN,)),
    "data": ("lightning.pytorch.LightningDataModule", (_OWN,)),
    "optimizer": ("torch.optim.Optimizer", ("sophia_integrations", _OWN, "torch.optim")),
    "lr_scheduler": ("torch.optim.lr_scheduler.LRScheduler", ("torch.optim.lr_scheduler",)),
    "callbacks": ("lightning.pytorch.callbacks.Callback", (_OWN, "lightning.pytorch.callbacks")),
    "logger": ("lightning.pytorch.loggers.Logger", ("lightning.pytorch.loggers",)),
}
"""By the key that names them: the base of the classes whose arguments a document holds, and the modules of these."""
_GIVEN_LATER = {"params", "optimizer"}  # an optimizer's and a schedule's first argument
_FRAMEWORK = {"enum": ["hf", "lightning"]}
_BASE = {"type": "string", "description": "Another recipe, relative to this file, to lay this one over."}
_REF_CONFIG = {"$ref": "#/$defs/config"}
_REF_PEFT = {"$ref": "#/$defs/peft"}


def make(framework: str) -> Schema:
    """The document of a framework's recipes.

    Raises ModuleNotFoundError for a framework that is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the frameworks say while they are imported is said again by a run
        made, packages = (_lightning(), ("lightning", "torch")) if framework == "lightning" else (_hf(), ())
    packages = tuple(name for name in (*packages, "transformers", "peft") if importlib.util.find_spec(name))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": "Made with " + ", ".join(f"{name} {metadata.version(name)}" for name in packages),
        "title": f"A recipe of sophia-integrations (framework: {framework})",
        **made,
    }


def config(model_type: str) -> Schema:
    """The keys of the transformers config of `model_type`; its aliases, and what every config takes, included."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    chosen = CONFIG_MAPPING[model_type]
    known, _ = arguments(chosen)
    common = [name for name in vars(PretrainedConfig()) if not name.startswith("_")]
    return {**{name: {} for name in (*common, *chosen.attribute_map, "model_type")}, **known}


def class_arguments(chosen: type) -> Schema:
    """The ``init_args`` of a class in a LightningCLI config; those that reach its ancestors included."""
    from jsonargparse import ArgumentParser

    properties, required = arguments(chosen)
    given_later = _GIVEN_LATER.intersection(list(properties)[:1])
    # jsonargparse follows **kwargs to what the class passes them to
    for name in ArgumentParser(exit_on_error=False).add_class_arguments(chosen, fail_untyped=False):
        properties.setdefault(name, {})
    properties = {name: schema for name, schema in properties.items() if name not in given_later}
    required = [name for name in required if name in properties]
    return {"type": ["object", "null"], "properties": properties, "required": required, "additionalProperties": False}


def _hf() -> Schema:
    from transformers import TrainingArguments

    training, _ = arguments(TrainingArguments)
    training |= {name: {**training[name], **limits} for name, limits in _RANGES.items() if name in training}
    training |= {name: {"not": {}, "description": reason} for name, reason in NOT_HERE.items()}
    schema = _untitled(Recipe.model_json_schema())
    schema["properties"] |= {
        "framework": _FRAMEWORK,
        "base": _BASE,
        "training": {
            "type": "object",
            "description": "transformers.TrainingArguments, word for word.",
            "properties": training,
            "additionalProperties": False,
        },
    }
    schema["$defs"]["Model"]["properties"] |= {"config": _REF_CONFIG, "peft": _REF_PEFT}
    schema["$defs"] |= {"config": _config(*TASKS), "peft": _peft()}
    needed = schema.pop("required")
    return {**schema, "allOf": [_complete(*needed), *map(_of_task, TASKS)]}


def _complete(*keys: str) -> Schema:
    """The keys that are needed where no base may give them."""
    return {"if": {"not": {"required": ["base"]}}, "then": {"required": list(keys)}}


def _of_task(task: str) -> Schema:
    """A new model's kind is one that the task can train."""
    config = {"properties": {"model_type": _model_types(task)}}
    then = {"properties": {"model": {"properties": {"config": config}}}}
    return {"if": {"properties": {"task": {"const": task}}, "required": ["task"]}, "then": then}


def _config(*tasks: str) -> Schema:
    kinds = {"model_type": _model_types(*tasks)}
    return {"type": ["object", "null"], "properties": kinds, "required": ["model_type"]}


def _model_types(*tasks: str) -> Schema:
    from transformers.models.auto import modeling_auto

    names = {
        name for task in tasks for name in getattr(modeling_auto, f"MODEL_FOR_{TASKS[task].mapping}_MAPPING_NAMES")
    }
    what = TASKS[tasks[0]].model if len(tasks) == 1 else "model"
    return {"title": f"{what} of transformers", "enum": sorted(names)}


def _peft() -> Schema:
    if importlib.util.find_spec("peft") is None:
        return {"type": ["object", "null"]}
    from peft import LoraConfig

    known, _ = arguments(LoraConfig)
    known |= {name: {**known[name], **limits} for name, limits in _RANGES.items() if name in known}
    known["peft_type"] = {"enum": ["LORA"]}
    return {"type": ["object", "null"], "properties": known, "additionalProperties": False}


def _untitled(schema: Any) -> Any:
    """A schema without the titles that pydantic makes from the names of keys."""
    if isinstance(schema, list):
        return [_untitled(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _untitled(value) for key, value in schema.items() if key != "title" or isinstance(value, dict)}


def _lightning() -> Schema:
    from lightning.pytorch import Trainer

    definitions = {"config": _config("pretrain"), "peft": _peft()}
    specs = {key: _spec(key, definitions) for key in CLASSES}
    causal_lm = definitions[f"{_OWN}.CausalLM"]["properties"]
    causal_lm |= {"config": _REF_CONFIG, "peft": _REF_PEFT, "optimizer": {"$ref": "#/$defs/optimizer"}}
    definitions |= specs
    trainer, _ = arguments(Trainer)
    for key, kinds in (("callbacks", ["null"]), ("logger", ["boolean", "null"])):
        one = {"$ref": f"#/$defs/{key}"}
        trainer[key] = {"anyOf": [{"type": "array", "items": one}, one, {"type": kinds}]}
    fit = inspect.signature(Trainer.fit).parameters
    given = ("self", "model", "train_dataloaders", "val_dataloaders", "datamodule")
    return {
        "type": "object",
        "properties": {
            "framework": _FRAMEWORK,
            "base": _BASE,
            "seed_everything": {"type": ["integer", "boolean", "null"]},
            "trainer": {
                "type": ["object", "null"],
                "description": "lightning.pytorch.Trainer, word for word.",
                "properties": trainer,
                "additionalProperties": False,
            },
            **{key: {"anyOf": [{"$ref": f"#/$defs/{key}"}, {"type": "null"}]} for key in list(CLASSES)[:4]},
            **{name: {} for name in fit if name not in given},
            "ckpt_path": {"not": {"type": "string"}, "description": NOT_HERE["resume_from_checkpoint"]},
        },
        "additionalProperties": False,
        "allOf": [_complete("model")],
        "$defs": definitions,
    }


def _spec(key: str, definitions: dict[str, Schema]) -> Schema:
    """A class to make, with its arguments; adds those of the classes known for `key` to `definitions`.

    Another class may be named, but not one that is missing in a module whose classes are all known.
    """
    base, modules = CLASSES[key]
    kind = imported(base)
    paths = [
        f"{module}.{name}"
        for module in modules
        for name in sorted(dir(importlib.import_module(module)))
        if inspect.isclass(chosen := getattr(importlib.import_module(module), name)) and issubclass(chosen, kind)
    ]
    definitions |= {path: class_arguments(imported(path)) for path in paths}
    known = [
        {
            "if": {"properties": {"class_path": {"const": path}}, "required": ["class_path"]},
            "then": {
                "properties": {"init_args": {"$ref": f"#/$defs/{path}"}},
                "required": ["init_args"] if definitions[path]["required"] else [],
            },
        }
        for path in paths
    ]
    elsewhere = "|".join(map(re.escape, modules))
    return {
        "type": ["object", "string"],
        "properties": {
            "class_path": {
                "title": "the dotted path of a class",
                "anyOf": [{"enum": paths}, {"type": "string", "not": {"pattern": rf"^({elsewhere})\.\w+$"}}],
            },
            "init_args": {"type": ["object", "null"]},
            "dict_kwargs": {"type": ["object", "null"]},
        },
        "required": ["class_path"],
        "additionalProperties": False,
        "allOf": known,
    }


def imported(dotted: str) -> Any:
    """What a dotted path names; raises what the import of its module raises, and AttributeError."""
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)
