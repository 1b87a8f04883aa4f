"""The model of a run: new from a transformers config, or pretrained; sized to its tokenizer, with or without LoRA."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...text.prepare import Prepared
from ...text.tokenizer import padding, why_not_loaded
from ..reading.schema import Model
from .tasks import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_model(
    wanted: Model, task: str, tokenizer: PreTrainedTokenizerBase, data: Prepared, seed: int
) -> PreTrainedModel:
    """The model of a task in float32; new weights, a new head and adapters depend on `seed` only.

    Raises `UserError` when a model cannot be loaded, its vocabulary is too small, or it cannot do what the data asks.
    """
    from transformers import set_seed

    set_seed(seed)
    row = TASKS[task]
    if wanted.pretrained is not None:
        model = _pretrained(wanted, row, tokenizer, _labels(data))
    else:
        assert wanted.config is not None
        model = _new(wanted.config, row, tokenizer, _labels(data))
    if row.auto_class == "AutoModelForCausalLM" and getattr(model, "loss_type", "") is None:
        model.loss_type = "ForCausalLM"  # transformers knows no loss by this class name and warns of its default
    if data.layout == "packed":
        _require_packing(model)
    return model if wanted.peft is None else _adapted(model, wanted.peft, row)


def empty_model(wanted: Model, task: str, tokenizer: PreTrainedTokenizerBase, data: Prepared) -> PreTrainedModel:
    """The model of `build_model` without its numbers, on the meta device: shapes and types at no cost.

    Of a pretrained model only the config is read.  Raises `UserError` as `build_model` does.
    """
    import torch
    import transformers

    row = TASKS[task]
    with torch.device("meta"):
        if wanted.pretrained is None:
            assert wanted.config is not None
            model = _new(wanted.config, row, tokenizer, _labels(data))
        else:
            options = {"revision": wanted.revision, "trust_remote_code": wanted.trust_remote_code, **_labels(data)}
            try:
                config = transformers.AutoConfig.from_pretrained(wanted.pretrained, **options)
                model = getattr(transformers, row.auto_class).from_config(
                    config, trust_remote_code=wanted.trust_remote_code
                )
            except (OSError, ValueError) as error:
                raise _not_loaded(wanted, error) from None
        return model.float() if wanted.peft is None else _adapted(model.float(), wanted.peft, row)


def _not_loaded(wanted: Model, error: Exception) -> UserError:
    return UserError(f"model.pretrained: {wanted.pretrained!r} cannot be loaded: {why_not_loaded(error)}")


def _labels(data: Prepared) -> dict[str, Any]:
    if data.labels is None:
        return {}
    return {
        "num_labels": len(data.labels),
        "id2label": dict(enumerate(data.labels)),
        "label2id": {label: number for number, label in enumerate(data.labels)},
        "problem_type": "single_label_classification",
    }


def _new(
    config: dict[str, Any], row: Task, tokenizer: PreTrainedTokenizerBase, labels: dict[str, Any]
) -> PreTrainedModel:
    import transformers

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if labels or row.peft_type == "SEQ_2_SEQ_LM":
        special["pad_token_id"] = padding(tokenizer)
    if row.peft_type == "SEQ_2_SEQ_LM":
        special["decoder_start_token_id"] = padding(tokenizer)
    settings = {"vocab_size": len(tokenizer), **special, **config, **labels}
    if settings["vocab_size"] < len(tokenizer):
        raise UserError(
            f"model.config.vocab_size: {settings['vocab_size']} is less than the tokenizer's {len(tokenizer)}; "
            "leave it out to follow the tokenizer"
        )
    return getattr(transformers, row.auto_class).from_config(transformers.AutoConfig.for_model(**settings))


def _pretrained(
    wanted: Model, row: Task, tokenizer: PreTrainedTokenizerBase, labels: dict[str, Any]
) -> PreTrainedModel:
    import transformers

    options: dict[str, Any] = {"revision": wanted.revision, "trust_remote_code": wanted.trust_remote_code, **labels}
    if labels:
        options["ignore_mismatched_sizes"] = True  # a head for other labels is replaced by a new one
    try:
        with _without_report() if labels else contextlib.nullcontext():
            model = getattr(transformers, row.auto_class).from_pretrained(wanted.pretrained, **options).float()
    except (OSError, ValueError) as error:
        raise _not_loaded(wanted, error) from None
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise UserError(
            f"model.pretrained: {wanted.pretrained!r} knows {rows} tokens, the tokenizer has {len(tokenizer)}"
        )
    if labels and model.config.pad_token_id is None:
        model.config.pad_token_id = padding(tokenizer)  # decoders find the end of a row by it
    return model


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Without the table of weights that are new: a classifier's head always is."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _adapted(model: PreTrainedModel, words: dict[str, Any], row: Task) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise UserError("model.peft needs the package peft, not installed here: pip install peft")
    from peft import LoraConfig, get_peft_model

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")  # peft still asks for it
            return get_peft_model(model, LoraConfig(**{"task_type": row.peft_type, **words}))
    except (ValueError, TypeError) as error:
        raise UserError(f"model.peft: {' '.join(str(error).split())}") from None


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
