"""What is read from the text of installed packages is what importing them would tell."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

import pytest

from sophia_integrations.recipes.reading import signatures, sources, words
from sophia_integrations.recipes.reading.wording import choices, options


def kinds(annotation: Any) -> set[str]:
    """The plain kinds in a type, by name; enumerations by the words that they hold."""
    found = set(choices(annotation))
    for option in options(annotation):
        origin = typing.get_origin(option) or option
        if origin in (int, float, bool, str, dict, list, type(None)):
            found.add(origin.__name__)
    return found


def test_training_arguments_and_their_types() -> None:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    real = {item.name for item in dataclasses.fields(TrainingArguments) if item.init}
    read = words.training_words()
    assert read.keys() == real
    for name, annotation in read.items():
        assert kinds(annotation) | set(words.choices(name)) == kinds(hints[name]), name


def test_adapter_arguments() -> None:
    from peft import LoraConfig

    read = words.lora_words()
    assert read is not None
    assert read.keys() == {item.name for item in dataclasses.fields(LoraConfig) if item.init}
    assert kinds(read["r"]) == {"int"} and "lora_only" in kinds(read["bias"])


@pytest.mark.parametrize("task", words.TASKS)
def test_model_types_of_a_task(task: str) -> None:
    from transformers.models.auto import modeling_auto

    real = getattr(modeling_auto, f"MODEL_FOR_{words.TASKS[task][0]}_MAPPING_NAMES")
    assert words.model_types(task) == real.keys()


@pytest.mark.parametrize(
    "kind",
    ["gpt2", "llama", "bert", "t5", "qwen2", "mixtral", "distilbert", "bart", "gpt-sw3", "roberta", "xlm-roberta"],
)  # fmt: skip
def test_keys_of_a_config(kind: str) -> None:
    from transformers import CONFIG_MAPPING

    read, real = words.config_words(kind), CONFIG_MAPPING[kind]
    if read is None:
        assert kind == "gpt-sw3"  # its class lies in another model's folder: the import judges it
    elif dataclasses.is_dataclass(real):
        assert read.keys() == {item.name for item in dataclasses.fields(real) if item.init} | real.attribute_map.keys()
    else:
        assert read.keys() >= inspect.signature(real).parameters.keys() - {"kwargs"}


@pytest.mark.parametrize(
    "dotted",
    [
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.loggers.CSVLogger",
        "sophia_integrations.SophiaG",
        "sophia_integrations.lightning.CausalLM",
        "sophia_integrations.lightning.TextDataModule",
        "torch.optim.AdamW",
    ],
)
def test_arguments_of_a_class(dotted: str) -> None:
    import importlib

    where, _, name = dotted.rpartition(".")
    real = inspect.signature(getattr(importlib.import_module(where), name)).parameters
    source = sources.find(dotted)
    assert source is not None
    read, more = signatures.parameters(source)
    assert more == (name == "Trainer")  # its constructor is decorated; what a decorator does is not looked at
    assert list(read) == list(real)
    assert {key for key, item in read.items() if item.required} == {
        key for key, item in real.items() if item.default is inspect.Parameter.empty
    }


@pytest.mark.parametrize(
    "dotted", ["nowhere.Class", "sys.maxsize", "torch._C.Tensor", "os.path", "", ".", "a.b", "math.x", "1.2", "\0.x"]
)
def test_what_has_no_text_is_not_found(dotted: str) -> None:
    assert sources.find(dotted) is None


def test_a_text_that_looks_like_a_function_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "oddly_quoted.py").write_text(
        'class Odd:\n    """As in\n\n    def f(\n        x)"""\n\n    def __init__(self, size): pass\n'
    )
    source = sources.find("oddly_quoted.Odd")
    assert source is not None and list(signatures.parameters(source)[0]) == ["size"]


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("def __init__(self, a: int, **rest): pass", True),
        ("def __init__(self, *, a: 'int | None' = None): pass", False),
        ("@decorated\n    def __init__(self, a: Literal[X]): pass", True),
        ("def __init__(self, **rest): self.a = rest.pop('a', 1)", True),
    ],
)
def test_constructors(text: str, more: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "constructors_here.py").write_text(f"class One:\n    {text}\n")
    source = sources.find("constructors_here.One")
    assert source is not None
    names, open_ended = signatures.parameters(source)
    assert list(names) == ["a"] and open_ended == more


def test_modules_that_import_each_other_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for one, other in (("ring_a", "ring_b"), ("ring_b", "ring_c"), ("ring_c", "ring_a")):
        (tmp_path / f"{one}.py").write_text(f"from {other} import *\nfrom {other} import Missing\n")
    assert sources.find("ring_a.Missing") is None
