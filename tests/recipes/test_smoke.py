"""Any recipe in miniature: every shipped one, the recipe's own rows, families, and what stays untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sophia_integrations.cli import main
from sophia_integrations.errors import UserError
from sophia_integrations.recipes.running.folder import RunFolder
from sophia_integrations.recipes.running.smoke.model import small_config
from sophia_integrations.recipes.running.smoke.smoke import smoke
from sophia_integrations.recipes.running.smoke.tiny import guess_family

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(tensorboard|lightning|jsonargparse).*"),
]

ANSWERS = """\
framework: hf
task: finetune
model: {{pretrained: '{model}', peft: {{r: 4, target_modules: [q_proj, v_proj]}}}}
data:
  files: ['{data}']
  columns: {{prompt: question, completion: answer}}
  format: prompt-completion
  block_size: 48
training: {{optim: sophia, learning_rate: 1e-3, max_steps: 5000, bf16: true, per_device_train_batch_size: 64}}
"""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model of 8 heads, 5 layers and its tokenizer, on this machine."""
    from tiny_language import save_tiny_language_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("llama")
    save_tiny_language_model(folder)
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    config = AutoConfig.for_model(
        "llama", num_hidden_layers=5, num_attention_heads=8, hidden_size=128, intermediate_size=192,
        num_key_value_heads=8, vocab_size=vocabulary,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def answers(llama: Path, tmp_path: Path) -> Path:
    """A recipe that fine-tunes with LoRA on rows of its own."""
    data = tmp_path / "rows.jsonl"
    rows = [{"question": f"What is {n} times 2?", "answer": str(2 * n)} for n in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "answers.yaml"
    recipe.write_text(ANSWERS.format(model=llama, data=data))
    return recipe


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "inputs" / "m" / "config.json").read_text())


@pytest.mark.parametrize(
    "file", RECIPES, ids=lambda path: path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
)
def test_every_shipped_recipe_runs_in_miniature(file: Path) -> None:
    said: list[str] = []
    folder = smoke(file, [], said.append).folder
    assert folder.name.endswith("-smoke")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 8
    assert "adamw" in file.stem or summary["hessian_updates"] == 3
    assert sum(line.startswith("smoke test passed. Proved: ") for line in said) == 1
    assert said[-1].startswith("Not proved: ")


def test_the_recipes_own_rows_and_family_are_used(answers: Path) -> None:
    said: list[str] = []
    folder = smoke(answers, [], said.append).folder
    rows = [json.loads(line) for line in (folder / "inputs" / "train.jsonl").read_text().splitlines()]
    assert {"prompt": "What is 59 times 2?", "completion": "118"} in rows
    config = read_config(folder)
    assert (config["model_type"], config["num_hidden_layers"], config["num_attention_heads"]) == ("llama", 2, 2)
    assert list(folder.glob("model/adapter_model.safetensors"))
    changed = "\n".join(said)
    assert "num_hidden_layers 5 → 2" in changed and "hessian_interval: 10 → 3" in changed
    assert "per_device" not in changed and "8 steps of 4 rows" in changed


def test_it_runs_from_the_command_line(answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(answers), "--smoke"]) == 0
    out = capsys.readouterr().out
    assert "smoke test passed" in out
    assert out.splitlines()[-1].startswith("Everything is in runs/answers-smoke: ")


def test_pretrained_weights_that_are_not_here_are_replaced(answers: Path) -> None:
    said: list[str] = []
    there = ["model.pretrained=Qwen/Qwen2.5-0.5B-Instruct", "tokenizer.pretrained=Qwen/Qwen2.5-0.5B-Instruct"]
    folder = smoke(answers, there, said.append).folder
    assert read_config(folder)["model_type"] == "qwen2"
    assert (
        "  model.pretrained: Qwen/Qwen2.5-0.5B-Instruct is not on this machine; a random qwen2 takes its place" in said
    )


def test_adapters_follow_the_model_that_takes_their_place(answers: Path) -> None:
    said: list[str] = []
    there = [
        "model.pretrained=openai-community/gpt2", "tokenizer.pretrained=openai-community/gpt2",
        "model.peft.target_modules=[c_attn, c_wrong]",
    ]  # fmt: skip
    smoke(answers, there, said.append)
    assert "  model.peft.target_modules: all-linear, as GPT2LMHeadModel has no c_wrong" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.columns.prompt=ask", "data.columns.prompt: .* has no column 'ask'; its columns are question, answer"),
        ("data.files=[nothing*.jsonl]", "no file matches"),
        ("training.optim_args=rho=-1", "rho must be a number of at least 0"),
        ("data={files: [rows.jsonl], format: chat, block_size: 9}", "data.columns.messages: .* has no column 'mess"),
    ],
)
def test_what_is_wrong_with_a_recipe_fails_it(override: str, message: str, answers: Path) -> None:
    with pytest.raises(UserError, match=message):
        smoke(answers, [override], lambda line: None)


def test_a_bad_row_is_named(answers: Path, tmp_path: Path) -> None:
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"question": "Why?", "answer": ""}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, row 61: the completion is empty"):
        smoke(answers, [], lambda line: None)
    said: list[str] = []
    smoke(answers, ["data.bad_rows=skip"], said.append)
    assert any("rows of data.files" in line for line in said)


def test_only_an_earlier_smoke_test_is_cleared(answers: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "answers-smoke"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="answers-smoke is in the way of the smoke test and not its own"):
        smoke(answers, [], lambda line: None)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    (folder / "thesis.txt").unlink()
    smoke(answers, [], lambda line: None)
    (folder / "left").write_text("from before")
    with RunFolder(folder).lock(), pytest.raises(UserError, match="another process is training in"):
        smoke(answers, [], lambda line: None)
    assert smoke(answers, [], lambda line: None).trained
    assert not (folder / "left").exists()
    assert not (tmp_path / "runs" / "answers").exists()


@pytest.mark.parametrize(
    ("name", "task", "modules", "family"),
    [
        ("Qwen/Qwen2.5-0.5B", "finetune", None, "qwen2"),
        ("distilbert/distilbert-base-uncased", "classify", None, "distilbert"),
        ("google/flan-t5-small", "seq2seq", None, "t5"),
        ("HuggingFaceTB/SmolLM2-135M", "finetune", ["q_proj"], "llama"),
        ("somebody/something", "finetune", ["c_attn"], "gpt2"),
        ("somebody/something", "masked-lm", "all-linear", "bert"),
    ],
)
def test_a_family_is_guessed_from_the_name(name: str, task: str, modules: Any, family: str) -> None:
    known = {"qwen2", "bert", "distilbert", "t5", "llama", "gpt2", "x"}
    assert guess_family(name, task, modules, known) == family


@pytest.mark.parametrize(
    ("family", "task"),
    [
        *((family, "pretrain") for family in "gpt2 llama mistral qwen3 gemma2 mixtral phi gpt_neox opt bloom mamba "
          "deepseek_v3 qwen3_next jamba".split()),
        *((family, "classify") for family in "bert roberta deberta-v2 modernbert".split()),
        *((family, "seq2seq") for family in "t5 bart pegasus".split()),
    ],
)  # fmt: skip
def test_a_family_becomes_small(family: str, task: str) -> None:
    config, changes = small_config({"model_type": family}, task)
    assert config["model_type"] == family and changes
    assert max(value for value in config.values() if isinstance(value, int)) <= 128


def test_a_family_that_cannot_be_small_is_a_sentence() -> None:
    with pytest.raises(UserError, match="no small codegen could be made for the smoke test"):
        small_config({"model_type": "codegen"}, "pretrain")
