"""Which models divide their loss by the count that the Trainer gives them, and which only take it and ignore it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def heeds_count(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    """Whether the model's loss depends on ``num_items_in_batch``: tried on `batch`.

    The Trainer takes any model that accepts it (as ``**kwargs``) for one that divides by it, and then does not divide
    by the accumulated micro-batches itself. T5, BERT and every sequence classifier ignore it, so that their gradients
    would be too large by the number of micro-batches, and of processes. AdamW hardly notices; Sophia, whose Hessian
    keeps its scale, would train with another rho.
    """
    import torch

    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            plain = model(**batch).loss
            counted = model(**batch, num_items_in_batch=torch.tensor(7 * batch["labels"].numel(), device=device)).loss
    except TypeError:  # the argument is not accepted
        return False
    finally:
        model.train(was_training)
    return not torch.allclose(plain, counted)


def divide_where_models_do_not(trainer: Any, batch: dict[str, Tensor]) -> None:
    """Lets `trainer` divide the loss by the accumulated micro-batches unless its model does so by the count."""
    if trainer.model_accepts_loss_kwargs and not heeds_count(trainer.model, batch):
        trainer.model_accepts_loss_kwargs = False
