"""The end of a Lightning run: final validation loss, the model, the summary."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ....optim import SophiaG
from ..events import read_metrics
from ..folder import RunFolder
from ..processes import Processes
from ..summary import complete, replace_folder, summarize
from .checkpoints import LightningCheckpoint
from .watch import RunMetrics, drop_stopped

if TYPE_CHECKING:
    from ....lightning.cli import SophiaCLI

_PACKAGES = ("torch", "lightning", "transformers", "tokenizers")


def evaluate(cli: SophiaCLI, checkpoint: LightningCheckpoint | None = None) -> None:
    """The validation loss of the weights as they are, or of a checkpoint; nothing without a validation step."""
    from lightning.pytorch.utilities.model_helpers import is_overridden

    has_data = any(is_overridden("val_dataloader", owner) for owner in (cli.model, cli.datamodule) if owner)
    if not (has_data and is_overridden("validation_step", cli.model) and cli.trainer.limit_val_batches):
        return
    options: dict[str, Any] = {"datamodule": cli.datamodule, "verbose": False}
    if checkpoint is not None:
        options.update(checkpoint.options(cli.trainer.validate))
    cli.trainer.validate(cli.model, **options)


def finish(
    cli: SophiaCLI, metrics: RunMetrics, folder: RunFolder, processes: Processes, say: Callable[[str], object]
) -> None:
    """Writes ``model/``, of a transformers model, and ``summary.json``, and says the losses; all processes call it."""
    step = metrics.step = cli.trainer.global_step
    tokens, optimizer = metrics.tokens, cli.trainer.optimizers[0]

    def evaluated() -> bool:
        return any("eval_loss" in event and event["step"] == step for event in read_metrics(folder.metrics))

    if not processes.first(evaluated):
        evaluate(cli)
    if not processes.main:
        return
    _save_model(cli, folder, say)
    drop_stopped(folder)
    events = read_metrics(folder.metrics)
    names = {
        "model": model_name(cli.model),
        "optimizer": type(optimizer).__name__,
        "device": str(cli.trainer.strategy.root_device),
    }
    sophia = next((one for one in cli.trainer.optimizers if isinstance(one, SophiaG)), None)
    summary = summarize(
        events,
        step=step,
        tokens=tokens,
        module=cli.model,
        names=names,
        hessian_updates=sophia.param_groups[0]["hessian_updates"] if sophia is not None else None,
        packages=_PACKAGES,
        skipped_rows=getattr(getattr(cli.datamodule, "prepared", None), "skipped_rows", None),
    )
    complete(folder, summary, any("loss" in event for event in events), say)


def model_name(module: Any) -> str:
    """The type of the transformers model in a module, such as gpt2, or the name of the module's class."""
    config = getattr(getattr(module, "model", None), "config", None)
    return getattr(config, "model_type", None) or type(module).__name__


def _save_model(cli: SophiaCLI, folder: RunFolder, say: Callable[[str], object]) -> None:
    model, tokenizer = getattr(cli.model, "model", None), getattr(cli.datamodule, "tokenizer_object", None)
    if not hasattr(model, "save_pretrained"):
        return
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        say(f"The model is sharded over the processes; its weights are in {folder.checkpoints}.")
        return

    def fill(aside: Any) -> None:
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)

    replace_folder(folder.model, fill)
