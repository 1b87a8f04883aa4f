"""Sophia in the training loop you already have: the optimizer and the Hessian pass that makes it Sophia.

Importing this package is light (no torch, transformers or lightning) and makes `optim="sophia"` known to
`transformers.TrainingArguments`, whichever of the two is imported first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .hf.registration import register

if TYPE_CHECKING:
    from .curvature import EmpiricalFisher, GaussNewtonBartlett, Hutchinson
    from .optim import SophiaG, SophiaH, param_groups

__version__ = "0.2.0"
__all__ = ["EmpiricalFisher", "GaussNewtonBartlett", "Hutchinson", "SophiaG", "SophiaH", "__version__", "param_groups"]

_HOME = {
    "SophiaG": "optim",
    "SophiaH": "optim",
    "param_groups": "optim",
    "EmpiricalFisher": "curvature",
    "GaussNewtonBartlett": "curvature",
    "Hutchinson": "curvature",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


register()
