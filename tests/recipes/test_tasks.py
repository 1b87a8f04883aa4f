"""Every task from local files to a trained model: it learns, goes on exactly, counts, and saves what it should."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sophia_integrations.errors import UserError
from sophia_integrations.recipes.running.events import read_metrics
from sophia_integrations.recipes.running.train import train

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*"),
]

WORDS = "zero one two three four five six seven eight nine".split()
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TRAINING = """\
training:
  optim: {optim}
  learning_rate: 5e-3
  max_steps: 12
  per_device_train_batch_size: 8
  logging_steps: 2
  eval_strategy: steps
  eval_steps: 6
  save_steps: 4
  use_cpu: true
  seed: 1
"""
SOPHIA = "sophia\n  optim_args: rho=0.05,hessian_interval=4,beta1=0.9,hessian_fraction=0.25"
GPT2 = "{config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 32, n_positions: 64}}"
BERT = (
    "{config: {model_type: bert, num_hidden_layers: 1, num_attention_heads: 2, hidden_size: 32, "
    "intermediate_size: 64, max_position_embeddings: 64, initializer_range: 0.1}}"
)
T5 = "{config: {model_type: t5, num_layers: 1, num_heads: 2, d_model: 32, d_kv: 16, d_ff: 64}}"
TRAIN = "{train: {vocab_size: 300}}"
PROMPTS = "{{files: ['{data}/answers.jsonl'], block_size: 48, validation_fraction: 0.2{more}}}"
CHATS = "{{files: ['{data}/chats.jsonl'], block_size: 48, validation_fraction: 0.2{more}}}"
ROWS = "{{files: ['{data}/rows.csv'], block_size: 32, validation_fraction: 0.2}}"
TEXTS = "{{files: ['{data}/texts.jsonl'], block_size: 32, validation_fraction: 0.2{more}}}"
STREAMED = (
    "{{files: ['{data}/{name}.jsonl'], validation_files: ['{data}/held-{name}.jsonl'], block_size: 48, "
    "streaming: true{more}}}"
)
LORA = "{pretrained: '%s', peft: {r: 4, lora_alpha: 8, lora_dropout: 0.1, target_modules: [q_proj, v_proj]}}"

TASKS: dict[str, tuple[str, str, str | None, str]] = {
    "answers": ("finetune", GPT2, TRAIN, PROMPTS.replace("{more}", "")),
    "answers-packed": ("finetune", GPT2, TRAIN, PROMPTS.replace("{more}", ", packing: true")),
    "chat": ("finetune", "{pretrained: '{llama}'}", None, CHATS.replace("{more}", "")),
    "chat-lora": ("finetune", LORA.replace("%s", "{llama}"), None, CHATS.replace("{more}", ", packing: true")),
    "classify": ("classify", BERT, TRAIN, ROWS),
    "classify-decoder": ("classify", GPT2, TRAIN, ROWS),
    "classify-lora": ("classify", LORA.replace("%s", "{llama}"), None, ROWS),
    "seq2seq": ("seq2seq", T5, TRAIN, PROMPTS.replace("{more}", "")),
    "masked-lm": ("masked-lm", BERT, TRAIN, TEXTS.replace("{more}", "")),
    "masked-lm-rows": ("masked-lm", BERT, TRAIN, TEXTS.replace("{more}", ", packing: false")),
    "stream": ("pretrain", "{pretrained: '{llama}'}", None, STREAMED.replace("{name}", "texts").replace("{more}", "")),
    "stream-chat": (
        "finetune", "{pretrained: '{llama}'}", None,
        STREAMED.replace("{name}", "chats").replace("{more}", ", packing: true"),
    ),
    "stream-answers": (
        "finetune", "{pretrained: '{llama}'}", None,
        STREAMED.replace("{name}", "answers").replace("{more}", ""),
    ),
}  # fmt: skip


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(count))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of every format, in which there is something to learn."""
    folder, draw = tmp_path_factory.mktemp("data of tasks"), random.Random(0)

    def answers() -> list[dict[str, Any]]:
        asked = [words(draw, draw.randint(2, 6)) for _ in range(120)]
        return [{"prompt": f"{text} =", "completion": f" {text.split()[0]}"} for text in asked]

    def chats() -> list[dict[str, Any]]:
        turns = [[words(draw, 2) for _ in range(2)] for _ in range(80)]
        return [
            {
                "messages": [
                    message
                    for text in turn
                    for message in ({"role": "user", "content": text}, {"role": "assistant", "content": text})
                ]
            }
            for turn in turns
        ]

    def texts() -> list[dict[str, Any]]:
        return [{"text": "\n".join(words(draw, 1) * 4 for _ in range(draw.randint(3, 30)))} for _ in range(80)]

    for name, rows in (("answers", answers), ("chats", chats), ("texts", texts)):
        write_rows(folder / f"{name}.jsonl", rows())
        write_rows(folder / f"held-{name}.jsonl", rows()[:20])
    lines = [(words(draw, 5), draw.choice(["bad", "good", "so so"])) for _ in range(160)]
    table = "".join(f"{label} {text},{label}\n" for text, label in lines)
    (folder / "rows.csv").write_text("text,label\n" + table, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pretrained model, its tokenizer and a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sophia_integrations.text.source import Source, Split
    from sophia_integrations.text.tokenizer import train_tokenizer

    folder, rows = tmp_path_factory.mktemp("a llama"), [{"text": " ".join(WORDS * 9)}]
    tokenizer = train_tokenizer(Source("text", Split(rows), Split(rows), "words"), 290, 2, lambda line: None)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **ends, **sizes))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write(data: Path, llama: Path) -> Callable[..., Path]:
    """Writes the recipe of a task into a folder."""

    def write(folder: Path, name: str, optim: str = SOPHIA, more: str = "") -> Path:
        task, model, tokenizer, source = TASKS[name]
        lines = [f"framework: hf\ntask: {task}", f"model: {model.replace('{llama}', str(llama))}"]
        lines += [f"tokenizer: {tokenizer}"] if tokenizer else []
        lines += [f"data: {source.format(data=data)}", TRAINING.format(optim=optim), more]
        path = folder / f"{name}.yaml"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def recipe(write: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes the recipe of a task into the current folder."""
    return lambda *arguments: write(tmp_path, *arguments)


@pytest.fixture(scope="session")
def finished(write: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains a task once, whichever test asks first, and copies the run and its recipe into a folder."""
    done: dict[str, tuple[Path, list[str]]] = {}

    def finish(name: str, folder: Path) -> tuple[Path, Path, list[str]]:
        if name not in done:
            home, said = tmp_path_factory.mktemp(name), list[str]()
            train(write(home, name), [f"run_dir={home}/run"], say=said.append)
            done[name] = home, said
        home, said = done[name]
        file = shutil.copy(home / f"{name}.yaml", folder)
        return Path(file), shutil.copytree(home / "run", folder / "runs" / name), said

    return finish


def losses(folder: Path, name: str = "loss") -> list[tuple[int, float]]:
    return [(event["step"], event[name]) for event in read_metrics(folder / "metrics.jsonl") if name in event]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("name", TASKS)
def test_a_task_learns_and_goes_on_exactly(name: str, finished: Callable[..., Any], tmp_path: Path) -> None:
    file, folder, _ = finished(name, tmp_path)
    logged, held = losses(folder), losses(folder, "eval_loss")
    assert logged[-1][1] + logged[-2][1] < logged[0][1] + logged[1][1] and len(held) == 2
    summary = summary_of(folder)
    assert summary["hessian_updates"] == 3 and summary["tokens"] > 12 * 8 * 4
    assert ("eval_accuracy" in summary) == name.startswith("classify")

    (folder / "summary.json").unlink()
    for step in (8, 12):
        shutil.rmtree(folder / f"checkpoint-{step}")
    said: list[str] = []
    train(file, say=said.append)
    assert f"resuming from {Path('runs') / name / 'checkpoint-4'}" in said
    assert (losses(folder), losses(folder, "eval_loss")) == (logged, held)
    again, kept = summary_of(folder), ("tokens", "validation_loss", "train_loss", "hessian_updates")
    assert {key: again[key] for key in kept} == {key: summary[key] for key in kept}


def test_a_finished_run_takes_the_weights_of_its_last_checkpoint(finished: Callable[..., Any], tmp_path: Path) -> None:
    file, folder, _ = finished("chat-lora", tmp_path)
    held, weights = losses(folder, "eval_loss"), (folder / "model" / "adapter_model.safetensors").read_bytes()
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "model")
    events = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in events if '"step": 12' not in line))
    train(file, say=lambda line: None)
    assert losses(folder, "eval_loss") == held
    assert (folder / "model" / "adapter_model.safetensors").read_bytes() == weights


def test_accuracy_is_printed_logged_and_kept(recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    file = recipe("classify")
    folder = train(file, ["training.max_steps=36", "training.eval_steps=18", "training.learning_rate=3e-3"]).folder
    out = capsys.readouterr().out
    accuracy = summary_of(folder)["eval_accuracy"]
    assert accuracy == losses(folder, "eval_accuracy")[-1][1] > 0.9
    assert re.search(rf"^step 36/36  validation loss [\d.]+  accuracy {accuracy:.4f}$", out, re.M)
    assert re.search(rf", validation accuracy {accuracy:.4f} after 36 steps", out)
    assert re.search(r"^labels: bad \d+, good \d+, so so \d+$", out, re.M)

    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert model.config.id2label == {0: "bad", 1: "good", 2: "so so"}
    rows = [f"{label} one two three" for label in ("bad", "good", "so so")]
    best = model.eval()(**tokenizer(rows, return_tensors="pt", padding=True)).logits.argmax(-1)
    assert best.tolist() == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["chat-lora", "classify-lora"])
def test_only_adapters_are_trained_and_saved(
    name: str, finished: Callable[..., Any], llama: Path, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM
    from safetensors.torch import load_file

    _, folder, said = finished(name, tmp_path)
    saved = load_file(folder / "model" / "adapter_model.safetensors")
    heads = {"chat-lora": set(), "classify-lora": {"base_model.model.score.weight"}}[name]
    assert {key for key in saved if "lora_" not in key} == heads
    assert not (folder / "model" / "model.safetensors").exists()
    summary = summary_of(folder)
    assert summary["trained_parameters"] == sum(value.numel() for value in saved.values()) < summary["parameters"]
    assert any(f"of which {summary['trained_parameters']:,} are trained" in line for line in said)
    if name == "chat-lora":
        model = AutoPeftModelForCausalLM.from_pretrained(folder / "model")
        assert model.peft_config["default"].base_model_name_or_path == str(llama)


def test_a_model_learns_to_answer(recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    more = "sample: {prompt: 'seven one two =', max_new_tokens: 6, temperature: 0.01}"
    train(recipe("seq2seq", "adamw_torch", more), ["training.max_steps=150", "training.learning_rate=1e-2"])
    assert "seven one two =\n→ seven\n" in capsys.readouterr().out


def test_adamw_trains_every_task_alike(recipe: Callable[..., Path]) -> None:
    folder = train(recipe("masked-lm", "adamw_torch"), say=lambda line: None).folder
    assert "hessian_updates" not in summary_of(folder)
    assert losses(folder)[-1][1] < losses(folder)[0][1]


def test_weights_in_half_precision_are_trained_in_full(finished: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _, folder, _ = finished("chat", tmp_path)
    assert {value.dtype for value in load_file(folder / "model" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    "config",
    ["model_type: bloom, hidden_size: 32, n_layer: 1, n_head: 2",  # takes no positions
     "model_type: openai-gpt, n_embd: 32, n_layer: 1, n_head: 2, n_positions: 64"],  # takes them for embeddings only
)  # fmt: skip
def test_packing_is_refused_where_examples_would_see_each_other(config: str, recipe: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"^data\.packing: \w+ lets examples in one row see each other"):
        train(recipe("answers-packed"), [f"model={{config: {{{config}}}}}"], say=lambda line: None)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("answers", ["data.format=chat"],
         r"^data\.columns\.messages: .* no column 'messages'; its columns are prompt, "),
        ("classify", ["task=finetune", "data.format=chat", "data.columns.messages=text"],
         r"rows\.csv, row 1: messages is '.*', expected a list of \{role, content\}"),
        ("masked-lm", ["model={config: {model_type: bert}}", "tokenizer={pretrained: '{llama}'}"],
         "task: masked-lm needs a tokenizer with a mask token"),
        ("chat-lora", ["model.peft.target_modules=[nowhere]"], r"^model\.peft: Target modules .*nowhere.* not found"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(
    name: str, overrides: list[str], message: str, recipe: Callable[..., Path], llama: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(recipe(name), [item.replace("{llama}", str(llama)) for item in overrides], say=lambda line: None)
    assert "\n" not in str(error.value)


def test_a_stream_has_no_more_readers_than_files(recipe: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="the stream has 1; give at most 1"):
        train(recipe("stream"), ["training.dataloader_num_workers=2"], say=lambda line: None)


def test_a_mistake_found_by_a_loader_worker_is_one_sentence(recipe: Callable[..., Path], data: Path) -> None:
    rows = (data / "answers.jsonl").read_text().splitlines()
    (Path.cwd() / "bad.jsonl").write_text("\n".join([*rows, '{"prompt": "one", "completion": ""}']) + "\n")
    with pytest.raises(UserError) as error:
        train(
            recipe("stream-answers"),
            ["training.dataloader_num_workers=1", "data.files=[bad.jsonl]", "training.max_steps=40"],
            say=lambda line: None,
        )
    hint = "data.bad_rows: skip leaves such rows out"
    assert str(error.value).endswith(f"bad.jsonl, row 121: the completion is empty; {hint}")


@pytest.mark.parametrize("name", ["answers", "chat", "classify", "seq2seq", "masked-lm", "stream-answers"])
def test_bad_rows_are_an_error_or_skipped(name: str, recipe: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    """In a recipe of every task: the loss is that of the same data without them, and the summary counts them."""
    file, source = recipe(name), {"answers": "answers", "chat": "chats", "seq2seq": "answers", "masked-lm": "texts"}
    kept, rows = tmp_path / "kept.jsonl", tmp_path / "rows.jsonl"
    if name == "classify":
        lines = [line.split(",") for line in (data / "rows.csv").read_text().splitlines()[1:]]
        write_rows(kept, [{"text": text, "label": label} for text, label in lines])
    else:
        kept.write_text((data / f"{source.get(name, 'answers')}.jsonl").read_text())
    lines = kept.read_text().splitlines()
    rows.write_text("\n".join([lines[0], '{"other": 1}', *lines[1:], '{"text": "cut o']) + "\n")
    short = ["training.max_steps=20" if "stream" in name else "training.max_steps=2", "training.logging_steps=1"]
    with pytest.raises(UserError, match="data.bad_rows: skip leaves such rows out$"):
        train(file, [*short, f"data.files=[{rows}]", "run_dir=bad"], say=lambda line: None)
    said: list[str] = []
    skip = [f"data.files=[{rows}]", "data.bad_rows=skip", "run_dir=skip"]
    folder = train(file, [*short, *skip], say=said.append).folder
    clean = train(file, [*short, f"data.files=[{kept}]", "run_dir=kept"], say=lambda line: None).folder
    summary = summary_of(folder)
    assert summary["skipped_rows"] >= 2 and "skipped_rows" not in summary_of(clean)
    assert f"{summary['skipped_rows']} bad rows skipped" in "\n".join(said)
    assert "bad_rows: skip" in (folder / "recipe.yaml").read_text()
    if "stream" not in name:  # a shuffling buffer draws otherwise where there are more rows
        assert summary["skipped_rows"] == 2 and losses(folder) == losses(clean)
        assert any(f"bad rows: 2 of {len(lines) + 2} skipped: {rows}, row 2: " in line for line in said)


def test_local_folders_are_found_from_anywhere(recipe: Callable[..., Path], llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "a model")
    file = recipe("chat")
    folder = train(file, ["model.pretrained=a model", "training.max_steps=1"], say=lambda line: None).folder
    assert f"pretrained: {tmp_path}/a model" in (folder / "recipe.yaml").read_text()


@pytest.mark.parametrize("name", ["answers", "classify", "classify-lora", "seq2seq", "masked-lm"])
def test_accumulation_changes_no_gradient(name: str, recipe: Callable[..., Path]) -> None:
    once = ["training.max_steps=1", "training.logging_steps=1", "training.max_grad_norm=1e9", "training.eval_steps=1"]
    quiet = [f"model.config.{key}=0.0" for key in ("hidden_dropout_prob", "attention_probs_dropout_prob")]
    quiet = {"masked-lm": quiet, "classify": quiet, "seq2seq": ["model.config.dropout_rate=0.0"]}.get(name, [])
    quiet = ["model.peft.lora_dropout=0.0"] if name == "classify-lora" else quiet
    quiet = [f"model.config.{key}_pdrop=0.0" for key in ("resid", "embd", "attn")] if name == "answers" else quiet
    first = []
    for rows in (8, 2):
        split = [f"training.per_device_train_batch_size={rows}", f"training.gradient_accumulation_steps={8 // rows}"]
        folder = train(recipe(name), [*once, *quiet, *split, f"run_dir=rows{rows}"], say=lambda line: None).folder
        first.append(next(event for event in read_metrics(folder / "metrics.jsonl") if "loss" in event))
    whole, parts = first
    assert parts["loss"] == pytest.approx(whole["loss"], rel=0.1)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.6)


def test_a_new_head_is_no_reason_to_warn(recipe: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    train(recipe("classify-lora"), ["training.max_steps=1"])
    assert "REPORT" not in capfd.readouterr().err


def test_a_repository_of_data_trains(recipe: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    (tmp_path / "some data").mkdir()
    shutil.copy(data / "answers.jsonl", tmp_path / "some data" / "train.jsonl")
    shutil.copy(data / "held-answers.jsonl", tmp_path / "some data" / "test.jsonl")
    hub = "data={hub: {path: some data, validation_split: 'test[:10]'}, block_size: 48}"
    said: list[str] = []
    folder = train(recipe("answers"), [hub, "training.max_steps=2"], say=said.append).folder
    assert any("train: 120 examples, " in text and "validation: 10 examples, " in text for text in said)
    assert f"path: {tmp_path}/some data" in (folder / "recipe.yaml").read_text()
    assert "is complete" in (train(folder / "recipe.yaml", say=said.append), said[-1])[1]
