"""The end of a run: final validation loss, the model, a sample of its text, the summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sized
from typing import TYPE_CHECKING

from ...text.prepare import Prepared
from ...text.tokenizer import padding
from ..reading.schema import Recipe, Sample
from .events import read_metrics
from .folder import RunFolder
from .summary import complete, replace_folder, summarize
from .tasks import TASKS
from .trainer import Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from .saving import RecipeTrainer

_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers")


def finish(
    recipe: Recipe,
    trainer: RecipeTrainer,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    folder: RunFolder,
    watch: Watch,
    say: Callable[[str], object],
) -> None:
    """Writes ``model/`` and ``summary.json``, prints the sample and the losses."""
    events, step = read_metrics(folder.metrics), trainer.state.global_step
    evaluated = any("eval_loss" in event and event["step"] == step for event in events)
    if trainer.processes.agree(not evaluated):
        trainer.evaluate()
        events = read_metrics(folder.metrics)
    if not trainer.processes.main:
        return
    replace_folder(folder.model, lambda aside: trainer.save_model(str(aside)))
    if recipe.sample is not None and TASKS[recipe.task].generates:
        say(f"\n{generate(trainer.model, tokenizer, recipe.sample)}\n")
    names = {
        "model": trainer.model.config.model_type,
        "optimizer": getattr(trainer.args.optim, "value", str(trainer.args.optim)),
        "device": str(trainer.args.device),
    }
    summary = summarize(
        events,
        step=step,
        tokens=tokens_seen(trainer, data, step),
        module=trainer.model,
        names=names,
        hessian_updates=_hessian_updates(trainer),
        packages=_PACKAGES,
        skipped_rows=data.skipped_rows,
    )
    complete(folder, summary, any("loss" in event for event in events), say)


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    """The prompt and what the model writes after it, by temperature sampling with the sample's own seed; an
    encoder-decoder's answer to the prompt.

    The global random state is left as it was.  Text stops at the model's context length.
    """
    import torch

    answers = model.config.is_encoder_decoder
    inputs = tokenizer(sample.prompt, return_tensors="pt", add_special_tokens=answers).input_ids.to(model.device)
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    room = int(min(sample.max_new_tokens, context - (0 if answers else inputs.shape[1])))
    if room < 1:
        return sample.prompt
    was_training = model.training
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
    model.train(was_training)
    written = tokenizer.decode(output[0], skip_special_tokens=True)
    return f"{sample.prompt}\n→ {written.strip()}" if answers else written


def tokens_seen(trainer: Trainer, data: Prepared, step: int) -> int:
    """Training tokens of all processes in `step` optimizer steps, padding of packed rows included.

    Where rows have different lengths, those of an epoch begun count as many as the average.  The last step of an
    epoch may be smaller; several processes fill it up with rows of the beginning.
    """
    args = trainer.args
    batch = args.train_batch_size * args.world_size
    whole = step * batch * args.gradient_accumulation_steps
    if not isinstance(data.train, Sized):  # a stream has no epochs
        return int(whole * data.tokens_per_row)
    rows = len(data.train)
    batches = rows // batch if args.dataloader_drop_last else math.ceil(rows / batch)
    if args.dataloader_drop_last or args.world_size > 1:
        rows = batches * batch
    epochs, rest = divmod(step, max(1, math.ceil(batches / args.gradient_accumulation_steps)))
    return round((epochs * rows + rest * batch * args.gradient_accumulation_steps) * data.tokens_per_row)


def _hessian_updates(trainer: Trainer) -> int | None:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    stats = optimizer.stats() if hasattr(optimizer, "stats") else {}
    return int(stats["hessian_updates"]) if "hessian_updates" in stats else None
