"""What a dry run says is what a run then is: parameters, tokens of a step, steps, passes, and a batch as text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_recipes import save_tokenizer

from sophia_integrations.cli import main
from sophia_integrations.errors import UserError
from sophia_integrations.recipes.running.dry_run import dry_run
from sophia_integrations.recipes.running.train import train

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(tensorboard|lightning|jsonargparse).*"),
]


def lines_of(recipe: Path, *overrides: str) -> list[str]:
    said: list[str] = []
    dry_run(recipe, overrides, said.append)
    return said


def line(said: list[str], begin: str) -> str:
    found = [text for text in said if text.startswith(begin)]
    assert len(found) == 1, said
    return found[0]


def test_the_numbers_of_a_small_recipe(recipe: Path, tmp_path: Path) -> None:
    said = lines_of(recipe)
    assert line(said, "model: ") == "model: gpt2, 23,328 parameters, optimizer sophia"
    assert line(said, "optimizer step: ") == "optimizer step: 4 rows × 32 tokens = 128 tokens"
    assert line(said, "steps: ") == "steps: 120, 15,360 tokens, 9.23 epochs"
    assert line(said, "Hessian passes: ") == "Hessian passes: 30, one every 4 steps"
    assert said[-1] == "Nothing was trained, and no run folder written."
    assert not (tmp_path / "runs").exists()


def test_it_is_worked_out_for_several_processes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--dry-run", "--nproc", "2"]) == 0
    out = capsys.readouterr().out
    assert "\noptimizer step: 4 rows × 2 processes × 32 tokens = 256 tokens\n" in out
    assert "\nsteps: 120, 30,720 tokens, 17.14 epochs\n" in out


def test_what_it_says_is_what_the_run_then_is(recipe: Path, tmp_path: Path) -> None:
    epochs = tmp_path / "epochs.yaml"
    epochs.write_text(recipe.read_text().replace("  max_steps: 120\n", ""))
    settings = [
        "training.num_train_epochs=2",
        "training.gradient_accumulation_steps=3",
        "training.save_strategy=no",
    ]
    said = lines_of(epochs, *settings)
    folder = train(epochs, settings, say=lambda text: None).folder
    summary = json.loads((folder / "summary.json").read_text())
    assert f"steps: {summary['steps']}, " in line(said, "steps: ")
    assert f"Hessian passes: {summary['hessian_updates']}, " in line(said, "Hessian passes: ")
    assert f"{summary['parameters']:,} parameters" in line(said, "model: ")


def test_a_large_recipe_needs_no_memory_for_its_weights(corpus: Path, sophia: Any, tmp_path: Path) -> None:
    data = f"data={{files: ['{corpus}/*.txt'], block_size: 128, validation_fraction: 0.3}}"
    arguments = ["hf/pretrain-gpt2-large-770m", "--dry-run", data, "tokenizer={train: {vocab_size: 300}}"]
    code = (
        "import re, sys\nfrom sophia_integrations.cli import main\n"
        f"code = main(['train', *{arguments!r}])\n"
        "print('peak', re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])\nsys.exit(code)"
    )
    environment = {"SOPHIA_CACHE": str(sophia.cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^model: gpt2, 7\d\d,\d{3},\d{3} parameters, optimizer sophia$", done.stdout, re.M)
    assert re.search(r"optimizer step: .* processes|optimizer step: \d+ rows × \d+ accumulated", done.stdout)
    assert int(done.stdout.rpartition("peak ")[2]) < 1_500_000  # KB; the weights alone would be 2.8 GB


ROWS = {
    "prompt-completion": [{"prompt": f"ask {n}", "completion": f" answer {n}"} for n in range(40)],
    "chat": [
        {"messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"answer {n}"}]}
        for n in range(40)
    ],
    "classification": [{"text": f"number {n}", "label": ("even", "odd")[n % 2]} for n in range(40)],
    "text": [{"text": f"number {n} is a number like any other number " * 3} for n in range(40)],
}
TINY = {
    "gpt2": "n_layer: 1, n_head: 2, n_embd: 32, n_positions: 64",
    "bert": "num_hidden_layers: 1, num_attention_heads: 2, hidden_size: 32, intermediate_size: 64",
    "t5": "num_layers: 1, num_heads: 2, d_model: 32, d_kv: 16, d_ff: 64",
}


@pytest.mark.parametrize(
    ("task", "family", "format", "more", "pattern"),
    [
        ("finetune", "gpt2", "prompt-completion", "", r"row 1: ⟦ask (\d+)⟧ answer \1<\|endoftext\|>"),
        ("finetune", "gpt2", "chat", "", r"row 1: ⟦<\|user\|>ask (\d+)<\|endoftext\|><\|assistant\|>⟧answer \1"),
        ("finetune", "gpt2", "prompt-completion", ", packing: true", r"⟦ask (\d+)⟧ answer \1<\|endoftext\|>⟦ask"),
        ("classify", "bert", "classification", "", r"row 1: <\|cls\|>number (\d+)<\|sep\|> → (even|odd)"),
        ("seq2seq", "t5", "prompt-completion", "", r"row 1: ⟦ask (\d+)<\|endoftext\|>⟧ →  ?answer \1"),
        ("masked-lm", "bert", "text", "", r"row 1: ⟦<\|cls\|>.*⟧<\|mask\|>⟦"),
    ],
)  # fmt: skip
def test_a_batch_shows_what_carries_no_loss(
    task: str, family: str, format: str, more: str, pattern: str, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[format]))
    tokenizer = "{train: {vocab_size: 300}}"
    if format == "chat":
        save_tokenizer(tmp_path / "words")
        tokenizer = f"{{pretrained: '{tmp_path / 'words'}'}}"
    recipe = tmp_path / "rows.yaml"
    recipe.write_text(
        f"framework: hf\ntask: {task}\nmodel: {{config: {{model_type: {family}, {TINY[family]}}}}}\n"
        f"tokenizer: {tokenizer}\n"
        f"data: {{files: ['{rows}'], format: {format}, block_size: 48, validation_fraction: 0.2{more}}}\n"
        "training: {optim: sophia, max_steps: 5, bf16: true, per_device_train_batch_size: 3}\n"
    )
    said = lines_of(recipe)
    shown = "\n".join(said[said.index(next(text for text in said if text.startswith("one batch, 3 rows"))) :])
    assert re.search(pattern, shown, re.S), shown


def test_adapters_alone_are_trained(tmp_path: Path) -> None:
    from tiny_language import save_tiny_language_model

    save_tiny_language_model(tmp_path / "llama")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["prompt-completion"]))
    recipe = tmp_path / "lora.yaml"
    recipe.write_text(
        f"framework: hf\ntask: finetune\nmodel: {{pretrained: '{tmp_path}/llama', peft: {{r: 2, target_modules: "
        f"[q_proj]}}}}\ndata: {{files: ['{tmp_path}/rows.jsonl'], block_size: 24, validation_fraction: 0.2}}\n"
        "training: {optim: sophia, max_steps: 5}\n"
    )
    said = lines_of(recipe)
    # Two layers of 16 × 2 + 2 × 16.
    assert " of which 128 are trained (" in line(said, "model: llama, ")
    with pytest.raises(UserError, match=r"^model\.peft: .*layers_to_transform"):
        lines_of(recipe, "model.peft={layers_to_transform: [1], target_modules: '.*'}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.optim_args=rho=-1", "rho must be a number of at least 0"),
        ("training.optim=lion_8bit", "^training.optim, training.optim_args: "),
        ("model.config.vocab_size=10", "^model.config.vocab_size: 10 is less than the tokenizer's 298"),
        ("data.block_size=64", "^data.block_size: 64 is longer than the model's context of 32 tokens$"),
        ("training.dataloader_prefetch_factor=2", "^training.dataloader_prefetch_factor: "),
        ("model.config.n_head=5", "^model.config: "),
        ("model.config.n_embd=-3", "^model.config: "),
    ],
)
def test_what_training_would_refuse_is_refused(override: str, message: str, recipe: Path) -> None:
    words = [override] if "optim_args" in override else [override, "training.optim_args=null"]
    said: list[str] = []
    with pytest.raises(UserError, match=message):
        dry_run(recipe, words, said.append)
    needs_data = "optim" in override or "vocab_size" in override
    assert needs_data or not said  # known before any data is read


def test_the_folder_of_another_recipe_is_refused(recipe: Path) -> None:
    train(recipe, ["training.max_steps=2"], say=lambda text: None)
    with pytest.raises(UserError, match="holds a run of another recipe: training.max_steps"):
        lines_of(recipe)


def test_a_lightning_recipe(corpus: Path) -> None:
    overrides = [
        f"data.init_args.files=['{corpus}/*.txt']", "data.init_args.validation_fraction=0.3",
        "data.init_args.vocab_size=300", "model.init_args.config.vocab_size=300", "trainer.devices=4",
        "trainer.accumulate_grad_batches=2", "data.init_args.block_size=32",
    ]  # fmt: skip
    said = lines_of(ROOT / "recipes" / "lightning" / "pretrain-gpt2-stdlib.yaml", *overrides)
    assert re.fullmatch(r"model: gpt2, [\d,]+ parameters, optimizer SophiaG", line(said, "model: "))
    step = "optimizer step: 24 rows × 2 accumulated × 4 processes × 32 tokens = 6,144 tokens"
    assert line(said, "optimizer step: ") == step
    assert line(said, "Hessian passes: ") == "Hessian passes: 60, one every 10 steps"
    assert line(said, "one batch, 24 rows of up to 32 tokens")
