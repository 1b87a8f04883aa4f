"""The tasks in one table: what model each trains, what data it reads, what may be asked of it.  Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_CAUSAL = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
_ENCODER = {"pad_token": "<|pad|>", "cls_token": "<|cls|>", "sep_token": "<|sep|>", "mask_token": "<|mask|>"}


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        model: the models that it can train, in words.
        auto_class: the class of transformers that makes its model.
        mapping: the models that it can train, as ``transformers.MODEL_FOR_{mapping}_MAPPING``.
        formats: the formats of rows that it reads; the first one is its own where neither the recipe nor the columns
            decide.
        packs: whether documents may share a row.
        peft_type: what PEFT calls it; None where it has no name.
        generates: whether its model can write a sample.
        masks: whether tokens are hidden at random, so that ``mask_probability`` has a part.
        special_tokens: those of a tokenizer that is trained for it, by the names that transformers has for them.
    """

    model: str
    auto_class: str
    mapping: str
    formats: tuple[str, ...]
    packs: bool = True
    peft_type: str | None = None
    generates: bool = False
    masks: bool = False
    special_tokens: Mapping[str, str] = field(default_factory=_CAUSAL.copy)


def _causal(*formats: str) -> Task:
    mapping, kind = "CAUSAL_LM", "causal language model"
    return Task(kind, "AutoModelForCausalLM", mapping, formats, peft_type="CAUSAL_LM", generates=True)


TASKS = {
    "pretrain": _causal("text"),
    "finetune": _causal("text", "prompt-completion", "chat"),
    "classify": Task(
        "sequence classifier",
        "AutoModelForSequenceClassification",
        "SEQUENCE_CLASSIFICATION",
        ("classification",),
        packs=False,
        peft_type="SEQ_CLS",
        special_tokens=_ENCODER,
    ),
    "seq2seq": Task(
        "sequence-to-sequence language model",
        "AutoModelForSeq2SeqLM",
        "SEQ_TO_SEQ_CAUSAL_LM",
        ("prompt-completion",),
        packs=False,
        peft_type="SEQ_2_SEQ_LM",
        generates=True,
        special_tokens={**_CAUSAL, "pad_token": "<|pad|>"},
    ),
    "masked-lm": Task(
        "masked language model",
        "AutoModelForMaskedLM",
        "MASKED_LM",
        ("text",),
        masks=True,
        special_tokens=_ENCODER,
    ),
}
