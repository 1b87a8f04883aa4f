"""A ``transformers.Trainer`` for a recipe: arguments, datasets and our callbacks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...text.stream import Stream
from .folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from ...text.prepare import Prepared
    from .metrics import MetricsWriter
    from .processes import Processes
    from .resume import StopOnSignal
    from .saving import RecipeTrainer


@dataclass(frozen=True)
class Watch:
    """The callbacks that are asked something after training."""

    stop: StopOnSignal
    metrics: MetricsWriter


def build_arguments(training: dict[str, Any], folder: RunFolder) -> TrainingArguments:
    """The recipe's TrainingArguments.

    Ours, unless the recipe says otherwise: reports go to TensorBoard, a loss that is not finite is shown as such,
    memory is pinned only for a GPU, several processes take every parameter to have a gradient.
    """
    import torch
    from transformers import TrainingArguments

    ours = {
        "report_to": ["tensorboard"],
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
    }
    arguments = TrainingArguments(**{**ours, **training, "output_dir": str(folder.path), "disable_tqdm": True})
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs are trained on by several processes, never by DataParallel
    return arguments


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    arguments: TrainingArguments,
    folder: RunFolder,
    processes: Processes,
) -> tuple[RecipeTrainer, Watch]:
    """The Trainer, ready to train or evaluate.  Raises `UserError` for more loader workers than a stream has files."""
    from transformers import PrinterCallback
    from transformers.utils.logging import disable_progress_bar

    from ...hf.loss_scale import divide_where_the_model_does_not
    from .metrics import MetricsWriter
    from .progress import RunProgress
    from .resume import RunningLoss, StopOnSignal
    from .saving import RecipeTrainer

    _require_files(data.train, arguments.dataloader_num_workers)
    disable_progress_bar()  # one bar per saved file would break ours
    running_loss = RunningLoss()
    watch = Watch(StopOnSignal(processes), MetricsWriter(folder.metrics))
    before = os.environ.get("TENSORBOARD_LOGGING_DIR")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.tensorboard)  # the only way to name it
    try:
        trainer = RecipeTrainer(
            model=model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=tokenizer,
            data_collator=data.collate,
            compute_metrics=_accuracy if data.labels is not None else None,
            preprocess_logits_for_metrics=_most_likely if data.labels is not None else None,
            callbacks=[running_loss, watch.metrics, RunProgress(), watch.stop],
        )
    finally:
        if before is None:
            del os.environ["TENSORBOARD_LOGGING_DIR"]
        else:
            os.environ["TENSORBOARD_LOGGING_DIR"] = before
    trainer.remove_callback(PrinterCallback)
    divide_where_the_model_does_not(trainer, data.collate([data.validation[0]]))
    running_loss.trainer = trainer
    trainer.processes = processes
    return trainer, watch


def _require_files(rows: Any, workers: int) -> None:
    if isinstance(rows, Stream) and workers > rows.files:
        raise UserError(
            f"training.dataloader_num_workers: each worker reads files of its own, and the stream has {rows.files}; "
            f"give at most {rows.files}"
        )


def _most_likely(logits: Any, labels: Any) -> Any:
    """The class of the largest logit: all that is kept of an evaluation."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(evaluated: Any) -> dict[str, float]:
    return {"accuracy": float((evaluated.predictions == evaluated.label_ids).mean())}
