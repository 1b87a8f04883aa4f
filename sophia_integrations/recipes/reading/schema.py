"""What a recipe may say, as pydantic models; a key that is not here is refused, a default is written here once.

``training`` is not spelled out: its keys are those of ``transformers.TrainingArguments``, as `json_schema` has them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Model(_Section):
    """Exactly one of: ``config``, a new model from a transformers config; ``pretrained``, a folder or hub id.

    ``peft`` holds the words of ``peft.LoraConfig``; with it only the adapters are trained.
    """

    config: dict[str, Any] | None = None
    pretrained: Annotated[str, Field(min_length=1)] | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    peft: dict[str, Any] | None = None


class TokenizerTraining(_Section):
    """A byte-level BPE tokenizer, trained on the training documents only."""

    vocab_size: Annotated[int, Field(ge=257)]
    min_frequency: Annotated[int, Field(ge=1)] = 2


class Tokenizer(_Section):
    """Exactly one of: ``train``; ``pretrained``, a folder or hub id.  Left out: the pretrained model's own."""

    train: TokenizerTraining | None = None
    pretrained: Annotated[str, Field(min_length=1)] | None = None


class Hub(_Section):
    """A data set by its hub id, or a folder with a copy of its repository."""

    path: Annotated[str, Field(min_length=1)]
    name: str | None = None
    split: Annotated[str, Field(min_length=1)] = "train"
    validation_split: str | None = None
    revision: str | None = None


class Columns(_Section):
    """Which column plays which part; without it each is called as here."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    label: str | None = None


class Data(_Section):
    """Exactly one of ``source``, ``files`` and ``hub``.

    A text file is one document; a line of ``.jsonl`` and a row of ``.json``, ``.csv``, ``.parquet``, ``.arrow`` or a
    data set is one too.  Without ``validation_files`` or ``hub.validation_split`` about ``validation_fraction`` of the
    documents is held out.  ``format`` follows from the task when left out; a document longer than ``block_size`` tokens
    is cut, except where text is packed into blocks.  A bad row is an error, or with ``bad_rows: skip`` left out and
    counted.
    """

    source: Literal["python-stdlib"] | None = None
    files: Annotated[list[str], Field(min_length=1)] | None = None
    hub: Hub | None = None
    validation_files: Annotated[list[str], Field(min_length=1)] | None = None
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    format: Literal["text", "prompt-completion", "chat", "classification"] | None = None
    columns: Columns | None = None
    block_size: Annotated[int, Field(ge=2)]
    packing: bool | None = None
    streaming: bool = False
    bad_rows: Literal["error", "skip"] = "error"
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15


class Sample(_Section):
    """Text that the trained model writes at the end: ``max_new_tokens`` after ``prompt``."""

    prompt: Annotated[str, Field(min_length=1)]
    max_new_tokens: Annotated[int, Field(ge=1)] = 80
    temperature: Annotated[float, Field(gt=0)] = 0.8
    seed: int = 0


class Recipe(_Section):
    """One run.  ``run_dir`` defaults to ``runs/<name of the recipe file>``."""

    framework: Literal["hf"]
    task: Literal["pretrain", "finetune", "classify", "seq2seq", "masked-lm"]
    model: Model
    tokenizer: Tokenizer | None = None
    data: Data
    training: dict[str, Any]
    sample: Sample | None = None
    run_dir: Annotated[str, Field(min_length=1)] | None = None

    def settings(self) -> dict[str, Any]:
        """Plain values with the defaults filled in, but for those that have no part in this recipe."""
        settings = self.model_dump(exclude_none=True)
        data = settings["data"]
        if self.data.bad_rows == "error":
            del data["bad_rows"]
        if self.task != "masked-lm":
            del data["mask_probability"]
        if self.data.validation_files is not None or self.data.hub and self.data.hub.validation_split is not None:
            del data["validation_fraction"]
        if self.model.pretrained is None:
            del settings["model"]["trust_remote_code"]
        return settings
