"""What the headers of the shipped Hugging Face recipes say is so: twins, sizes, tokens of a step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sophia_integrations.recipes.reading.loader import read

FOLDER = Path(__file__).parents[2] / "recipes" / "hf"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
VOCABULARIES = {
    "openai-community/gpt2": 50257,
    "HuggingFaceTB/SmolLM2-135M": 49152,
    "google-bert/bert-base-uncased": 30522,
}
MAY_DIFFER = {"optim", "optim_args", "learning_rate", "adam_beta1", "adam_beta2", "weight_decay", "max_steps"}


def settings(file: Path) -> dict[str, Any]:
    return read(file).settings


def header(file: Path) -> str:
    return "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))


def test_every_sophia_recipe_has_a_twin_that_trains_the_same_with_adamw() -> None:
    optimizers = {file: settings(file)["training"]["optim"] for file in RECIPES}
    sophia = [file for file, optim in optimizers.items() if optim.startswith("sophia")]
    assert len(sophia) == (len(RECIPES) + 1) / 2 >= 12, "the paper's and ours share a twin"
    for file in sophia:
        name = re.search(r"^# Twin: recipes/hf/(\S+)$", header(file), re.M)[1]
        assert name == f"{file.stem.removesuffix('-paper')}-adamw.yaml"
        ours, twin = settings(file), settings(FOLDER / name)
        assert twin["training"]["optim"].startswith("adamw") and twin["training"].get("optim_args") is None
        for one in (ours, twin):
            one["training"] = {key: value for key, value in one["training"].items() if key not in MAY_DIFFER}
        assert twin == ours


def test_every_task_has_a_recipe() -> None:
    assert {settings(file)["task"] for file in RECIPES} == {"pretrain", "finetune", "classify", "seq2seq", "masked-lm"}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_header_tells_how_many_tokens_a_step_has(file: Path) -> None:
    recipe, text = settings(file), header(file)
    training, block = recipe["training"], recipe["data"]["block_size"]
    rows, accumulated = training["per_device_train_batch_size"], training.get("gradient_accumulation_steps", 1)
    processes = int((re.search(r"--nproc (\d+)", text) or [0, 1])[1])
    said = re.search(r"([\d,]+) tokens per step", file.read_text())
    if said:
        assert int(said[1].replace(",", "")) == rows * accumulated * processes * block
    if processes > 1:
        assert rows * accumulated * processes == 480  # the paper's
    steps = re.search(r"# Time: ([\d,]+) steps", text)
    if steps:
        assert int(steps[1].replace(",", "")) == training["max_steps"]
    whole = re.search(r"([\d.]+) (billion|million) tokens", text)
    if whole:
        tokens = training["max_steps"] * rows * accumulated * processes * block
        assert float(whole[1]) == pytest.approx(tokens / {"billion": 1e9, "million": 1e6}[whole[2]], rel=0.005)


NEW = [file for file in RECIPES if "config" in settings(file)["model"]]


@pytest.mark.parametrize("file", NEW, ids=lambda file: file.stem)
def test_a_header_tells_the_size_of_a_new_model(file: Path) -> None:
    import torch
    import transformers

    from sophia_integrations.tasks import TASKS

    recipe = settings(file)
    tokenizer = recipe["tokenizer"]
    words = tokenizer["train"]["vocab_size"] if "train" in tokenizer else VOCABULARIES[tokenizer["pretrained"]]
    config = transformers.AutoConfig.for_model(**{"vocab_size": words, **recipe["model"]["config"]})
    with torch.device("meta"):
        model = getattr(transformers, TASKS[recipe["task"]].auto_class).from_config(config)
    said = float(re.search(r"^# Size: ([\d.]+)M parameters", header(file), re.M)[1])
    assert said == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=0.5 if said > 10 else 0.05)
