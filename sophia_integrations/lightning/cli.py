"""LightningCLI with one addition: `--optimizer` keeps CausalLM's decay groups and schedule."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from lightning.pytorch.cli import LightningCLI

from .causal_lm import CausalLM

_NOISE = (
    "LightningCLI's args parameter", ".*does not have many workers", ".*exists and is not empty",
    ".*isinstance.treespec, LeafSpec", ".is_gradient_checkpointing. is deprecated",
)  # fmt: skip


class SophiaCLI(LightningCLI):
    """A `LightningCLI` for any module; a `CausalLM` finishes an optimizer given by `--optimizer` itself."""

    @staticmethod
    def configure_optimizers(lightning_module: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        if lr_scheduler is None and isinstance(lightning_module, CausalLM):
            return lightning_module.finish_optimizer(optimizer)
        return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)


def main(args: Any = None) -> SophiaCLI:
    """Run the command line: `python -m sophia_integrations.lightning fit --config FILE`."""
    return SophiaCLI(args=args, save_config_kwargs={"overwrite": True})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's own lines of information and the warnings that a run folder answers."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one bar per file that is loaded or saved
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for pattern in _NOISE:
                warnings.filterwarnings("ignore", pattern)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
