"""A LightningCLI config against LightningCLI's own types: first every argument alone, so that all problems show.

Imports Lightning and the classes that the config names, as LightningCLI itself does; builds none of them.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import re
import sys
import textwrap
import typing
import warnings
from typing import TYPE_CHECKING, Any

from .lightning import specs_in
from .wording import choices, describe, did_you_mean, found, options, plain
from .yaml_places import Path

if TYPE_CHECKING:
    from .draft import Draft

_FRAME = ("Parser key", "Does not validate", "Subtypes:", "Errors:", "Given value", "Problem with given class_path")
_PARTS = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler")


def check_lightning_types(raw: dict[str, Any], draft: Draft) -> None:
    """Adds to `draft` what jsonargparse and Lightning refuse, place by place where no problem is known yet."""
    from lightning.pytorch import Trainer

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a class of the user's own lies beside the recipe, as under `python -m`
    from ... import lightning  # noqa: F401  so that its short names are known

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(raw.get("trainer"), dict):
            _check_arguments(Trainer, raw["trainer"], ("trainer",), draft)
        for key in ("model", "data", "optimizer", "lr_scheduler"):
            if isinstance(raw.get(key), dict):
                _check_spec(raw[key], (key,), draft)
        if not draft.problems:
            _check_together(raw, draft)


def _check_spec(spec: dict[str, Any], here: Path, draft: Draft) -> None:
    class_path, arguments = spec.get("class_path"), spec.get("init_args") or {}
    if not isinstance(class_path, str) or "." not in class_path or not isinstance(arguments, dict):
        return  # a short name is known to the whole parser only
    chosen = _imported(class_path, (*here, "class_path"), draft)
    if chosen is not None:
        _check_arguments(chosen, arguments, (*here, "init_args"), draft)


def _imported(class_path: str, place: Path, draft: Draft) -> Any:
    """The class, or None after noting why there is none."""
    where, _, name = class_path.rpartition(".")
    try:
        home = importlib.import_module(where)
    except Exception as error:  # whatever the module does when imported
        reason = " ".join(str(error).split()) or type(error).__name__
        return _note(place, f"{where} cannot be imported: {reason}", draft)
    chosen = getattr(home, name, None)
    if chosen is None:
        return _note(place, f"{where} has no {name!r}{did_you_mean(name, dir(home))}", draft)
    if not callable(chosen):
        return _note(place, f"{class_path} is no class", draft)
    return chosen


def _note(place: Path, message: str, draft: Draft) -> None:
    if not draft.has_problem(place):
        draft.add(place, message)


def _check_arguments(chosen: Any, given: dict[str, Any], here: Path, draft: Draft) -> None:
    names = _names(chosen)
    if names is None:
        return
    hints = _hints(chosen)
    for name, value in given.items():
        path = (*here, name)
        for place, spec in specs_in(value, path):
            _check_spec(spec, place, draft)
        if draft.has_problem(path):
            continue
        if name not in names:
            draft.add(path, f"unknown key{did_you_mean(name, names)}", key=True)
            continue
        reason = _refused(chosen, name, names, value)
        if reason is not None:
            _add_refusal(path, value, hints.get(name), reason, draft)


def _add_refusal(path: Path, value: Any, hint: Any, reason: str, draft: Draft) -> None:
    specs = specs_in(value, path)
    short = [(place, spec["class_path"]) for place, spec in specs if "." not in str(spec.get("class_path", "."))]
    if short:
        place, name = short[0]
        draft.add((*place, "class_path"), f"no class is known here by the short name {name!r}; give its dotted path")
    elif hint is None or specs:
        draft.add(path, reason)
    elif isinstance(value, str) and choices(hint) and str not in options(hint):
        draft.add(path, f"{value!r} is not known{did_you_mean(value, choices(hint))}")
    else:
        shown = found(value) if not isinstance(value, (dict, list)) else textwrap.shorten(str(value), 60)
        draft.add(path, f"expected {describe(hint)}, found {shown}")


def _names(chosen: Any) -> list[str] | None:
    """What jsonargparse would accept as arguments of `chosen`; None where it can tell of none."""
    from jsonargparse import ArgumentParser

    try:
        return list(ArgumentParser(exit_on_error=False).add_class_arguments(chosen, fail_untyped=False))
    except Exception:  # a function, or a class whose signature cannot be read
        return None


def _hints(chosen: Any) -> dict[str, Any]:
    """The types that can be described in a word or two; a union with a class in it is left to jsonargparse's words."""
    try:
        hints = typing.get_type_hints(chosen.__init__)
        return {name: hints[name] for name in inspect.signature(chosen).parameters if name in hints}
    except Exception:  # a name in an annotation that exists for type checkers only
        return {}


def _refused(chosen: Any, name: str, names: list[str], value: Any) -> str | None:
    """jsonargparse's own reason against one argument, None when it accepts it."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(chosen, fail_untyped=False, skip=set(names) - {name})
    try:
        parser.parse_object({name: copy.deepcopy(value)})  # it builds its own objects into what it is given
    except Exception as error:  # argparse.ArgumentError, and what conversions raise
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    """The first line that says something, without the parser's own key and the repeated value."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(_FRAME)]
    first = (telling or lines or [type(error).__name__])[0]
    return re.sub(r"Expected a <class '(\w+)'>\. Got value:", _expected, first)


def _expected(match: re.Match[str]) -> str:
    return f"expected {plain(match[1])}, found"


def _check_together(raw: dict[str, Any], draft: Draft) -> None:
    """The whole config through the parser of ``sophia_integrations.lightning``, which has the last word."""
    from ...lightning.cli import SophiaCLI

    class Built(Exception):
        pass

    class ParserOnly(SophiaCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise Built(parser)

    parser: Any = None
    try:
        ParserOnly(run=False, args={}, parser_kwargs={"exit_on_error": False})
    except Built as built:
        parser = built.args[0]
    assert parser is not None
    config = copy.deepcopy({key: value for key, value in raw.items() if key in _PARTS})
    try:
        parser.parse_object(config)
    except Exception as error:
        named = [key for key in config if f'"{key}' in str(error)]
        draft.add((named[0],) if named else (), _reason(error), key=True)
