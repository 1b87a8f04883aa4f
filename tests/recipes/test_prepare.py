"""After `prepare` a recipe trains without fetching or tokenizing anything; what cannot be had is said before."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from tiny_language import save_tiny_language_model

from sophia_integrations.cli import main
from sophia_integrations.errors import UserError
from sophia_integrations.recipes.running.prepare import prepare
from sophia_integrations.recipes.running.train import train

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(tensorboard|lightning|jsonargparse).*"),
]
HUB = """\
framework: hf
task: finetune
model: {{pretrained: '{place}/model'}}
data: {{hub: {{path: '{place}/rows'}}, format: text, block_size: 16, validation_fraction: 0.3}}
training: {{optim: sophia, max_steps: 2, use_cpu: true, logging_steps: 1}}
"""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose model and data are local copies of hub repositories."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data sets")
    save_tiny_language_model(tmp_path / "model")
    (tmp_path / "rows").mkdir()
    rows = [{"text": f"the cat sees a {kind} dog and the bird hears it " * 4} for kind in ("big", "small", "red") * 8]
    rows = [{"text": f"{row['text']} {number}"} for number, row in enumerate(rows)]
    (tmp_path / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "hub.yaml"
    recipe.write_text(HUB.format(place=tmp_path))
    return recipe


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "empty cache"))
    return tmp_path / "empty cache"


def prepared(recipe: Path, *overrides: str) -> list[str]:
    said: list[str] = []
    prepare(recipe, overrides, said.append)
    return said


def test_training_then_makes_nothing_anew(recipe: Path, empty_cache: Path, offline: None, tmp_path: Path) -> None:
    said = prepared(recipe)
    assert any(line.startswith("Tokens: reading") for line in said)
    assert any(line.startswith("train: 6 documents") for line in said)
    assert said[-1].startswith(f"Ready, in {empty_cache} and ") and f"{recipe} trains without the network" in said[-1]
    assert not (tmp_path / "runs").exists()
    before = sorted(path.name for path in empty_cache.glob("*-*"))
    again: list[str] = []
    assert train(recipe, ["training.max_steps=2"], say=again.append).trained
    assert not [line for line in again if line.startswith(("Tokens:", "Tokenizer:"))]
    assert sorted(path.name for path in empty_cache.glob("*-*")) == before


def test_model_and_data_of_a_local_repository(hub: Path, empty_cache: Path, offline: None, tmp_path: Path) -> None:
    said = prepared(hub)
    assert said[-1].startswith("Ready, ")
    again: list[str] = []
    assert train(hub, say=again.append).trained
    assert not [line for line in again if line.startswith(("Tokens:", "Tokenizer:"))]


def test_a_model_without_weights_is_refused(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^model\.pretrained: '.*/model' cannot be loaded: .*model\.safetensors"):
        prepared(hub)


def test_a_model_that_is_not_here_is_a_sentence(capsys: pytest.CaptureFixture[str], hub: Path) -> None:
    assert main(["prepare", str(hub), "model.pretrained=nobody/nothing"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("model.pretrained: 'nobody/nothing' cannot be loaded: ")


def test_a_wrong_column_is_known_before_training(hub: Path) -> None:
    with pytest.raises(UserError, match=r"data\.columns\.text: .* has no column 'words'"):
        prepared(hub, "data.columns.text=words")


def test_a_gpu_recipe_is_prepared_without_a_gpu(hub: Path, empty_cache: Path) -> None:
    recipe = hub.with_name("gpu.yaml")
    recipe.write_text(hub.read_text().replace("use_cpu: true", "bf16: true, tf32: true"))
    assert prepared(recipe)[-1].startswith("Ready, ")


def test_a_lightning_recipe(corpus: Path, empty_cache: Path, offline: None) -> None:
    root = Path(__file__).parents[2] / "recipes" / "lightning" / "pretrain-gpt2-stdlib.yaml"
    said = prepared(root, f"data.init_args.files=['{corpus}/*.txt']", "data.init_args.validation_fraction=0.3")
    assert any(line.startswith("train: 6 documents") for line in said)
    assert said[-1].startswith("Ready, ")
    assert list(empty_cache.glob("tokens-*"))
