"""Sophia in Lightning: a callback that attaches the Hessian pass, a causal language model, and text as token blocks.

`SophiaG` and `SophiaH` are imported here so that `LightningCLI` knows them by their short names.

Fabric has no callbacks; there the optimizer gets its estimator before `setup` wraps both::

    raw = GPT2LMHeadModel(config)
    optimizer = SophiaG(raw.parameters(), lr=1e-3, estimator=GaussNewtonBartlett(raw))
    model, optimizer = fabric.setup(raw, optimizer)
    for batch in fabric.setup_dataloaders(loader):
        fabric.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
"""

from ..optim import SophiaG, SophiaH
from .callback import SophiaCallback
from .causal_lm import CausalLM
from .data import TextDataModule
from .exact_resume import ExactResume

__all__ = ["CausalLM", "ExactResume", "SophiaCallback", "SophiaG", "SophiaH", "TextDataModule"]
