"""Rules that no schema of types can hold: keys that exclude or need each other, Sophia's ranges, files that are there.

One row for each combination of an ``hf`` recipe; values of the wrong type are left to the schema.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import PathFinder
from typing import Any

from ...hf.arguments import parse_optim_args, refuse_foreign_arguments, without_effect
from ...ranges import out_of_range
from ...tasks import TASKS, Task
from ...text.files import matches
from ...text.formats import PARTS
from .problems import Found
from .yaml_text import Path


class _Said:
    """What an ``hf`` recipe says, by dotted keys; None for what it does not say."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def __call__(self, key: str) -> Any:
        value: Any = self.raw
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def task(self) -> Task | None:
        """The row of the task; None for an unknown one."""
        name = self("task")
        return TASKS.get(name) if isinstance(name, str) else None

    @property
    def format(self) -> str | None:
        """The format of the rows that the recipe asks for, else the task's own."""
        given = self("data.format")
        return given if isinstance(given, str) else self.task.formats[0] if self.task else None

    def not_one(self, section: str, *keys: str) -> bool:
        """Whether a section is there and does not give exactly one of `keys`."""
        return isinstance(self(section), dict) and sum(self(f"{section}.{key}") is not None for key in keys) != 1


def _joined(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _tasks(fits: Callable[[Task], bool]) -> str:
    return _joined(name for name, task in TASKS.items() if fits(task))


def _rows_of(task: Task) -> list[str]:
    return [name for name in task.formats if name != "text"]


def _new(said: _Said) -> bool:
    return said("model.config") is not None and said("model.pretrained") is None


def _old(said: _Said) -> bool:
    return said("model.pretrained") is not None and said("model.config") is None


def _held_out(said: _Said) -> bool:
    return any(said(key) is not None for key in ("data.validation_files", "data.hub.validation_split"))


def _streams(said: _Said) -> bool:
    return said("data.streaming") is True and said("data.source") is None


COMBINATIONS: tuple[tuple[str, Callable[[_Said], Any], str], ...] = (
    ("model", lambda s: s.not_one("model", "config", "pretrained"),
     "give either 'config' or 'pretrained'"),
    ("tokenizer", lambda s: s.not_one("tokenizer", "train", "pretrained"),
     "give either 'train' or 'pretrained'"),
    ("data", lambda s: s.not_one("data", "source", "files", "hub"),
     "give one of 'source', 'files' and 'hub'"),
    ("tokenizer", lambda s: _new(s) and s("tokenizer") is None,
     "this section is missing; only a pretrained model brings its own"),
    ("model.revision", lambda s: _new(s) and s("model.revision") is not None,
     "goes with model.pretrained; a model from model.config is new"),
    ("model.trust_remote_code", lambda s: _new(s) and s("model.trust_remote_code"),
     "goes with model.pretrained; a model from model.config is new"),
    ("model.peft", lambda s: _new(s) and s("model.peft") is not None,
     "adapters go on top of pretrained weights: give model.pretrained"),
    ("tokenizer.train", lambda s: _old(s) and s("tokenizer.train") is not None and s("tokenizer.pretrained") is None,
     "a pretrained model needs its own tokenizer: leave the section out, or give tokenizer.pretrained"),
    ("data.validation_fraction", lambda s: s("data.validation_fraction") is not None and _held_out(s),
     "has no effect beside validation_files or hub.validation_split: give one of them"),
    ("data.validation_files", lambda s: s("data.validation_files") is not None and s("data.source") is not None,
     "goes with files; python-stdlib holds out its own files"),
    ("data.validation_files", lambda s: s("data.validation_files") is not None and s("data.hub") is not None,
     "goes with files; for a data set give hub.validation_split"),
    ("data.format", lambda s: s.task and s.format in PARTS and s.format not in s.task.formats,
     "task {task} reads {formats}, not {format}"),
    ("data.source", lambda s: s.task and s("data.source") is not None and s.format in _rows_of(s.task),
     "python-stdlib is plain text, and the format here is {format}: give files or hub"),
    ("data.columns", lambda s: s("data.columns") is not None and s("data.source") is not None,
     "has no effect with source: plain text has no columns"),
    ("data.packing", lambda s: s.task and s("data.packing") is True and not s.task.packs,
     f"goes with task {_tasks(lambda task: task.packs)}; in {{task}} a row is one document"),
    ("data.mask_probability", lambda s: s.task and s("data.mask_probability") is not None and not s.task.masks,
     f"goes with task {_tasks(lambda task: task.masks)}; {{task}} hides no tokens"),
    ("sample", lambda s: s.task and s("sample") is not None and not s.task.generates,
     f"goes with task {_tasks(lambda task: task.generates)}; a model of task {{task}} writes no text"),
    ("data.streaming", lambda s: s("data.streaming") is True and s("data.source") is not None,
     "goes with files or hub; python-stdlib is read as a whole"),
    ("data.streaming", lambda s: _streams(s) and s("task") == "classify",
     "a classification needs all its labels before training: leave streaming out"),
    ("tokenizer.train", lambda s: _streams(s) and s("tokenizer.train") is not None,
     "reads all training text first; with data.streaming give tokenizer.pretrained"),
    ("training.max_steps", lambda s: _streams(s) and not isinstance(s("training.max_steps"), int),
     "a stream (data.streaming) has no length: give the number of steps"),
    ("data.validation_files", lambda s: _streams(s) and not _held_out(s),
     "a stream (data.streaming) cannot be split: give these, or data.hub.validation_split"),
)  # fmt: skip
"""The key that a rule speaks of, when it is broken, and the sentence."""


def broken_rules(raw: dict[str, Any], framework: str) -> Iterator[Found]:
    """Every broken rule: where, and a sentence."""
    if framework == "lightning":
        for path, spec in specs(raw):
            yield from _class(path, spec)
    else:
        said = _Said(raw)
        for key, broken, sentence in COMBINATIONS:
            if broken(said):
                formats = _joined(said.task.formats) if said.task else ""
                yield tuple(key.split(".")), sentence.format(task=said("task"), format=said.format, formats=formats)
        yield from _columns(said)
        yield from _optimizer(said)
        yield from _files(said)


def _columns(said: _Said) -> Iterator[Found]:
    columns, task = said("data.columns"), said.task
    if not isinstance(columns, dict) or task is None or said("data.source") is not None:
        return
    formats = (said.format,) if said("data.format") is not None and said.format in task.formats else task.formats
    roles = list(dict.fromkeys(role for name in formats for role in PARTS[name]))
    for role in columns:
        if role not in roles and any(role in parts for parts in PARTS.values()):
            message = f"has no part in {_joined(formats)}; columns there: {', '.join(roles)}"
            yield ("data", "columns", role), message


def _optimizer(said: _Said) -> Iterator[Found]:
    optim, given, training = said("training.optim"), said("training.optim_args"), said("training")
    here = ("training", "optim_args")
    if isinstance(optim, str) and optim.startswith("sophia"):
        for name, message in without_effect(optim, training).items():
            yield ("training", name), message
        if isinstance(given, str):
            try:
                refuse_foreign_arguments(optim, parse_optim_args(given))
            except ValueError as error:
                yield here, str(error).removeprefix("optim_args: ")
    elif isinstance(given, str):
        for part in given.replace(" ", "").split(","):
            if part.count("=") != 1:
                yield here, f"expected name=value,name=value, found {part!r} in it"


def _files(said: _Said) -> Iterator[Found]:
    for key in ("files", "validation_files"):
        patterns = said(f"data.{key}")
        for index, pattern in enumerate(patterns if isinstance(patterns, list) else []):
            if isinstance(pattern, str) and pattern and not matches(pattern):
                yield ("data", key, index), f"no file matches {pattern!r} (looked from the current folder)"


def specs(value: Any, here: Path = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every class that a LightningCLI config asks for, at any depth: where, and what it says of it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        yield here, value
    for key, inner in inside:
        yield from specs(inner, (*here, key))


def _class(here: Path, spec: dict[str, Any]) -> Iterator[Found]:
    package, dot, _ = spec["class_path"].partition(".")
    if dot and not _is_installed(package):
        yield (*here, "class_path"), f"no package {package!r} is installed here"
    given = spec.get("init_args")
    if package == __package__.partition(".")[0] and isinstance(given, dict):
        for name, value in given.items():
            problem = out_of_range(name, value)
            if problem:
                yield (*here, "init_args", name), problem


def _is_installed(package: str) -> bool:
    """Whether a package is installed, or lies in the current folder; nothing is imported to see."""
    try:
        return bool(importlib.util.find_spec(package) or PathFinder.find_spec(package, [os.getcwd()]))
    except (ImportError, ValueError):
        return False
