"""The tasks in one table: which model class of transformers each trains, and what its data asks of the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        auto_class: the class of transformers that makes its model.
        peft_type: what PEFT calls it.
        generates: whether its model can write a sample.
    """

    auto_class: str
    peft_type: str | None
    generates: bool = False


TASKS = {
    "pretrain": Task("AutoModelForCausalLM", "CAUSAL_LM", generates=True),
    "finetune": Task("AutoModelForCausalLM", "CAUSAL_LM", generates=True),
    "classify": Task("AutoModelForSequenceClassification", "SEQ_CLS"),
    "seq2seq": Task("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", generates=True),
    "masked-lm": Task("AutoModelForMaskedLM", None),
}
