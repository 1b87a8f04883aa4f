"""A plain ``transformers.Trainer`` for a recipe: arguments, datasets and our callbacks, no subclass."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

    from ...text.blocks import Splits
    from .metrics import MetricsWriter
    from .resume import StopOnSignal


@dataclass(frozen=True)
class Watch:
    """The callbacks that are asked something after training."""

    stop: StopOnSignal
    metrics: MetricsWriter


def build_arguments(training: dict[str, Any], folder: RunFolder) -> TrainingArguments:
    """The recipe's TrainingArguments.

    Ours, unless the recipe says otherwise: reports go to TensorBoard, a loss that is not finite is shown as such,
    memory is pinned only for a GPU.
    """
    import torch
    from transformers import TrainingArguments

    ours = {
        "report_to": ["tensorboard"],
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return TrainingArguments(**{**ours, **training, "output_dir": str(folder.path), "disable_tqdm": True})


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    arguments: TrainingArguments,
    folder: RunFolder,
) -> tuple[Trainer, Watch]:
    """The Trainer, ready to train or evaluate."""
    from transformers import PrinterCallback, Trainer, default_data_collator
    from transformers.utils.logging import disable_progress_bar

    from .metrics import MetricsWriter
    from .progress import RunProgress
    from .resume import RunningLoss, StopOnSignal

    disable_progress_bar()  # one bar per saved file would break ours
    if (
        getattr(model, "loss_type", "") is None
    ):  # transformers knows no loss by this class name and warns of its default
        model.loss_type = "ForCausalLM"
    running_loss = RunningLoss()
    watch = Watch(StopOnSignal(), MetricsWriter(folder.metrics))
    before = os.environ.get("TENSORBOARD_LOGGING_DIR")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.tensorboard)  # the only way to name it
    try:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=splits.train,
            eval_dataset=splits.validation,
            processing_class=tokenizer,
            data_collator=default_data_collator,
            callbacks=[running_loss, watch.metrics, RunProgress(), watch.stop],
        )
    finally:
        if before is None:
            del os.environ["TENSORBOARD_LOGGING_DIR"]
        else:
            os.environ["TENSORBOARD_LOGGING_DIR"] = before
    trainer.remove_callback(PrinterCallback)
    running_loss.trainer = trainer
    return trainer, watch
