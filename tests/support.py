"""Tiny models, data and a plain Trainer, shared by the tests and the worker processes."""

from __future__ import annotations

import copy
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from warm import start

import sophia_integrations  # noqa: F401  (makes optim="sophia" known)
from sophia_integrations.curvature import Categorical
from sophia_integrations.optim.progress import Progress

VOCABULARY = 61
LENGTH = 12
TESTS = Path(__file__).parent
DEVICE = os.environ.get("SOPHIA_TEST_DEVICE", "cpu")
"""Where the tests that can run on a GPU run."""


class FixedLabels(Categorical):
    """'Samples' that depend on the true label only, so that any split draws the same and a test can compute them."""

    def sample(self, prediction, labels, generator):
        return torch.where(labels == -100, -100, fixed_labels(labels))


def fixed_labels(labels):
    return (labels * 7 + 3) % VOCABULARY


def tiny_model(kind="gpt2", **config):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    ids = dict(bos_token_id=1, eos_token_id=2)
    if kind == "gpt2":
        options = dict(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=VOCABULARY, **ids)
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(**{**options, **dropout, **config}))
    options = dict(
        num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=24, vocab_size=VOCABULARY
    )
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=32, **ids, **{**options, **config}))


def lora_llama():
    """`tiny_model("llama")` with LoRA adapters that already do something."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    options = dict(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, LoraConfig(r=2, **options))


def token_rows(rows=64, masked=True, seed=0):
    """Rows whose first tokens carry no loss, a different number in each row."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for row in range(rows):
        ids = torch.randint(3, VOCABULARY, (LENGTH,), generator=generator)
        labels = ids.clone()
        if masked:
            labels[: (row * 5) % (LENGTH - 3)] = -100
        data.append({"input_ids": ids, "labels": labels})
    return data


def make_trainer(output_dir, model=None, data=None, callbacks=None, fixed_labels=False, **arguments):
    """A plain `transformers.Trainer` with optim="sophia"."""
    from transformers import Trainer, TrainingArguments

    trainer_options = {k: arguments.pop(k) for k in ("compute_loss_func",) if k in arguments}
    defaults = dict(
        optim="sophia",
        optim_args="rho=0.05,hessian_interval=5,hessian_fraction=1.0,hessian_units=64",
        learning_rate=1e-3,
        max_steps=20,
        per_device_train_batch_size=4,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    args = TrainingArguments(str(output_dir), **{**defaults, **arguments})
    trainer = Trainer(
        model=model or tiny_model(),
        args=args,
        train_dataset=data or token_rows(),
        callbacks=callbacks,
        **trainer_options,
    )
    if fixed_labels:
        trainer.create_optimizer()
        trainer.optimizer.estimator.readout.likelihood = FixedLabels()
    return trainer


def sophia_of(trainer):
    optimizer = trainer.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def first_hessian(trainer):
    """h by parameter name, as it stands."""
    return _state(trainer, "hessian")


def first_momentum(trainer):
    """m by parameter name; after one step it is (1 - beta1) times the gradient."""
    return _state(trainer, "exp_avg")


def _state(trainer, key):
    state = sophia_of(trainer).state
    return {n: state[p][key].clone() for n, p in trainer.model.named_parameters() if p in state}


def assert_trained(trainer, updates):
    """Train; `updates` estimates were made and none was dropped, the state is finite and the logged loss has fallen."""
    trainer.train()
    optimizer = sophia_of(trainer)
    stats = optimizer.stats()
    assert (stats["hessian_updates"], stats["hessian_skipped"]) == (updates, 0)
    for state in optimizer.state.values():
        assert torch.isfinite(state["hessian"]).all() and torch.isfinite(state["exp_avg"]).all()
    assert any(state["hessian"].any() for state in optimizer.state.values())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"] and logs[-1]["sophia/hessian_norm"] > 0


def hand_estimate(model, rows):
    """Σ over rows of S² / N with our own shift and mask: one backward pass a row, labels `fixed_labels`."""
    model = copy.deepcopy(model)
    named = dict(model.named_parameters())
    sums, n = {k: torch.zeros_like(p) for k, p in named.items()}, 0
    for row in rows:
        logits = model(input_ids=row["input_ids"][None]).logits[0]
        loss = 0.0
        for t in range(LENGTH - 1):
            target = row["labels"][t + 1]
            if target != -100:
                loss = loss + F.cross_entropy(logits[t].float(), fixed_labels(target))
                n += 1
        for (name, _), g in zip(named.items(), torch.autograd.grad(loss, list(named.values())), strict=True):
            sums[name] += g.square()
    return {name: s / n for name, s in sums.items()}


def through_file(obj):
    """What `torch.save` and a safe `torch.load` make of it."""
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def as_an_older_version_wrote_it(saved):
    """A state dict of Sophia with its progress in every group."""
    states = {i: {k: v for k, v in state.items() if k != "progress"} for i, state in saved["state"].items()}
    progress = next((state["progress"] for state in saved["state"].values()), None)
    counters = {} if progress is None else vars(Progress.of_tensor(progress))
    return {"state": states, "param_groups": [{**group, **counters} for group in saved["param_groups"]]}


def run_worker(name, *arguments, processes=1, warm=True, timeout=150, expect=0):
    """Run tests/workers/NAME.py with a time limit, under torchrun when there are several processes.

    They are forks of a process that has imported already (see `warm`), or new interpreters where `warm` is False.
    """
    script = str(TESTS / "workers" / f"{name}.py")
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [*(launcher if processes > 1 else []), script, *arguments]
    process = start(words, cwd=os.getcwd(), env=environment, warm=warm)
    for limit, ending in ((timeout, signal.SIGTERM), (5, signal.SIGKILL), (None, None)):
        try:  # asked to end first, so that torchrun ends its ranks
            out, err = process.communicate(timeout=limit)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(ending)
    assert expect is None or process.returncode == expect, out[-3000:] + err[-6000:]
    return subprocess.CompletedProcess([name, *arguments], process.returncode, out, err)


class Toy(torch.nn.Module):
    """A small classifier with a branch that is never used."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, VOCABULARY))

    def forward(self, x, labels=None):
        return self.net(x)


def toy_batches(step, rank, rows=4):
    """The micro-batches of one rank at one step: one of `rows` rows, with more masked labels on rank 1."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(rows, 6, generator=generator)
    labels = torch.randint(VOCABULARY, (rows,), generator=generator)
    labels[: 1 + 2 * rank] = -100
    return [(x, labels)]


def toy_loss(output, batch):
    """Mean cross-entropy of a unit of `toy_batches`; 0 where every label is masked."""
    labels = batch.kwargs["labels"]
    return F.cross_entropy(output, labels, reduction="sum") / (labels != -100).sum().clamp_min(1)


def peak_bytes(call, folder):
    """The most memory that `call` holds at once beyond what was there, from the allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    trace = Path(folder) / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    assert peak > 0
    return peak


def end_of_rank():
    """Leave the process group and end, without Python's own end.

    gloo's threads now and then abort a process that ends while a model, which a script's names keep alive, still holds
    the group (pytorch issue 190489).
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
