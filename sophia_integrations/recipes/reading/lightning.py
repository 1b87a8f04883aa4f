"""How a LightningCLI config is told from an ``hf`` recipe."""

from __future__ import annotations

from typing import Any

_ONLY_LIGHTNING = ("trainer", "seed_everything", "lr_scheduler", "ckpt_path")
_CLASS = {"class_path", "init_args", "dict_kwargs"}


def is_lightning(raw: dict[str, Any]) -> bool:
    """Whether a recipe is meant as a LightningCLI config: it says so, or it has the keys and shapes of one."""
    if raw.get("framework") in ("hf", "lightning"):
        return raw["framework"] == "lightning"
    if any(key in raw for key in _ONLY_LIGHTNING):
        return True
    sections = [raw.get("model"), raw.get("data")]
    return any(isinstance(section, dict) and _CLASS & section.keys() for section in sections)
