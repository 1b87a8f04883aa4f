"""Sophia in Lightning: a callback that attaches the Hessian pass, a causal language model, and text as token blocks.

`SophiaG` and `SophiaH` are imported here so that `LightningCLI` knows them by their short names.
"""

from ..optim import SophiaG, SophiaH
from .callback import SophiaCallback
from .causal_lm import CausalLM
from .data import TextDataModule
from .exact_resume import ExactResume

__all__ = ["CausalLM", "ExactResume", "SophiaCallback", "SophiaG", "SophiaH", "TextDataModule"]
