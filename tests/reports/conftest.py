"""A tiny recipe of each framework to compare: a GPT-2 of a few thousand parameters on the tiny corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

HF = """\
framework: hf
task: pretrain
model:
  config: {{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 32, resid_pdrop: 0.0, embd_pdrop: 0.0,
    attn_pdrop: 0.0}}
tokenizer: {{train: {{vocab_size: 260}}}}
data: {{files: ["{corpus}/*.txt"], block_size: 16, validation_fraction: 0.3}}
training:
  optim: sophia_eigen
  adam_beta1: 0.8
  learning_rate: 4e-3
  weight_decay: 0.1
  lr_scheduler_type: cosine
  max_steps: {steps}
  warmup_steps: 20
  per_device_train_batch_size: 4
  logging_steps: 2
  eval_strategy: steps
  eval_steps: 20
  save_steps: 6
  save_total_limit: 1
  use_cpu: true
sample: {{prompt: "one", max_new_tokens: 8}}
"""
LIGHTNING = """\
model:
  class_path: sophia_integrations.lightning.CausalLM
  init_args:
    config: {{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 32, vocab_size: 260, bos_token_id: 0,
      eos_token_id: 0}}
    groups: {{basis: eigen, adamw: {{betas: [0.8, 0.98]}}}}
    optimizer:
      class_path: sophia_integrations.SophiaG
      init_args: {{lr: 4.0e-3, weight_decay: 0.1}}
    warmup_steps: 20
data:
  class_path: sophia_integrations.lightning.TextDataModule
  init_args: {{files: ["{corpus}/*.txt"], vocab_size: 260, block_size: 16, batch_size: 4, validation_fraction: 0.3}}
trainer:
  accelerator: cpu
  devices: 1
  max_steps: {steps}
  log_every_n_steps: 2
  val_check_interval: 20
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  callbacks:
    - class_path: sophia_integrations.lightning.SophiaCallback
"""


@pytest.fixture(autouse=True)
def quiet_place(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPHIA_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)


def _written(folder: Path, text: str, **values: object) -> str:
    (folder / "tiny.yaml").write_text(text.format(**values), encoding="utf-8")
    return "tiny.yaml"


@pytest.fixture
def hf_recipe(corpus: Path, tmp_path: Path) -> str:
    return _written(tmp_path, HF, corpus=corpus, steps=120)


@pytest.fixture
def lightning_recipe(corpus: Path, tmp_path: Path) -> str:
    return _written(tmp_path, LIGHTNING, corpus=corpus, steps=120)
