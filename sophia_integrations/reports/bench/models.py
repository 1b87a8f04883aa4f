"""The models and batches of the measurements that need some: a GPT-2 with new weights, random tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ...errors import UserError


class Shape(NamedTuple):
    """A GPT-2, the rows of a micro-batch, and the micro-batches of a step."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int
    rows: int
    accumulation: int = 1


SHAPES = {
    "small": Shape(4, 160, 4, 1_024, 128, 24),
    "small-accumulated": Shape(4, 160, 4, 1_024, 128, 8, 8),
    "long": Shape(4, 160, 4, 1_024, 1_024, 8),
    "wide": Shape(2, 256, 4, 50_257, 256, 8),
    "wide-accumulated": Shape(2, 256, 4, 50_257, 256, 8, 8),
    "124m": Shape(12, 768, 12, 50_257, 1_024, 1),
}
"""The default recipe's model and batch; 8 micro-batches of 8 rows, as a Trainer has them; long rows; a large
vocabulary; GPT-2 itself."""


class Task(NamedTuple):
    """A model, what one training step computes, and its tokens."""

    model: nn.Module
    backward: Callable[[], None]
    tokens: int


def task(size: str, device: str) -> Task:
    """A new model of `size` and its forward, backward and gradient clip on the micro-batches of a step.

    Raises:
        UserError: a size that there is not.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    if size not in SHAPES:
        raise UserError(f"--size {size}: there are {', '.join(SHAPES)}.")
    shape = SHAPES[size]
    no_dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        n_positions=shape.length,
        vocab_size=shape.vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        **no_dropout,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).to(device)
    model.loss_type = "ForCausalLM"
    ids = torch.randint(shape.vocabulary, (shape.accumulation, shape.rows, shape.length), device=device)

    def backward() -> None:
        model.zero_grad()
        for rows in ids:
            (model(input_ids=rows, labels=rows).loss / shape.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)

    return Task(model, backward, ids.numel())
