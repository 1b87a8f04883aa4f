"""The other dialect: a LightningCLI config, recognised and checked as far as the installed packages' text goes.

Nothing that a config names is imported here: names of arguments and plain types come from the text of its classes.
What that does not settle is left to ``lightning_types.py``.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ...ranges import out_of_range
from . import signatures, sources
from .checks import check_config, check_peft
from .values import fits, type_problem
from .wording import did_you_mean, found, near
from .yaml_places import Path, parse

if TYPE_CHECKING:
    from .draft import Draft

_FIRST = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler")
_ONLY_LIGHTNING = ("trainer", "seed_everything", "lr_scheduler", "ckpt_path")
_SPEC = {"class_path", "init_args", "dict_kwargs"}
_CAUSAL_LM = "sophia_integrations.lightning.causal_lm.CausalLM"
_GIVEN_LATER = ("optimizer", "lr_scheduler")  # their classes get parameters or an optimizer when training begins


def is_lightning(raw: dict[str, Any]) -> bool:
    """Whether a recipe is meant as a LightningCLI config: it says so, or it has the keys and shapes of one."""
    if raw.get("framework") in ("hf", "lightning"):
        return raw["framework"] == "lightning"
    if any(key in raw for key in _ONLY_LIGHTNING):
        return True
    sections = [raw.get("model"), raw.get("data")]
    return any(isinstance(section, dict) and _SPEC & section.keys() for section in sections)


def check_lightning_words(raw: dict[str, Any], draft: Draft) -> None:
    """Adds to `draft` every problem of the config that can be seen without importing anything."""
    if raw.get("framework") not in (None, "lightning"):
        draft.add(("framework",), f"expected 'hf' or 'lightning', found {found(raw['framework'])}")
    known = top_level_keys()
    for key in raw:
        if key != "framework" and key not in known:
            draft.add((key,), _unknown_at_top(key, known), key=True)
    if raw.get("model") is None:
        draft.add((), "the key 'model' is missing: class_path and init_args of a LightningModule")
    seed = raw.get("seed_everything")
    if seed is not None and type_problem(seed, int | bool):
        draft.add(("seed_everything",), f"expected a whole number or true or false, found {found(seed)}")
    if isinstance(raw.get("trainer"), dict):
        _check_arguments(raw["trainer"], ("trainer",), trainer_parameters(), True, draft)
    elif raw.get("trainer") is not None:
        draft.add(("trainer",), f"expected a mapping of keys, found {found(raw['trainer'])}")
    for key in ("model", "data", "optimizer", "lr_scheduler"):
        value = raw.get(key)
        if isinstance(value, dict):
            _check_spec(value, (key,), draft)
        elif value is not None and not isinstance(value, str):
            draft.add((key,), f"expected a mapping with class_path and init_args, found {found(value)}")


@functools.lru_cache(maxsize=1)
def trainer_parameters() -> dict[str, signatures.Parameter]:
    """The parameters of Lightning's Trainer; empty when its text does not say."""
    source = sources.find("lightning.pytorch.trainer.trainer.Trainer")
    return signatures.parameters(source)[0] if source is not None else {}


@functools.lru_cache(maxsize=1)
def top_level_keys() -> tuple[str, ...]:
    """What a config for ``fit`` may say: the parts, and what ``Trainer.fit`` takes besides them."""
    source = sources.find("lightning.pytorch.trainer.trainer.Trainer")
    fit = signatures.method_parameters(source, "fit") if source is not None else {"ckpt_path": None}
    given = ("model", "train_dataloaders", "val_dataloaders", "datamodule")
    return (*_FIRST, *(name for name in fit if name not in given))


def _unknown_at_top(key: str, known: tuple[str, ...]) -> str:
    if key in trainer_parameters():
        return "unknown key here, it belongs under 'trainer'"
    if key in _SPEC:
        return "unknown key here, it belongs under 'model' or 'data'"
    return f"unknown key{did_you_mean(key, known)}"


def _check_spec(spec: dict[str, Any], here: Path, draft: Draft) -> None:
    """One ``class_path`` with its ``init_args``, and those inside it."""
    class_path, arguments = spec.get("class_path"), spec.get("init_args")
    source = sources.find(class_path) if isinstance(class_path, str) and class_path else None
    known, more = signatures.parameters(source) if source is not None else ({}, True)
    if class_path is None:
        if not near("class_path", [key for key in spec if key not in _SPEC], 0.8):
            draft.add(here, "the key 'class_path' is missing: the dotted path of a class", key=True)
    elif not isinstance(class_path, str) or not class_path:
        draft.add((*here, "class_path"), f"expected the dotted path of a class, found {found(class_path)}")
    elif source is None:
        message = _missing(class_path)
        if message:
            draft.add((*here, "class_path"), message)
    for key in spec:
        if key not in _SPEC:
            belongs = ", it belongs under 'init_args'" if key in known else did_you_mean(key, _SPEC)
            draft.add((*here, key), f"unknown key{' here' if key in known else ''}{belongs}", key=True)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return draft.add((*here, "init_args"), f"expected a mapping of keys, found {found(arguments)}")
    _check_arguments(arguments, (*here, "init_args"), known, not more, draft)
    if not more and not any(part in _GIVEN_LATER for part in here):
        for name, parameter in known.items():
            if parameter.required and name not in arguments and "dict_kwargs" not in spec:
                draft.add(here, f"the argument {name!r} of {class_path} is missing under init_args", key=True)
    if source is not None and source.path.startswith("sophia_integrations."):
        for name, value in arguments.items():
            problem = out_of_range(name, value) if not draft.has_problem((*here, "init_args", name)) else None
            if problem:
                draft.add((*here, "init_args", name), problem)
    if source is not None and source.path == _CAUSAL_LM:
        if isinstance(arguments.get("config"), dict):
            check_config(arguments["config"], (*here, "init_args", "config"), "pretrain", draft)
        if isinstance(arguments.get("peft"), dict):
            check_peft(arguments["peft"], (*here, "init_args", "peft"), draft)
    return None


def _check_arguments(
    given: dict[str, Any], here: Path, known: dict[str, signatures.Parameter], closed: bool, draft: Draft
) -> None:
    for name, value in given.items():
        path = (*here, name)
        if name in known:
            message = None if _accepted(value, known[name].annotation) else type_problem(value, known[name].annotation)
            if message:
                draft.add(path, message)
        elif known and closed:
            draft.add(path, f"unknown key{did_you_mean(name, known)}", key=True)
        for place, spec in specs_in(value, path):
            _check_spec(spec, place, draft)


def specs_in(value: Any, here: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The classes that a value asks for: itself, or entries of a list."""
    if isinstance(value, dict):
        return [(here, value)] if _is_spec(value) else []
    entries = value if isinstance(value, list) else []
    return [((*here, index), entry) for index, entry in enumerate(entries) if _is_spec(entry)]


def _is_spec(entry: Any) -> bool:
    """A mapping with the keys of a class to make, or with a misspelt one."""
    return isinstance(entry, dict) and any(key in _SPEC or near(key, _SPEC, 0.8) for key in entry)


def _accepted(value: Any, annotation: Any) -> bool:
    """What jsonargparse takes besides values of the type: null, and text that reads as such a value."""
    if value is None or fits(value, annotation):
        return True
    if not isinstance(value, str):
        return False
    read = parse(value, lambda line, column: "")
    return not read.problems and not isinstance(read.value, str) and fits(read.value, annotation)


def _missing(class_path: str) -> str | None:
    """The sentence about a path whose module is there and does not have the name; None when that is not certain."""
    where, _, name = class_path.rpartition(".")
    home = sources.module(where) if where else None
    if home is None:
        return _missing_module(where) if where else None
    names = sources.names(home)
    if names is None or name in names:
        return None
    return f"{where} has no {name!r}{did_you_mean(name, names)}"


def _missing_module(where: str) -> str | None:
    import importlib.util

    head = where.partition(".")[0]
    try:
        present = importlib.util.find_spec(head) is not None
    except (ImportError, ValueError):
        present = False
    return None if present else f"no package {head!r} is installed here"
