"""Makes the recordings beside this file: each folder is a run that was really trained, and what it logged.

    python tests/reports/record.py [NAME …]

The names are the keys of `RECIPES` and `TRAINERS`; without one, all are made: a quarter of an hour on one core.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
RUNS = HERE / "recorded"
TINY, LIGHTNING = HERE / "tiny.yaml", HERE / "tiny-lightning.yaml"
PAPER = "training.optim_args=rho={},beta1=0.9,beta2=0.9,eps={},hessian_interval=10"
ADAMW = ("training.optim=adamw_torch", "training.optim_args=null")


def eigen(options: str, rate: str) -> tuple[str, ...]:
    """Overrides for the eigenbasis."""
    return ("training.optim=sophia_eigen", f"training.optim_args={options}", f"training.learning_rate={rate}")


RECIPES: dict[str, tuple[str, ...]] = {
    "good-paper": (),
    "good-eigen": eigen("null", "8e-3"),
    "good-adamw": (*ADAMW, "training.learning_rate=8e-3"),
    "rho-too-small": (PAPER.format("1e-4", "1e-12"),),
    "rho-too-large": (PAPER.format("100", "1e-12"),),
    "eps-too-large": (PAPER.format("0.1", "1e-2"),),
    "unclipped-too-small": eigen("unclipped_start=0.05,unclipped_end=0.02", "8e-3"),
    "lr-too-high": eigen("null", "0.8"),
    "lr-too-low": eigen("null", "8e-5"),
    "always-clipped": ("training.max_grad_norm=1e-4",),
    "no-warmup": ("training.warmup_steps=0", "training.learning_rate=4e-3"),
    "pass-too-dear": ("training.optim_args=rho=0.1,beta1=0.9,hessian_interval=2,hessian_fraction=1,hessian_units=64",),
    "spike-at-the-peak": (
        *eigen("null", "7e-2"),
        "training.lr_scheduler_type=cosine_with_restarts",
        "training.lr_scheduler_kwargs={num_cycles: 2}",
        "training.max_grad_norm=0",
        "training.logging_steps=5",
    ),
    "nan": (*ADAMW, "training.learning_rate=1e30"),
    "interrupted": (),
}
"""Overrides of `tiny.yaml`; the last one is killed after 100 steps."""

TRAINERS = ("trainer-good", "trainer-masked", "trainer-spike", "trainer-spike-of-the-gradient", "tensorboard-good")
"""All but the last are a plain `transformers.Trainer`, of which the newest checkpoint's state is kept, the last is
`tiny-lightning.yaml`, of which only TensorBoard's file is."""


def main() -> None:
    for name in sys.argv[1:] or [*RECIPES, *TRAINERS]:
        with tempfile.TemporaryDirectory() as folder:
            target = RUNS / name
            shutil.rmtree(target, ignore_errors=True)
            if name in RECIPES:
                record_recipe(Path(folder) / name, target, RECIPES[name], killed=name == "interrupted")
            elif name == "tensorboard-good":
                record_lightning(Path(folder) / name, target)
            else:
                record_trainer(Path(folder), target, name)


def record_recipe(run: Path, target: Path, overrides: tuple[str, ...], killed: bool) -> None:
    command = [sys.executable, "-m", "sophia_integrations", "train", str(TINY), f"run_dir={run}", *overrides]
    process = subprocess.Popen(command)
    metrics = run / "metrics.jsonl"
    while killed and process.poll() is None:
        if metrics.is_file() and '"step": 100,' in metrics.read_text():
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    process.wait()
    target.mkdir(parents=True)
    for part in ("recipe.yaml", "metrics.jsonl", "summary.json"):
        if (run / part).is_file():
            shutil.copy(run / part, target)
    text = (target / "recipe.yaml").read_text().replace(str(run), f"runs/{run.name}")
    (target / "recipe.yaml").write_text(text)


def record_lightning(run: Path, target: Path) -> None:
    where = f"trainer.default_root_dir={run}"
    subprocess.run([sys.executable, "-m", "sophia_integrations", "train", str(LIGHTNING), where], check=True)
    (events,) = run.glob("tensorboard/**/events.out.tfevents.*")
    target.mkdir(parents=True)
    shutil.copy(events, target / "events.out.tfevents.0.recorded")


def record_trainer(folder: Path, target: Path, name: str) -> None:
    """Bytes of the standard library's argparse by a GPT-2; the collator spoils some batches."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    import sophia_integrations  # noqa: F401

    set_seed(0)
    text = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    rows = torch.frombuffer(bytearray(text[: len(text) // 64 * 64]), dtype=torch.uint8).view(-1, 64).long()
    batches = 0

    def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        nonlocal batches
        ids = torch.stack([example["input_ids"] for example in examples])
        labels = ids.clone()
        if name == "trainer-masked" and batches % 20 == 0 and batches >= 40:
            labels[:] = -100
        if name == "trainer-spike" and 100 <= batches < 110:
            labels = torch.randint(256, labels.shape)
        if name == "trainer-spike-of-the-gradient" and 105 <= batches < 110:
            labels[:] = 0
        batches += 1
        return {"input_ids": ids, "labels": labels}

    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    arguments = TrainingArguments(
        str(folder),
        optim="sophia_eigen",
        learning_rate=8e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        max_steps=200,
        per_device_train_batch_size=32,
        logging_steps=10,
        save_steps=100,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(GPT2LMHeadModel(config), arguments, collate, [{"input_ids": row} for row in rows]).train()
    target = target / "checkpoint-200"
    target.mkdir(parents=True)
    shutil.copy(folder / "checkpoint-200" / "trainer_state.json", target)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
