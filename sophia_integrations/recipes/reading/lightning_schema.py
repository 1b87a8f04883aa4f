"""The JSON Schema of Lightning recipes, for editors: Lightning's words and those of classes they mostly name."""

from __future__ import annotations

from typing import Any

from . import signatures, sources
from .json_schema import adapters, document, model_config, property_of
from .lightning import top_level_keys, trainer_parameters

_CLASSES = {
    "model": ("sophia_integrations.lightning.CausalLM",),
    "data": ("sophia_integrations.lightning.TextDataModule",),
    "optimizer": ("sophia_integrations.SophiaG", "sophia_integrations.SophiaH", "torch.optim.AdamW"),
    "callbacks": (
        "sophia_integrations.lightning.SophiaCallback",
        "sophia_integrations.lightning.ExactResume",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.callbacks.LearningRateMonitor",
        "lightning.pytorch.callbacks.EarlyStopping",
    ),
    "logger": ("lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger"),
}
"""The classes whose arguments the schema holds, by the key that names them; a recipe may name any other."""

_GIVEN_LATER = ("params",)  # LightningCLI and CausalLM pass them


def lightning_schema() -> dict[str, Any]:
    """The schema; its ``$comment`` names the versions whose words it holds."""
    trainer = {name: property_of(name, item.annotation) for name, item in trainer_parameters().items()}
    trainer["callbacks"] = _one_or_more(_object("callbacks"), {"type": "null"})
    trainer["logger"] = _one_or_more(_object("logger"), {"type": ["boolean", "null"]})
    sections = {
        "framework": {"const": "lightning"},
        "seed_everything": {"type": ["integer", "boolean", "null"]},
        "trainer": {
            "type": "object",
            "description": "lightning.pytorch.Trainer, word for word.",
            "properties": trainer,
            "additionalProperties": False,
        },
        **{name: {} for name in top_level_keys() if name not in ("seed_everything", "trainer")},
        **{name: _object(name) for name in ("model", "data", "optimizer")},
    }
    return document(
        {"type": "object", "properties": sections, "required": ["model"], "additionalProperties": False},
        "lightning",
        ("lightning", "transformers", "peft"),
    )


def _object(key: str) -> dict[str, Any]:
    """A class to make, with its arguments; those of the classes known for `key` are named."""
    known = [
        {
            "if": {"properties": {"class_path": {"const": path}}, "required": ["class_path"]},
            "then": {"properties": {"init_args": _arguments(path)}},
        }
        for path in _CLASSES[key]
    ]
    return {
        "type": "object",
        "properties": {
            "class_path": {"anyOf": [{"enum": list(_CLASSES[key])}, {"type": "string"}]},
            "init_args": {"type": "object"},
            "dict_kwargs": {"type": "object"},
        },
        "required": ["class_path"],
        "additionalProperties": False,
        "allOf": known,
    }


def _arguments(path: str) -> dict[str, Any]:
    source = sources.find(path)
    if source is None:
        return {}
    known, more = signatures.parameters(source)
    keys = {name: property_of(name, item.annotation) for name, item in known.items() if name not in _GIVEN_LATER}
    if path == _CLASSES["model"][0]:
        keys |= {"config": model_config(), "peft": adapters(), "optimizer": _object("optimizer")}
    return {"type": "object", "properties": keys, "additionalProperties": more}


def _one_or_more(item: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [{"type": "array", "items": item}, item, other]}
