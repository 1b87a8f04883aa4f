"""The model of a recipe: sized to its tokenizer, with the labels of its data; able to do what the data asks."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ... import models
from ...errors import UserError, needs, one_line
from ...tasks import TASKS
from ...text.prepare import Prepared
from ...text.tokenizer import padding, why_not_loaded
from ..reading.schema import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def require_sizes(wanted: Model, task: str, block_size: int) -> None:
    """Raises `UserError`, before any data is read, when a new model's sizes do not fit each other or the blocks."""
    import torch

    if wanted.config is None:
        return
    try:
        with torch.device("meta"):
            config = models.build_model(TASKS[task].auto_class, config=wanted.config).config
    except Exception as error:  # transformers refuses in many ways
        raise UserError(f"model.config: {one_line(error)}") from None
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and block_size > context > 0:
        raise UserError(f"data.block_size: {block_size} is longer than the model's context of {context} tokens")


def build_model(
    wanted: Model, task: str, tokenizer: PreTrainedTokenizerBase, data: Prepared, seed: int, *, empty: bool = False
) -> PreTrainedModel:
    """The model of a task in float32; new weights, a new head and adapters depend on `seed` only.

    With `empty` it has shapes and types but no numbers (torch's meta device), and costs nothing.

    Raises `UserError` when a model cannot be loaded, its vocabulary is too small, or it cannot do what the data asks.
    """
    import torch
    from transformers import set_seed

    set_seed(seed)
    row, labels = TASKS[task], _labels(data)
    options: dict[str, Any] = {}
    if wanted.config is not None:
        options["config"] = _sized(wanted.config, task, tokenizer, labels)
    else:
        options.update(pretrained=wanted.pretrained, revision=wanted.revision, **labels)
        options.update(trust_remote_code=wanted.trust_remote_code, empty=empty)
        if labels and not empty:
            options["ignore_mismatched_sizes"] = True  # a head for other labels is replaced by a new one
    try:
        with torch.device("meta") if empty else contextlib.nullcontext(), _without_report(bool(labels)):
            model = models.build_model(row.auto_class, **options)
    except (OSError, ValueError) as error:
        if wanted.pretrained is None:
            raise
        raise UserError(f"model.pretrained: {wanted.pretrained!r} cannot be loaded: {why_not_loaded(error)}") from None
    if wanted.pretrained is not None:
        rows = model.get_input_embeddings().weight.shape[0]
        if rows < len(tokenizer):
            raise UserError(
                f"model.pretrained: {wanted.pretrained!r} knows {rows} tokens, the tokenizer has {len(tokenizer)}"
            )
        if labels and model.config.pad_token_id is None:
            model.config.pad_token_id = padding(tokenizer)  # decoders find the end of a row by it
    if data.layout == "packed" and not empty:
        _require_packing(model)
    return model if wanted.peft is None else _adapted(model, {"task_type": row.peft_type, **wanted.peft}, empty)


def _labels(data: Prepared) -> dict[str, Any]:
    if data.labels is None:
        return {}
    return {
        "num_labels": len(data.labels),
        "id2label": dict(enumerate(data.labels)),
        "label2id": {label: number for number, label in enumerate(data.labels)},
        "problem_type": "single_label_classification",
    }


def _sized(
    config: dict[str, Any], task: str, tokenizer: PreTrainedTokenizerBase, labels: dict[str, Any]
) -> dict[str, Any]:
    """The recipe's config with what follows from its tokenizer and its labels."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if labels or task == "seq2seq":
        special["pad_token_id"] = padding(tokenizer)
    if task == "seq2seq":
        special["decoder_start_token_id"] = padding(tokenizer)
    settings = {"vocab_size": len(tokenizer), **special, **config, **labels}
    if settings["vocab_size"] < len(tokenizer):
        raise UserError(
            f"model.config.vocab_size: {settings['vocab_size']} is less than the tokenizer's {len(tokenizer)}; "
            "leave it out to follow the tokenizer"
        )
    return settings


@contextlib.contextmanager
def _without_report(new_head: bool) -> Iterator[None]:
    """Without the table of weights that are new: a classifier's head always is."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    if new_head:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _adapted(model: PreTrainedModel, words: dict[str, Any], empty: bool) -> Any:
    import torch

    if importlib.util.find_spec("peft") is None:
        raise UserError(f"model.peft: {needs('peft')}")
    try:
        with torch.device("meta") if empty else contextlib.nullcontext():
            return models.with_adapters(model, words)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.peft: {one_line(error)}") from None


def _require_packing(model: PreTrainedModel) -> None:
    """Raises `UserError` unless the model keeps two sequences in one row apart: tried with a few tokens."""
    import torch

    if "position_ids" in inspect.signature(model.forward).parameters:
        ids = torch.arange(12)[None] % min(12, model.config.vocab_size)
        positions = torch.arange(6).repeat(2)[None]
        model.eval()
        with torch.no_grad():
            both = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 6:]
            alone = model(input_ids=ids[:, 6:], position_ids=positions[:, 6:], use_cache=False).logits[0]
        model.train()
        if torch.allclose(both, alone, rtol=1e-3, atol=1e-4):
            return
    raise UserError(
        f"data.packing: {type(model).__name__} lets examples in one row see each other; leave packing out, so that "
        "each has a row of its own"
    )
