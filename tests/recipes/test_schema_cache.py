"""The JSON Schema of recipes is that of the installed packages, made once and kept."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sophia_integrations.recipes.reading import json_schema, schema_cache
from sophia_integrations.recipes.reading.loader import read
from sophia_integrations.tasks import TASKS

RECIPES = Path(__file__).parents[2] / "recipes"


def test_training_arguments_are_those_of_transformers() -> None:
    from transformers import TrainingArguments

    training = schema_cache.document("hf")["properties"]["training"]["properties"]
    assert training.keys() == {item.name for item in dataclasses.fields(TrainingArguments) if item.init} | (
        json_schema.NOT_HERE.keys()
    )
    assert training["learning_rate"]["type"] == "number" and training["max_steps"]["type"] == "integer"
    assert {"sophia", "adamw_torch"} <= set(training["optim"]["enum"])
    assert "description" in training["learning_rate"]


def test_adapter_arguments_are_those_of_peft() -> None:
    from peft import LoraConfig

    adapters = schema_cache.document("hf")["$defs"]["peft"]["properties"]
    assert adapters.keys() == {item.name for item in dataclasses.fields(LoraConfig) if item.init}
    assert "lora_only" in adapters["bias"]["enum"]


@pytest.mark.parametrize("task", TASKS)
def test_the_table_of_tasks_names_models_and_classes_of_transformers(task: str) -> None:
    import transformers

    row = TASKS[task]
    mapping = getattr(transformers, f"MODEL_FOR_{row.mapping}_MAPPING")
    assert getattr(transformers, row.auto_class)._model_mapping is mapping


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5", "qwen2", "mixtral", "distilbert", "bart", "gpt-sw3"])
def test_keys_of_a_config_are_those_of_its_class(kind: str) -> None:
    from transformers import CONFIG_MAPPING

    real, keys = CONFIG_MAPPING[kind], schema_cache.document("hf", kind)["$defs"]["config"]
    assert keys["properties"].keys() >= inspect.signature(real).parameters.keys() - {"kwargs"}
    assert keys["properties"].keys() >= {*real.attribute_map, "model_type", "id2label"}
    assert keys["additionalProperties"] is False


def test_a_config_of_an_unknown_kind_may_have_any_key() -> None:
    assert "additionalProperties" not in schema_cache.document("hf", "no-such-model")["$defs"]["config"]


@pytest.mark.parametrize(
    "path",
    [
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.loggers.CSVLogger",
        "sophia_integrations.lightning.CausalLM",
        "sophia_integrations.lightning.TextDataModule",
    ],
)
def test_arguments_of_a_class_are_those_of_its_constructor(path: str) -> None:
    real = inspect.signature(json_schema.imported(path)).parameters
    schema = schema_cache.document("lightning")["$defs"][path]
    assert list(schema["properties"]) == list(real)
    required = {name for name, item in real.items() if item.default is inspect.Parameter.empty}
    assert set(schema["required"]) == required


@pytest.mark.parametrize("path", ["sophia_integrations.SophiaG", "sophia_integrations.SophiaH", "torch.optim.AdamW"])
def test_an_optimizer_gets_its_parameters_later(path: str) -> None:
    schema = schema_cache.document("lightning")["$defs"][path]
    assert {"lr", "weight_decay", "eps"} <= schema["properties"].keys() and "params" not in schema["properties"]
    assert schema["required"] == []


class Odd:
    def __init__(self, a: int, b: int | str | None = None, *rest: int, c: dict[str, float] | None = None) -> None: ...


def test_types_become_schemas() -> None:
    assert json_schema.class_arguments(Odd) == {
        "type": ["object", "null"],
        "properties": {
            "a": {"type": "integer"},
            "b": {"anyOf": [{"type": "integer"}, {"type": "null"}, {"type": "string"}]},
            "c": {"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]},
        },
        "required": ["a"],
        "additionalProperties": False,
    }


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The documents made from now on, in an empty cache."""
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "cache"))
    names: list[str] = []
    make = json_schema.make
    monkeypatch.setattr(json_schema, "make", lambda framework: names.append(framework) or make(framework))
    return names


def test_a_document_is_made_once_for_the_installed_versions(made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = schema_cache.document("hf", "gpt2")
    assert schema_cache.document("hf", "gpt2") == first and made == ["hf"]
    monkeypatch.setattr(schema_cache, "_stamp", lambda: "another version")
    assert schema_cache.document("hf", "gpt2") == first and schema_cache.document("hf", "gpt2") == first
    assert made == ["hf", "hf"]


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"stamp": 1}', "\0"])
def test_a_damaged_document_is_made_anew(damage: str, made: list[str], tmp_path: Path) -> None:
    first = schema_cache.document("hf")
    (kept,) = (tmp_path / "cache").glob("schema-hf-*.json")
    kept.write_text(damage)
    assert schema_cache.document("hf") == first and made == ["hf", "hf"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [kept.name]


def test_a_home_that_cannot_be_written_costs_time_only(made: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    read(RECIPES / "hf" / "pretrain-gpt2-stdlib.yaml")
    assert made == ["hf"]


def test_a_framework_that_is_not_installed_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: {class_path: a.B}\ntrainer: {}\n")
    code = (
        "import sys; sys.modules['lightning'] = None\n"
        "from sophia_integrations.cli import main; sys.exit(main(['validate', 'r.yaml']))"
    )
    environment: dict[str, Any] = {**os.environ, "SOPHIA_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "this needs lightning, which is not installed: pip install 'sophia-integrations[lightning]'\n"


def test_a_config_that_lightning_cli_writes_is_accepted(tmp_path: Path) -> None:
    recipe = RECIPES / "lightning" / "pretrain-gpt2-stdlib.yaml"
    (tmp_path / "given.yaml").write_text(recipe.read_text(encoding="utf-8").replace("framework: lightning\n", ""))
    command = [sys.executable, "-m", "sophia_integrations.lightning", "fit", "--config", "given.yaml", "--print_config"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (tmp_path / "r.yaml").write_text(done.stdout, encoding="utf-8")
    read("r.yaml")


def test_a_document_is_json(tmp_path: Path) -> None:
    for framework in ("hf", "lightning"):
        document = schema_cache.document(framework)
        assert json.loads(json.dumps(document, allow_nan=False)) == document
