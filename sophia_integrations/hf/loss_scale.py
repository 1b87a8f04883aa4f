"""Which models divide their loss by the count that the Trainer gives them, and which only take it and ignore it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..optim.checks import warn_caller


def divide_where_the_model_does_not(trainer: Any, batch: Mapping[str, Any]) -> bool | None:
    """Let `trainer` average the loss over the micro-batches of a step when its model takes no care of that.

    The Trainer takes any model whose forward has ``**kwargs`` for one that divides by `num_items_in_batch`, and then
    does not divide by the accumulated micro-batches itself, and multiplies by the processes. T5, BERT and every
    sequence classifier ignore the count, so that their gradients would be too large by those factors. AdamW hardly
    notices; Sophia, whose Hessian keeps its scale, would train with another rho.

    The model is tried on `batch`, in evaluation mode and without gradients. Every process calls this.

    Args:
        trainer: a `transformers.Trainer`, whose `model_accepts_loss_kwargs` is set to False where needed.
        batch: one micro-batch as the data loader gives it.

    Returns:
        Whether it was needed; None when no process has a label in its batch that could tell.
    """
    leaves_it_to_the_model = trainer.model_accepts_loss_kwargs and not _scales_its_own_loss(trainer)
    ignores = _ignores_count(trainer, batch) if leaves_it_to_the_model else False
    trainer._sophia_loss_scale_is_known = ignores is not None
    if ignores:
        trainer.model_accepts_loss_kwargs = False
    return ignores


def divide_once(trainer: Any, batch: Mapping[str, Any], num_items_in_batch: Any) -> None:
    """`divide_where_the_model_does_not` at the first step for which it matters, if not before, with a warning."""
    spread = trainer.args.gradient_accumulation_steps > 1 or trainer.args.world_size > 1
    if num_items_in_batch is None or not spread or getattr(trainer, "_sophia_loss_scale_is_known", False):
        return
    if divide_where_the_model_does_not(trainer, batch):
        who = "label smoothing" if trainer.label_smoother is not None else type(trainer.model).__name__
        warn_caller(
            f"{who} ignores num_items_in_batch, and the Trainer would leave the loss and the gradients too large by "
            "the number of micro-batches and processes of a step; with Sophia it divides by them. Runs with another "
            "optimizer log the loss as large as before."
        )


@contextlib.contextmanager
def divided_by_accelerate(trainer: Any) -> Iterator[None]:
    """Around one training step: transformers 4.46 and 4.47 divide only the loss that they log, not its gradients."""
    import transformers

    averaged = not trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None
    forgotten = averaged and transformers.__version__.startswith(("4.46.", "4.47."))
    if forgotten:
        trainer.accelerator.gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    try:
        yield
    finally:
        if forgotten:
            trainer.accelerator.gradient_accumulation_steps = 1


def _scales_its_own_loss(trainer: Any) -> bool:
    """Whether the loss is the user's function or method, who is told by the Trainer's documentation to scale it."""
    from transformers import Trainer

    own = trainer.compute_loss_func is not None or type(trainer).compute_loss is not Trainer.compute_loss
    return own or getattr(trainer, "loss_is_scaled_for_ga", None) is not None


def _ignores_count(trainer: Any, batch: Mapping[str, Any]) -> bool | None:
    """Whether the loss of `batch` depends on `num_items_in_batch` on no process; None when none has a loss."""
    batch = trainer._prepare_inputs(dict(batch))
    model, training = trainer.model, trainer.model.training
    model.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            one, two = (trainer.compute_loss(model, dict(batch), num_items_in_batch=n).float() for n in (1, 2))
    finally:
        model.train(training)
    told = one.isfinite() & (one != 0)
    differs, told = trainer.accelerator.gather(torch.stack([told & ~torch.isclose(one, two), told])[None]).any(0)
    return not bool(differs) if told else None
