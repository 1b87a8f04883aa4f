"""One run of a recipe for ``transformers.Trainer``: data, model and Trainer, fit, the model and summary at its end."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorboard  # noqa: F401  its absence is known now, not when TensorBoardCallback is made
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.utils.logging import disable_progress_bar

from ...errors import UserError, one_line
from ...hf.loss_scale import divide_where_the_model_does_not
from ...tasks import TASKS
from ...text.prepare import Prepared
from ...text.stream import Stream
from ...text.tokenizer import padding
from ..reading.schema import Recipe, Sample
from .checkpoints import SAVING, Checkpoint, newest_whole
from .processes import Processes
from .run_folder import RunFolder, replace_folder
from .run_log import RunLog
from .signals import StopRequest
from .summary import complete, evaluated_at, size_of
from .trainer_callback import RecipeTrainer, RunFolderCallback
from .training_data import load


def run(folder: RunFolder, recipe: Recipe, processes: Processes, say: Callable[[str], object]) -> int:
    """Trains in `folder`, which this run holds, and returns the signal that stopped it, or 0 when it is complete.

    Args:
        folder: the run folder.
        recipe: resolved.
        processes: all of them call this.
        say: receives the lines for the reader.
    """
    checkpoint = _checkpoint(folder, processes, say)
    arguments = build_arguments(recipe.training, folder)
    tokenizer, data, model = processes.in_turn(lambda: load(recipe, arguments.seed, say, folder))
    say(describe(model, arguments))
    gpus = torch.cuda.device_count() if arguments.device.type == "cuda" else 0
    if processes.count == 1 and gpus > 1:
        say(f"This process trains on one of {gpus} GPUs; --nproc {gpus} uses them all.")
    stop, keep = StopRequest(processes), recipe.training.get("save_total_limit")
    callback = RunFolderCallback(folder, RunLog(folder.metrics), stop, keep)
    trainer = _build_trainer(model, tokenizer, data, arguments, callback)
    with _mistakes_as_sentences(), _saving_aside(arguments):
        if checkpoint is not None and checkpoint.finished:
            _take_weights(trainer, callback, checkpoint)
        else:
            with refused_optimizer():  # made now, so that arguments it refuses are known before training
                trainer.create_optimizer()
            say(f"resuming from {checkpoint.path}" if checkpoint else f"training in {folder.path}")
            callback.checkpoint = checkpoint
            with stop.listening():
                trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
            step, last = trainer.state.global_step, trainer.state.max_steps
            if stop.signal is not None and step < last:
                say(stop.sentence(step, last, folder))
                return stop.signal
        _finish(recipe, trainer, tokenizer, data, folder, processes, say)
    return 0


class OneGpuArguments(TrainingArguments):
    """TrainingArguments of a process that uses one GPU, not all of them by `DataParallel`.

    Pickled, as in ``training_args.bin``, they are plain TrainingArguments, which open without this package.
    """

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (TrainingArguments,), self.__dict__


def build_arguments(training: dict[str, Any], folder: RunFolder) -> TrainingArguments:
    """The recipe's TrainingArguments, saving aside in `folder`.

    Ours, unless the recipe says otherwise: reports go to TensorBoard, a loss that is not finite is shown as such,
    memory is pinned only for a GPU, several processes take every parameter to have a gradient.

    Raises `UserError` for what they refuse.
    """
    ours = {
        "report_to": ["tensorboard"],
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        "hub_model_id": folder.path.name,
    }
    aside = {"output_dir": str(folder.path / SAVING), "save_total_limit": None, "disable_tqdm": True}
    try:
        return OneGpuArguments(**{**ours, **training, **aside})
    except Exception as error:  # of every kind, ImportError for a missing package among them
        message = one_line(error)
        named = next((f".{name}" for name in training if name in message), "")
        raise UserError(f"training{named}: {message}") from None


def optimizer_name(arguments: TrainingArguments) -> str:
    """As ``training.optim`` has it."""
    return str(getattr(arguments.optim, "value", arguments.optim))


def describe(model: PreTrainedModel, arguments: TrainingArguments) -> str:
    """The line about the model and its optimizer."""
    return f"model: {model.config.model_type}, {size_of(model)}, optimizer {optimizer_name(arguments)}"


@contextlib.contextmanager
def refused_optimizer() -> Iterator[None]:
    """Turns what an optimizer says of its arguments into a `UserError`."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training.optim, training.optim_args: {one_line(error)}") from None


def _checkpoint(folder: RunFolder, processes: Processes, say: Callable[[str], object]) -> Checkpoint | None:
    def find() -> str | None:
        shutil.rmtree(folder.path / SAVING, ignore_errors=True)  # what a crash left in the middle of saving
        found = newest_whole(folder.path, say)
        if found is not None and not found.finished:
            processes.require_same_number(found.processes, folder.path)
        return str(found.path) if found is not None else None

    path = processes.first(find)
    return Checkpoint.at(Path(path)) if path is not None else None


def _build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    arguments: TrainingArguments,
    callback: RunFolderCallback,
) -> RecipeTrainer:
    if isinstance(data.train, Stream) and arguments.dataloader_num_workers > data.train.files:
        raise UserError(
            f"training.dataloader_num_workers: each worker reads files of its own, and the stream has "
            f"{data.train.files}; give at most {data.train.files}"
        )
    disable_progress_bar()  # one bar per saved file would break ours
    logging.getLogger("transformers.trainer").addFilter(_is_news)
    trainer = RecipeTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        data_collator=data.collate,
        compute_metrics=_accuracy if data.labels is not None else None,
        preprocess_logits_for_metrics=_most_likely if data.labels is not None else None,
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    for reporter in trainer.callback_handler.callbacks:
        if isinstance(reporter, TensorBoardCallback):
            reporter.logging_dir = str(callback.folder.tensorboard)
    divide_where_the_model_does_not(trainer, data.collate([data.validation[0]]))
    return trainer


def _most_likely(logits: Any, labels: Any) -> Any:
    """The class of the largest logit: all that is kept of an evaluation."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(evaluated: Any) -> dict[str, float]:
    return {"accuracy": float((evaluated.predictions == evaluated.label_ids).mean())}


def _take_weights(trainer: RecipeTrainer, callback: RunFolderCallback, checkpoint: Checkpoint) -> None:
    """Puts the trainer where it was when training had ended."""
    best = checkpoint.state.get("best_model_checkpoint") if trainer.args.load_best_model_at_end else None
    place, model = best or str(checkpoint.path), trainer.model
    if hasattr(model, "peft_config"):
        model.load_adapter(place, model.active_adapter, is_trainable=True)
    else:
        model.load_state_dict(type(model).from_pretrained(place).state_dict())
    trainer.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
    trainer.start_counting(checkpoint)
    if callback.processes.main:
        callback.run_log.begin(checkpoint.step, checkpoint.step)


def _finish(
    recipe: Recipe,
    trainer: RecipeTrainer,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    folder: RunFolder,
    processes: Processes,
    say: Callable[[str], object],
) -> None:
    """Writes ``model/`` and ``summary.json``, prints the sample and the losses."""
    step = trainer.state.global_step
    if processes.agree(not evaluated_at(folder, step)):
        trainer.evaluate()
    tokens = trainer.counts()["tokens"]
    if not processes.main:
        return
    replace_folder(folder.model, lambda aside: trainer.save_model(str(aside)))
    if recipe.sample is not None and TASKS[recipe.task].generates:
        say(f"\n{generate(trainer.model, tokenizer, recipe.sample)}\n")
    names = {
        "model": trainer.model.config.model_type,
        "optimizer": optimizer_name(trainer.args),
        "device": str(trainer.args.device),
    }
    counted = {"step": step, "tokens": tokens, "skipped_rows": data.skipped_rows}
    complete(folder, say, module=trainer.model, names=names, optimizer=trainer.optimizer, **counted)


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    """The prompt and what the model writes after it, by temperature sampling with the sample's own seed; an
    encoder-decoder's answer to the prompt.

    The global random state is left as it was.  Text stops at the model's context length.
    """
    answers = model.config.is_encoder_decoder
    inputs = tokenizer(sample.prompt, return_tensors="pt", add_special_tokens=answers).input_ids.to(model.device)
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    room = int(min(sample.max_new_tokens, context - (0 if answers else inputs.shape[1])))
    if room < 1:
        return sample.prompt
    model.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sample.seed)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            temperature=sample.temperature,
            top_k=0,
            max_new_tokens=room,
            pad_token_id=padding(tokenizer),
        )
    written = tokenizer.decode(output[0], skip_special_tokens=True)
    return f"{sample.prompt}\n→ {written.strip()}" if answers else written


@contextlib.contextmanager
def _mistakes_as_sentences() -> Iterator[None]:
    """Turns what the user can mend of a training's errors into a `UserError`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) and "DataLoader worker" in str(error):
            raise UserError(str(error).strip().splitlines()[-1].partition(": ")[2]) from None
        if "find_unused_parameters" in str(error):
            raise UserError(
                "some parameters got no gradient, which several processes must know before: set "
                "training.ddp_find_unused_parameters=true"
            ) from None
        raise


@contextlib.contextmanager
def _saving_aside(arguments: TrainingArguments) -> Iterator[None]:
    """Leaves nothing behind in the folder where the Trainer saves."""
    try:
        yield
    finally:
        if arguments.process_index == 0:
            shutil.rmtree(arguments.output_dir, ignore_errors=True)


def _is_news(record: logging.LogRecord) -> bool:
    """Of the Trainer's warnings: a tied weight is stored once, so that its other name is missing in a checkpoint."""
    return not record.getMessage().startswith("There were missing keys in the checkpoint")
