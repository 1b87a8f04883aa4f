"""Keys of an ``hf`` recipe that exclude or need each other: one small rule each, over values not yet checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ...text.formats import PARTS
from .yaml_places import Path

Problem = tuple[Path, str]

_ONE_OF = {
    "model": ("config", "pretrained"),
    "tokenizer": ("train", "pretrained"),
    "data": ("source", "files", "hub"),
}
FORMATS = {
    "pretrain": ("text",),
    "masked-lm": ("text",),
    "finetune": ("text", "prompt-completion", "chat"),
    "seq2seq": ("prompt-completion",),
    "classify": ("classification",),
}
_PACKED = ("pretrain", "finetune", "masked-lm")
_GENERATE = ("pretrain", "finetune", "seq2seq")


def combination_problems(raw: dict[str, Any]) -> list[Problem]:
    """Every broken rule as (path, message); values of the wrong type are left to the schema."""
    return [problem for rule in _RULES for problem in rule(raw)]


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def _task(raw: dict[str, Any]) -> str | None:
    task = raw.get("task")
    return task if isinstance(task, str) and task in FORMATS else None


def _words(words: tuple[str, ...], last: str) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _exactly_one(raw: dict[str, Any]) -> Iterator[Problem]:
    for name, options in _ONE_OF.items():
        if not isinstance(raw.get(name), dict):
            continue
        given = tuple(repr(key) for key in options if raw[name].get(key) is not None)
        if len(given) == 1:
            continue
        if len(options) == 2:
            yield (
                (name,),
                f"give either {options[0]!r} or {options[1]!r}, {'both are' if given else 'neither is'} given",
            )
        else:
            wanted = _words(tuple(map(repr, options)), "and")
            yield (name,), f"give one of {wanted}; {_words(given, 'and') + ' are' if given else 'none is'} given"


def _model_and_tokenizer(raw: dict[str, Any]) -> Iterator[Problem]:
    model, tokenizer = _section(raw, "model"), _section(raw, "tokenizer")
    pretrained = model.get("pretrained") is not None
    if model.get("config") is not None and not pretrained:
        if raw.get("tokenizer") is None:
            yield (), "the key 'tokenizer' is missing; only a pretrained model brings its own"
        for key in ("revision", "trust_remote_code"):
            if model.get(key) not in (None, False):
                yield ("model", key), "goes with model.pretrained; a model from model.config is new"
        if model.get("peft") is not None:
            yield ("model", "peft"), "adapters go on top of pretrained weights: give model.pretrained"
    if pretrained and model.get("config") is None and tokenizer.get("train") is not None:
        if tokenizer.get("pretrained") is None:
            yield (
                ("tokenizer", "train"),
                "a pretrained model needs its own tokenizer: leave the section out, or give tokenizer.pretrained",
            )


def _held_out(raw: dict[str, Any]) -> Iterator[Problem]:
    data = _section(raw, "data")
    hub = _section(data, "hub")
    named = data.get("validation_files") is not None or hub.get("validation_split") is not None
    if named and "validation_fraction" in data:
        other = "validation_files" if data.get("validation_files") is not None else "hub.validation_split"
        yield ("data", "validation_fraction"), f"has no effect beside {other}: give one of them"
    if data.get("validation_files") is not None:
        if data.get("source") is not None:
            yield ("data", "validation_files"), "goes with files; python-stdlib holds out its own files"
        elif hub:
            yield ("data", "validation_files"), "goes with files; for a data set give hub.validation_split"


def _format(raw: dict[str, Any]) -> Iterator[Problem]:
    task, data = _task(raw), _section(raw, "data")
    if task is None:
        return
    form = data.get("format")
    formats = FORMATS[task]
    if form in PARTS and form not in formats:
        yield ("data", "format"), f"task {task} reads {_words(formats, 'or')}, not {form}"
    elif data.get("source") is not None and (form or formats[0]) != "text":
        yield (
            ("data", "source"),
            f"python-stdlib is plain text, and the format here is {form or formats[0]}: give files or hub",
        )
    columns = data.get("columns")
    if not isinstance(columns, dict):
        return
    if data.get("source") is not None:
        yield ("data", "columns"), "has no effect with source: plain text has no columns"
        return
    readable = (form,) if form in formats else formats
    roles = tuple(dict.fromkeys(role for one in readable for role in PARTS[one]))
    every = {role for one in PARTS.values() for role in one}
    for role in columns:
        if role in every and role not in roles:
            yield (
                ("data", "columns", role),
                f"has no part in {_words(readable, 'or')}; columns there: {', '.join(roles)}",
            )


def _only_for_some_tasks(raw: dict[str, Any]) -> Iterator[Problem]:
    task, data = _task(raw), _section(raw, "data")
    if task is None:
        return
    if data.get("packing") is True and task not in _PACKED:
        yield ("data", "packing"), f"goes with task {_words(_PACKED, 'or')}; in {task} a row is one document"
    if "mask_probability" in data and task != "masked-lm":
        yield ("data", "mask_probability"), f"goes with task masked-lm; {task} hides no tokens"
    if raw.get("sample") is not None and task not in _GENERATE:
        yield ("sample",), f"goes with task {_words(_GENERATE, 'or')}; a model of task {task} writes no text"


def _streaming(raw: dict[str, Any]) -> Iterator[Problem]:
    data, training = _section(raw, "data"), _section(raw, "training")
    if data.get("streaming") is not True:
        return
    if data.get("source") is not None:
        yield ("data", "streaming"), "goes with files or hub; python-stdlib is read as a whole"
        return
    if _task(raw) == "classify":
        yield ("data", "streaming"), "a classification needs all its labels before training: leave streaming out"
    if _section(raw, "tokenizer").get("train") is not None:
        yield ("tokenizer", "train"), "reads all training text first; with data.streaming give tokenizer.pretrained"
    steps = training.get("max_steps")
    if not isinstance(steps, int) or steps < 1:
        yield ("data", "streaming"), "a stream has no length: give training.max_steps"
    if data.get("validation_files") is None and _section(data, "hub").get("validation_split") is None:
        wanted = "data.hub.validation_split" if data.get("hub") is not None else "data.validation_files"
        yield ("data", "streaming"), f"a stream cannot be split: give {wanted}"


_RULES: tuple[Callable[[dict[str, Any]], Iterator[Problem]], ...] = (
    _exactly_one, _model_and_tokenizer, _held_out, _format, _only_for_some_tasks, _streaming,
)  # fmt: skip
