"""What a recipe may say, as pydantic models; a key that is not here is refused, a default is written here once.

``training`` is not spelled out: its keys are those of ``transformers.TrainingArguments``, checked in ``checks.py``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Model(_Section):
    """Exactly one of: ``config``, a new model from a transformers config; ``pretrained``, a folder or hub id."""

    config: dict[str, Any] | None = None
    pretrained: str | None = None


class TokenizerTraining(_Section):
    """A byte-level BPE tokenizer, trained on the training documents only."""

    vocab_size: Annotated[int, Field(ge=257)]
    min_frequency: Annotated[int, Field(ge=1)] = 2


class Tokenizer(_Section):
    """Exactly one of: ``train``; ``pretrained``, a folder or hub id."""

    train: TokenizerTraining | None = None
    pretrained: str | None = None


class Data(_Section):
    """Exactly one of ``source`` and ``files``; documents are whole files.

    Without ``validation_files``, about ``validation_fraction`` of the files are held out, chosen by their names.
    """

    source: Literal["python-stdlib"] | None = None
    files: Annotated[list[str], Field(min_length=1)] | None = None
    validation_files: Annotated[list[str], Field(min_length=1)] | None = None
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    block_size: Annotated[int, Field(ge=2)]


class Sample(_Section):
    """Text that the trained model writes at the end: ``max_new_tokens`` after ``prompt``."""

    prompt: Annotated[str, Field(min_length=1)]
    max_new_tokens: Annotated[int, Field(ge=1)] = 80
    temperature: Annotated[float, Field(gt=0)] = 0.8
    seed: int = 0


class Recipe(_Section):
    """One run.  ``run_dir`` defaults to ``runs/<name of the recipe file>``."""

    framework: Literal["hf"]
    task: Literal["pretrain"]
    model: Model
    tokenizer: Tokenizer
    data: Data
    training: dict[str, Any]
    sample: Sample | None = None
    run_dir: Annotated[str, Field(min_length=1)] | None = None


_ONE_OF = {
    "model": ("config", "pretrained"),
    "tokenizer": ("train", "pretrained"),
    "data": ("source", "files"),
}


def combination_problems(raw: dict[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """Keys that exclude or need each other, as (path, message); looks at unchecked values, so that all problems of
    a recipe can be reported at once."""
    found: list[tuple[tuple[str, ...], str]] = []
    given: dict[str, set[str]] = {}
    for section, options in _ONE_OF.items():
        value = raw.get(section)
        if not isinstance(value, dict):
            continue
        given[section] = {key for key in options if value.get(key) is not None}
        if len(given[section]) != 1:
            wanted = f"{options[0]!r} or {options[1]!r}"
            state = "both are" if given[section] else "neither is"
            found.append(((section,), f"give either {wanted}, {state} given"))
    if given.get("model") == {"pretrained"} and given.get("tokenizer") == {"train"}:
        found.append((("tokenizer", "train"), "a pretrained model needs its own tokenizer: give tokenizer.pretrained"))
    data = raw.get("data")
    if isinstance(data, dict) and data.get("validation_files") is not None:
        if "validation_fraction" in data:
            found.append((("data", "validation_fraction"), "has no effect beside validation_files: give one of them"))
        if data.get("source") is not None:
            found.append((("data", "validation_files"), "goes with files; python-stdlib holds out its own files"))
    return found
