"""LightningCLI with one addition: `--optimizer` keeps CausalLM's decay groups and schedule."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningCLI

from .causal_lm import CausalLM


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
