"""What only the frameworks' own constructors can judge of a recipe: they are called, and build next to nothing.

Importing this module is cheap, calling it imports the frameworks and the classes that a LightningCLI config names;
nothing is downloaded or written.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import needs, one_line
from ...tasks import TASKS
from .rules import specs
from .yaml_places import Path

if TYPE_CHECKING:
    from .draft import Draft

_PARTS = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler")


def construct(raw: dict[str, Any], draft: Draft) -> None:
    """Adds to `draft` what the constructors refuse, section by section where the section has no problem so far."""
    training, model = raw.get("training"), raw.get("model")
    if isinstance(training, dict) and not draft.has_problem(("training",)):
        from transformers import TrainingArguments

        _tried(lambda: TrainingArguments(output_dir="unused", **training), training, ("training",), draft)
    if isinstance(model, dict):
        if isinstance(model.get("config"), dict) and not draft.has_problem(("model", "config")):
            _construct_config(raw, draft)
        if isinstance(model.get("peft"), dict) and not draft.has_problem(("model", "peft")):
            _construct_peft(model["peft"], draft)


def _tried(make: Callable[[], Any], given: dict[str, Any], here: Path, draft: Draft) -> Any:
    """What `make` makes, or None after noting its error at the key that it names, else at the section."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()
    except Exception as error:  # constructors raise of every kind, ImportError for a missing package among them
        message = one_line(error)
        named = [name for name in given if name in message]
        return draft.add((*here, max(named, key=len)) if named else here, message)


def _construct_config(raw: dict[str, Any], draft: Draft) -> None:
    """Makes the model without memory for its weights: sizes that do not fit each other are refused here."""
    import torch
    import transformers

    given, here = raw["model"]["config"], ("model", "config")
    options = {name: value for name, value in given.items() if name != "model_type"}
    config = _tried(lambda: transformers.CONFIG_MAPPING[given["model_type"]](**options), options, here, draft)
    if config is None:
        return
    context, data = getattr(config, "max_position_embeddings", None), raw.get("data")
    block_size = data.get("block_size") if isinstance(data, dict) else None
    if isinstance(context, int) and isinstance(block_size, int) and block_size > context > 0:
        draft.add(("data", "block_size"), f"{block_size} is longer than the model's context of {context} tokens")
    task = TASKS.get(raw["task"]) if isinstance(raw.get("task"), str) else None
    if task is not None:
        with torch.device("meta"):
            _tried(lambda: getattr(transformers, task.auto_class).from_config(config), {}, here, draft)


def _construct_peft(peft: dict[str, Any], draft: Draft) -> None:
    here = ("model", "peft")
    if importlib.util.find_spec("peft") is None:
        return draft.add(here, needs("peft"))
    from peft import LoraConfig

    options = {name: value for name, value in peft.items() if name != "peft_type"}
    _tried(lambda: LoraConfig(**options), options, here, draft)
    return None


def construct_lightning(raw: dict[str, Any], draft: Draft) -> None:
    """Adds to `draft` what LightningCLI refuses: of each class that the schema does not know, then of the whole."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a class of the user's own lies beside the recipe, as under `python -m`
    for here, spec in list(specs(raw)):
        if not draft.has_problem((*here, "class_path")):
            _check_class(spec, here, draft)
    if not draft.problems:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _parse_whole(raw, draft)


def _check_class(spec: dict[str, Any], here: Path, draft: Draft) -> None:
    from .documents import class_arguments, imported
    from .known import document
    from .problems import problems

    class_path = spec["class_path"]
    if "." not in class_path or class_path in document("lightning")["$defs"]:
        return  # a short name is known to the whole parser only
    try:
        schema = class_arguments(imported(class_path))
    except Exception as error:  # whatever the module does when imported
        return draft.add((*here, "class_path"), f"{class_path} cannot be used: {one_line(error)}")
    for where, message in problems(schema, spec.get("init_args") or {}):
        draft.add((*here, "init_args", *where), message)
    return None


def _parse_whole(raw: dict[str, Any], draft: Draft) -> None:
    """The config through the parser of ``sophia_integrations.lightning``, which has the last word."""
    from ...lightning.cli import SophiaCLI

    class ParserOnly(SophiaCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise _Built(parser)

    try:
        ParserOnly(run=False, args={}, parser_kwargs={"exit_on_error": False})
    except _Built as built:
        parser = built.args[0]
    # It builds its objects into what it is given.
    config = copy.deepcopy({key: value for key, value in raw.items() if key in _PARTS})
    try:
        parser.parse_object(config)
    except Exception as error:
        key = re.search(r'Parser key "([\w.]+)"', str(error))
        draft.add(tuple(key[1].split(".")) if key else (), _telling(error))


class _Built(Exception):
    """Carries a LightningCLI's parser out of its constructor."""


def _telling(error: Exception) -> str:
    """The first line of a refusal by jsonargparse that says something, without the parser's own key."""
    frame = ("Parser key", "Does not validate", "Subtypes:", "Errors:", "Given value", "Problem with given class_path")
    lines = [line.strip(" -") for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.startswith(frame)), one_line(error))
