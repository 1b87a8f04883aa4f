"""Every shipped recipe of the Hugging Face Trainer is trained for a few steps, small, with its own keys.

Those of Lightning are in ``test_lightning_run.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_recipes import INTERVAL, STEPS, shrink

from sophia_integrations.recipes.reading.loader import read
from sophia_integrations.recipes.running.events import read_metrics
from sophia_integrations.recipes.running.train import train

FOLDERS = (Path(__file__).parents[2] / "recipes" / folder for folder in ("hf", "compare"))
RECIPES = [file for folder in FOLDERS for file in sorted(folder.rglob("*.yaml"))]

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*"),
]


@pytest.mark.parametrize("file", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_trains(file: Path, tmp_path: Path) -> None:
    settings = read(file).settings
    folder = train(file, shrink(settings, tmp_path), say=lambda line: None).folder
    assert folder == Path("runs") / file.stem
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["optimizer"] == settings["training"]["optim"]
    assert summary.get("hessian_updates") == (None if "adamw" in file.stem else STEPS // INTERVAL)
    assert ("trained_parameters" in summary) == ("lora" in file.stem)
    events = read_metrics(folder / "metrics.jsonl")
    assert [event["step"] for event in events if event.get("loss") is not None] == list(range(1, STEPS + 1))
    assert [event["step"] for event in events if event.get("eval_loss") is not None] == [INTERVAL, STEPS]
    saved = 0 if settings["training"].get("save_strategy") == "no" else 2
    assert len(list(folder.glob("checkpoint-*"))) == saved and list((folder / "model").glob("*.safetensors"))
