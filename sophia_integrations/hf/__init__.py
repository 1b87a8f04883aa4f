"""Hugging Face Trainer: Sophia as a named optimizer, where its models keep their labels, and the logs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register

if TYPE_CHECKING:
    from .arguments import parse_optim_args
    from .callback import SophiaCallback
    from .trainer import SophiaTrainer, SophiaTrainerMixin

__all__ = ["SophiaCallback", "SophiaTrainer", "SophiaTrainerMixin", "parse_optim_args", "register"]

_HOME = {
    "SophiaCallback": "callback",
    "SophiaTrainer": "trainer",
    "SophiaTrainerMixin": "trainer",
    "parse_optim_args": "arguments",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
