"""Where a key of an ``hf`` recipe belongs, for the sentence about one that stands in the wrong section."""

from __future__ import annotations

from typing import Any

from . import words
from .schema import Columns, Data, Hub, Model, Recipe, Sample, Tokenizer, TokenizerTraining
from .wording import did_you_mean, near

TOP = "the top level"
_SECTIONS = {
    "data": Data,
    TOP: Recipe,
    "model": Model,
    "tokenizer": Tokenizer,
    "tokenizer.train": TokenizerTraining,
    "data.hub": Hub,
    "data.columns": Columns,
    "sample": Sample,
}


def unknown_key(name: str, here: str, known: set[str], raw: dict[str, Any]) -> str:
    """The message for the unknown key `name` of the section `here`, whose keys are `known`.

    It names another section that has this very key, else the nearest key here, else the nearest key elsewhere.
    """
    sections = _all_sections(raw)
    homes = [section for section, keys in sections.items() if section != here and name in keys]
    if homes:
        shown = [section if section == TOP else repr(section) for section in homes[:2]]
        return f"unknown key here, it belongs under {' or '.join(shown)}".replace(f"under {TOP}", f"at {TOP}")
    if not near(name, known):
        for section, keys in sections.items():
            if section != here and near(name, keys, 0.85):
                place = f"at {TOP}" if section == TOP else f"under {section!r}"
                return f"unknown key here, did you mean {near(name, keys)!r} {place}?"
    return f"unknown key{did_you_mean(name, known)}"


def _all_sections(raw: dict[str, Any]) -> dict[str, set[str]]:
    """Every section with its keys; those with most to mistake come first, adapters only where nothing else fits."""
    found = {"training": set(words.training_words())}
    found |= {section: set(model.model_fields) for section, model in _SECTIONS.items()}
    model = raw.get("model")
    config = model.get("config") if isinstance(model, dict) else None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if isinstance(kind, str):
        found["model.config"] = set(words.config_words(kind) or ())
    known = set().union(*found.values())
    found["model.peft"] = set(words.lora_words() or ()) - known
    return found
