"""Whole runs of a tiny recipe: what a folder holds, going on exactly, refusing what would lose work."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sophia_integrations.errors import UserError
from sophia_integrations.recipes.running.events import read_metrics
from sophia_integrations.recipes.running.train import train

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*"),
]


def losses(folder: Path) -> list[tuple[int, str, float]]:
    """Every logged loss in order, as (step, name, value)."""
    return [
        (event["step"], name, event[name])
        for event in read_metrics(folder / "metrics.jsonl")
        for name in ("loss", "eval_loss")
        if name in event
    ]


@pytest.fixture(scope="session")
def whole_run(recipe: Path, sophia: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run through the real command line, and what it printed."""
    place = tmp_path_factory.mktemp("work place")
    code, out, err = sophia.finish(sophia.start("train", recipe, cwd=place, warm=False))
    assert code == 0, err
    return place / "runs" / "tiny", out


@pytest.fixture
def copy(whole_run: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the whole run that a test may damage."""
    return shutil.copytree(whole_run[0], tmp_path / "runs" / "tiny", symlinks=True)


def make_incomplete(folder: Path, keep: int) -> None:
    """Takes a complete run back to what a crash after the checkpoint of step `keep` leaves."""
    (folder / "summary.json").unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > keep:
            shutil.rmtree(checkpoint)


def test_a_run_learns_and_leaves_everything(whole_run: tuple[Path, str]) -> None:
    folder, out = whole_run
    train_losses = [value for _, name, value in losses(folder) if name == "loss"]
    assert train_losses[-1] < 0.8 * train_losses[0]
    for name in ("recipe.yaml", "data.json", "summary.json", "loss.png", "tokenizer/tokenizer.json"):
        assert (folder / name).stat().st_size > 0
    assert (folder / "model" / "model.safetensors").is_file()
    assert (folder / "checkpoint-120" / "trainer_state.json").is_file()
    assert len(list(folder.glob("checkpoint-*"))) == 3
    assert list((folder / "tensorboard").glob("events*"))

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["optimizer"] == "sophia" and summary["hessian_updates"] == 30
    assert summary["tokens"] == pytest.approx(120 * 4 * 32, rel=0.1)
    assert summary["validation_loss"] == losses(folder)[-1][2]
    assert "sophia/win_rate" in read_metrics(folder / "metrics.jsonl")[0]

    lines = out.strip().splitlines()
    assert (
        lines[-1] == f"Everything is in {Path('runs/tiny')}: model, metrics.jsonl, loss.png, summary.json, tensorboard"
    )
    assert re.search(r"^train loss [\d.]+, validation loss [\d.]+ after 120 steps and \d+ s$", out, re.M)
    assert any(line.startswith("one") for line in lines)


def test_the_saved_model_opens_as_any_other(whole_run: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole_run[0] / "model")
    tokenizer = AutoTokenizer.from_pretrained(whole_run[0] / "model")
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.decode(tokenizer("one two").input_ids) == "one two"


def test_a_complete_run_says_so_without_training(copy: Path, recipe: Path) -> None:
    said: list[str] = []
    before = (copy / "metrics.jsonl").read_bytes()
    outcome = train(recipe, say=said.append)
    assert not outcome.trained and len(said) == 1
    assert re.fullmatch(
        rf"{Path('runs/tiny')} is complete: validation loss \d\.\d{{4}}. To train anew, add --fresh.", said[0]
    )
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_the_resolved_recipe_names_the_same_run(copy: Path) -> None:
    said: list[str] = []
    assert not train(copy / "recipe.yaml", say=said.append).trained
    assert "is complete" in said[0]


def test_a_changed_recipe_is_refused(copy: Path, recipe: Path) -> None:
    with pytest.raises(UserError) as error:
        train(recipe, ["training.learning_rate=1e-4", "sample.prompt=two"])
    assert str(error.value) == (
        f"{Path('runs/tiny')} holds a run of another recipe: training.learning_rate (there 0.005, asked 0.0001); "
        'sample.prompt (there "one", asked "two"). Use --fresh to start in a new numbered folder, or run_dir=PATH to '
        "choose one"
    )


@pytest.mark.parametrize("damage", ["no state", "torn optimizer", "torn weights"])
def test_a_damaged_checkpoint_is_passed_over(copy: Path, recipe: Path, damage: str) -> None:
    expected = losses(copy)
    make_incomplete(copy, keep=120)
    newest = copy / "checkpoint-120"
    if damage == "no state":
        (newest / "trainer_state.json").unlink()
    else:
        file = newest / ("optimizer.pt" if "optimizer" in damage else "model.safetensors")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    said: list[str] = []
    train(recipe, say=said.append)
    assert any(line.startswith(f"Skipping {Path('runs/tiny/checkpoint-120')}, which is not whole") for line in said)
    assert f"resuming from {Path('runs/tiny/checkpoint-110')}" in said
    assert (copy / "broken-checkpoint-120").is_dir()
    assert losses(copy) == expected


def test_a_crash_after_the_last_step_only_finishes(copy: Path, recipe: Path) -> None:
    before, summary = losses(copy), json.loads((copy / "summary.json").read_text())
    make_incomplete(copy, keep=120)
    shutil.rmtree(copy / "model")
    train(recipe, say=lambda line: None)
    again = json.loads((copy / "summary.json").read_text())
    assert losses(copy) == before
    assert (copy / "model" / "model.safetensors").read_bytes() == (
        copy / "checkpoint-120" / "model.safetensors"
    ).read_bytes()
    for name in ("validation_loss", "train_loss", "steps", "tokens"):
        assert again[name] == summary[name]


def test_fresh_never_overwrites(copy: Path, recipe: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    outcome = train(recipe, ["training.max_steps=2"], fresh=True, say=lambda line: None)
    assert outcome.folder == Path("runs/tiny-2")
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_changed_text_is_refused(copy: Path, recipe: Path, corpus: Path) -> None:
    make_incomplete(copy, keep=110)
    data: dict[str, Any] = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps({**data, "digest": "of other text"}))
    with pytest.raises(UserError, match="the text or the tokenizer changed since the run in"):
        train(recipe, say=lambda line: None)


def test_a_foreign_folder_is_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="mine is not empty and no run folder"):
        train(recipe, ["run_dir=mine"])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_made_is_named(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run folder file/run cannot be written \(Not a directory\)"):
        train(recipe, ["run_dir=file/run"])


def test_two_runs_in_one_folder_are_refused(copy: Path, recipe: Path) -> None:
    from sophia_integrations.recipes.running.run_folder import RunFolder

    make_incomplete(copy, keep=110)
    with RunFolder(copy).lock(), pytest.raises(UserError, match="another process is training in"):
        train(recipe, say=lambda line: None)


def test_a_refused_optimizer_argument_is_a_sentence(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"training\.optim_args: rho must be a number of at least 0"):
        train(recipe, ["training.optim_args=rho=-1"], say=lambda line: None)
    mended = ["training.optim_args=rho=0.1,hessian_interval=2", "training.max_steps=2"]
    assert train(recipe, mended, say=lambda line: None).folder == Path("runs/tiny")  # nothing stood there to lose


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "hf").glob("pretrain-*stdlib*.yaml")), ids=lambda p: p.stem)
def test_the_recipe_of_the_standard_library_learns(file: Path, corpus: Path) -> None:
    small = [
        f"data={{files: ['{corpus}/*.txt'], block_size: 128, validation_fraction: 0.3}}",
        "training.max_steps=12", "training.warmup_steps=0", "training.logging_steps=1", "training.use_cpu=true",
        "training.per_device_train_batch_size=4",
    ]  # fmt: skip
    folder = train(file, small, say=lambda line: None).folder
    logged = losses(folder)
    assert folder == Path("runs") / file.stem
    assert logged[0][:2] == (1, "loss") and logged[-1][:2] == (12, "eval_loss")
    assert logged[-1][2] < logged[0][2]


def test_a_process_uses_one_of_several_gpus(copy: Path) -> None:
    from transformers import TrainingArguments

    from sophia_integrations.recipes.running.trainer_run import OneGpuArguments

    class Many(TrainingArguments):
        n_gpu = 8

    class Here(OneGpuArguments, Many): ...

    arguments = Here(output_dir="unused", use_cpu=True, per_device_train_batch_size=3)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 3
    saved = torch.load(copy / "model" / "training_args.bin", weights_only=False)
    assert type(saved) is TrainingArguments and saved.learning_rate == 5e-3
