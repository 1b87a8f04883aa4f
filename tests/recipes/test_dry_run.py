"""What a dry run says is what a run then is: numbers against real models, optimizers, steps and checkpoints."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sophia_integrations.cli import main
from sophia_integrations.errors import UserError
from sophia_integrations.recipes.running.dry_run import dry_run
from sophia_integrations.recipes.running.memory import optimizer_maker, weigh
from sophia_integrations.recipes.running.train import train

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(tensorboard|lightning|jsonargparse).*"),
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


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
    assert line(said, "memory of each process: ") == (
        "memory of each process: weights 93.3 kB + gradients 93.3 kB + optimizer state 186.6 kB = 373.2 kB; "
        "activations come on top"
    )
    assert line(said, "optimizer step: ") == "optimizer step: 4 rows × 32 tokens = 128 tokens"
    assert line(said, "steps: ") == "steps: 120 (15,360 tokens), 9.23 epochs of 52 rows"
    assert line(said, "Hessian passes: ") == (
        "Hessian passes: 30, about 5.9% of the time: an estimate from 0.25 of a step's rows every 4 steps; the small "
        "units that they are split into (up to 8 on each process) cost somewhat more"
    )
    assert line(said, "disk: ").startswith(f"disk: 1.2 MB for up to 3 checkpoint(s), one more while it is written, and "
                                           f"the model, in {Path('runs/tiny')} (")  # fmt: skip
    assert said[-1] == "Nothing was trained, and no run folder written."
    assert not (tmp_path / "runs").exists()


def test_it_is_worked_out_for_several_processes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--dry-run", "--nproc", "2"]) == 0
    out = capsys.readouterr().out
    assert "\noptimizer step: 4 rows × 2 processes × 32 tokens = 256 tokens\n" in out
    assert "\nsteps: 120 (30,720 tokens), 17.14 epochs of 52 rows\n" in out


def test_what_it_says_is_what_the_run_then_is(recipe: Path, tmp_path: Path) -> None:
    epochs = tmp_path / "epochs.yaml"
    epochs.write_text(recipe.read_text().replace("  max_steps: 120\n", ""))
    settings = [
        "training.num_train_epochs=2", "training.gradient_accumulation_steps=3",
        "training.save_steps=4", "training.save_total_limit=2",
    ]  # fmt: skip
    said = lines_of(epochs, *settings)
    folder = train(epochs, settings, say=lambda text: None).folder
    summary = json.loads((folder / "summary.json").read_text())
    assert f"steps: {summary['steps']} (" in line(said, "steps: ")
    assert f"Hessian passes: {summary['hessian_updates']}, " in line(said, "Hessian passes: ")
    assert f"{summary['parameters']:,} parameters" in line(said, "model: ")
    big = ("*.safetensors", "optimizer.pt")
    kept = sum(path.stat().st_size for name in big for path in folder.glob(f"checkpoint-*/{name}"))
    kept += (folder / "model" / "model.safetensors").stat().st_size
    promised = float(re.search(r"disk: ([\d.]+) kB", line(said, "disk: "))[1]) * 1e3  # type: ignore[index]
    one = kept / 2
    assert kept <= promised <= kept + one


@pytest.mark.parametrize("optim", ["sophia", "sophia_h", "adamw_torch", "adafactor", "sgd", "rmsprop", "lion_8bit"])
def test_the_optimizers_state_is_what_the_optimizer_makes(optim: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

    config = AutoConfig.for_model("gpt2", n_layer=2, n_head=2, n_embd=24, n_positions=40, vocab_size=300)
    arguments = TrainingArguments(str(tmp_path), optim=optim, use_cpu=True)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config)
    weight = weigh(shapes, optimizer_maker(arguments))
    model = AutoModelForCausalLM.from_config(config)
    assert weight.parameters == weight.trained == sum(p.numel() for p in model.parameters())
    assert weight.weights == weight.gradients == weight.saved == 4 * weight.parameters
    if optim == "lion_8bit":
        assert weight.state is None
        return
    optimizer = optimizer_maker(arguments)(list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    assert weight.state == sum(value.numel() * value.element_size() for value in tensors if value.ndim)


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
    assert "of which" not in done.stdout and re.search(r"weights [23]\.\d\d GB \+ gradients", done.stdout)
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
        tokenizer = f"{{pretrained: '{chat_tokenizer(tmp_path / 'words')}'}}"
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


def chat_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        ["ask answer user assistant"],
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_adapters_are_weighed_as_adapters(tmp_path: Path) -> None:
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
    assert " + gradients 0.5 kB + optimizer state 1.0 kB = " in line(said, "memory of each process: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.optim_args=rho=-1", "rho must be a number of at least 0"),
        ("training.optim=lion_8bit", "^training.optim, training.optim_args: "),
        ("model.config.vocab_size=10", "^model.config.vocab_size: 10 is less than the tokenizer's 298"),
        ("data.block_size=30000", "longer than the model's context"),
    ],
)
def test_what_training_would_refuse_is_refused(override: str, message: str, recipe: Path) -> None:
    words = [override] if "optim_args" in override else [override, "training.optim_args=null"]
    with pytest.raises(UserError, match=message):
        lines_of(recipe, *words)


def test_too_little_room_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="needs about 0.00 GB for its checkpoints and the disk has 0.00 GB free"):
        lines_of(recipe)


def test_the_folder_of_another_recipe_is_refused(recipe: Path) -> None:
    train(recipe, ["training.max_steps=2"], say=lambda text: None)
    with pytest.raises(UserError, match="holds a run of another recipe: training.max_steps"):
        lines_of(recipe)


def test_validate_deep_builds_everything(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--deep", str(recipe)]) == 0
    assert capsys.readouterr().out == f"{recipe}: valid, and everything but the training was built\n"
    assert main(["validate", "--deep", str(recipe), "model.config.vocab_size=10"]) == 2
    assert "model.config.vocab_size: 10 is less than" in capsys.readouterr().err


def test_a_lightning_recipe(corpus: Path) -> None:
    overrides = [
        f"data.init_args.files=['{corpus}/*.txt']", "data.init_args.validation_fraction=0.3",
        "data.init_args.vocab_size=300", "model.init_args.config.vocab_size=300", "trainer.devices=4",
        "trainer.accumulate_grad_batches=2", "data.init_args.block_size=32",
    ]  # fmt: skip
    said = lines_of(ROOT / "recipes" / "lightning" / "pretrain-gpt2-stdlib.yaml", *overrides)
    assert re.fullmatch(r"model: gpt2, [\d,]+ parameters, optimizer SophiaG", line(said, "model: "))
    assert "weights 5.2 MB + gradients 5.2 MB + optimizer state 23.6 MB" in line(said, "memory of each process: ")
    step = "optimizer step: 24 rows × 2 accumulated × 4 processes × 32 tokens = 6,144 tokens"
    assert line(said, "optimizer step: ") == step
    assert line(said, "Hessian passes: ").startswith("Hessian passes: 60, about 2.4% of the time")
    assert line(said, "one batch, 24 rows of up to 32 tokens")
