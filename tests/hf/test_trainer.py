"""`optim="sophia"` in a plain Trainer: schedule, logs, resume, and what a user's mistake looks like."""

import math
import os
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from support import assert_trained, make_trainer, run_worker, sophia_of, tiny_model, token_rows
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from sophia_integrations import SophiaG


def test_estimates_are_made_every_k_steps_and_the_loss_falls(tmp_path):
    trainer = make_trainer(tmp_path, data=token_rows(8), learning_rate=3e-3, max_steps=42)
    trainer.train()
    stats = sophia_of(trainer).stats()
    assert isinstance(sophia_of(trainer), SophiaG)
    assert stats["hessian_updates"] == math.ceil(42 / 5) and stats["hessian_skipped"] == 0
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5


CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
OPTIONS = {
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "label-smoothing": {"label_smoothing_factor": 0.1},
    "checkpointing": CHECKPOINTING,
    "reentrant-checkpointing": {**CHECKPOINTING, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "clipping": {"max_grad_norm": 0.1},
    "sophia_h": {"optim": "sophia_h"},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo, at our graph break
@pytest.mark.parametrize("name", OPTIONS)
def test_short_training_with_each_option(tmp_path, name):
    options = {"learning_rate": 5e-3, "optim_args": "hessian_interval=3,beta1=0.8", **OPTIONS[name]}
    with mock.patch.dict(os.environ):  # torch_compile leaves ACCELERATE_DYNAMO_… to the Trainers after it
        trainer = make_trainer(
            tmp_path, model=tiny_model("llama"), data=token_rows(4), max_steps=8, logging_steps=1, **options
        )
        assert_trained(trainer, updates=3)


def test_logs_reach_reporters_and_history(tmp_path):
    reported = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    trainer = make_trainer(tmp_path, callbacks=[Reporter()])
    trainer.train()
    keys = {"sophia/win_rate", "sophia/hessian_norm", "sophia/hessian_time_fraction"}
    training = [e for e in trainer.state.log_history if "loss" in e]
    assert len(training) == 4
    for entry in [*training, *[r for r in reported if "loss" in r]]:
        assert keys <= entry.keys()
        assert 0 <= entry["sophia/win_rate"] <= 1 and entry["sophia/hessian_norm"] > 0
        assert 0 < entry["sophia/hessian_time_fraction"] < 1
    assert not any(keys & e.keys() for e in trainer.state.log_history if "loss" not in e)


def test_adamw_is_left_alone(tmp_path):
    trainer = make_trainer(tmp_path, optim="adamw_torch", optim_args=None)
    trainer.train()
    assert type(sophia_of(trainer)).__name__ == "AdamW"
    assert not any(k.startswith("sophia") for e in trainer.state.log_history for k in e)


def test_optim_args_reach_the_optimizer(tmp_path):
    trainer = make_trainer(
        tmp_path,
        optim="sophia_g",
        optim_args="rho=0.02, eps=1e-8,beta1=0.9,beta2=0.95,hessian_interval=3,hessian_fraction=0.5,hessian_units=2,",
        weight_decay=0.2,
    )
    optimizer = trainer.create_optimizer()
    group = optimizer.param_groups[0]
    assert (group["rho"], group["eps"], group["betas"], group["hessian_interval"]) == (0.02, 1e-8, (0.9, 0.95), 3)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0]
    assert (optimizer.estimator.fraction, optimizer.estimator.units, optimizer.estimator.seed) == (0.5, 2, 42)


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("rhoo=0.1", "unknown argument 'rhoo' of Sophia, did you mean 'rho'?"),
        ("rho=abc", "rho must be a number, or \"auto\", got 'abc'"),
        ("hessian_interval=2.5", "hessian_interval must be a whole number, got '2.5'"),
        ("betas=0.9,0.95", "'betas' does not belong here; use beta1=… and beta2=…"),
        ("rho", "expected key=value between commas, got 'rho'"),
        ("lr=1e-3", "use TrainingArguments.learning_rate"),
        ("rho=0.1,rho=0.2", "rho is given twice"),
        ("rho=-1", 'rho must be a number of at least 0, or "auto", got -1.0'),
        ("hessian_fraction=2", "fraction must be above 0 and at most 1"),
    ],
)
def test_bad_optim_args_get_one_sentence(tmp_path, optim_args, message):
    trainer = make_trainer(tmp_path, optim_args=optim_args)
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert message in str(error.value)


@pytest.mark.parametrize("optim", ["sophia", "sophia_g", "sophia_h"])
@pytest.mark.parametrize(
    ("name", "value", "ours"), [("adam_beta1", 0.8, "beta1"), ("adam_beta2", 0.95, "beta2"), ("adam_epsilon", 0, "eps")]
)
def test_an_argument_of_adamw_is_refused_where_it_would_be_ignored(tmp_path, optim, name, value, ours):
    sentence = f"{name} has no effect with optim='{optim}'; use {ours}=… in optim_args."
    trainer = make_trainer(tmp_path, optim=optim, **{name: value})
    with pytest.raises(ValueError) as error:
        trainer.create_optimizer()
    assert str(error.value) == sentence
    setattr(trainer.args, name, TrainingArguments.__dataclass_fields__[name].default)
    trainer.create_optimizer()


def test_all_ignored_arguments_are_named_at_once_and_only_for_our_names(tmp_path):
    options = dict(adam_beta1=0.5, adam_epsilon=1e-6)
    with pytest.raises(ValueError, match="^adam_beta1 has no .*use beta1=….*; adam_epsilon has no .*use eps=…[^;]*$"):
        make_trainer(tmp_path, **options).train()
    group = make_trainer(tmp_path, optim="adamw_torch", optim_args=None, **options).create_optimizer().param_groups[0]
    assert group["betas"][0] == 0.5 and group["eps"] == 1e-6


def test_the_defaults_of_a_subclass_count_as_not_given(tmp_path):
    @dataclass
    class Ours(TrainingArguments):
        adam_beta2: float = 0.95

    args = Ours(str(tmp_path), optim="sophia", use_cpu=True)
    assert Trainer(tiny_model(), args).create_optimizer().param_groups[0]["betas"] == (0.965, 0.99)


def test_unknown_optimizer_name_lists_ours(tmp_path):
    with pytest.raises(ValueError, match="sophia_g"):
        TrainingArguments(str(tmp_path), optim="sofia", use_cpu=True)


@pytest.mark.filterwarnings("default:Sophia made no Hessian estimate")
def test_a_trainer_that_hides_the_batch_raises_with_the_cause(tmp_path):
    trainer = make_trainer(tmp_path)
    inner = trainer.model
    trainer.compute_loss = lambda model, inputs, num_items_in_batch=None: inner.forward(**inputs).loss
    with pytest.raises(RuntimeError, match="GPT2LMHeadModel was not called in training mode"):
        trainer.train()
    assert trainer.state.global_step == 5


def test_other_heads_are_refused_by_name(tmp_path):
    from transformers import GPT2Config, GPT2DoubleHeadsModel

    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=61, bos_token_id=1, eos_token_id=2)
    trainer = make_trainer(tmp_path, model=GPT2DoubleHeadsModel(config))
    with pytest.raises(ValueError, match="does not know the loss of GPT2DoubleHeadsModel.*readout="):
        trainer.train()


@pytest.mark.filterwarnings("default")
def test_all_labels_masked_makes_no_update_and_the_run_continues(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=12, logging_steps=1, optim_args="hessian_interval=5")
    collate, batches = trainer.data_collator, []

    def mask_the_sixth_batch(rows):
        batches.append(collate(rows))
        if len(batches) == 6:
            batches[-1]["labels"][:] = -100
        return batches[-1]

    trainer.data_collator = mask_the_sixth_batch
    trainer.train()
    stats = sophia_of(trainer).stats()
    assert trainer.state.global_step == 12
    assert (stats["hessian_updates"], stats["hessian_skipped"]) == (2, 1)
    assert [e.get("sophia/hessian_skipped", 0) for e in trainer.state.log_history if "loss" in e] == [0] * 5 + [1] * 7
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert all(torch.isfinite(s["hessian"]).all() for s in sophia_of(trainer).state.values())


RESUMED = ["float32:sophia", "bfloat16:sophia", "bfloat16:sophia_eigen"]


@pytest.fixture(scope="module")
def resumed_runs(tmp_path_factory):
    """A folder for each of `RESUMED`, from one process that starts every run in a child of its own."""
    folder = tmp_path_factory.mktemp("resumed")
    run_worker("trainer_resume", folder, *RESUMED)
    return folder


@pytest.mark.parametrize("name", RESUMED)
def test_killed_and_resumed_run_is_bit_equal(resumed_runs, name):
    dtype, optim = name.split(":")
    assert not (resumed_runs / name / "broken" / "killed.pt").exists()
    straight = torch.load(resumed_runs / name / "straight" / "straight.pt")
    resumed = torch.load(resumed_runs / name / "broken" / "resumed.pt")
    assert straight["counters"] == resumed["counters"]
    assert [straight["counters"][k] for k in ("step", "hessian_updates", "hessian_skipped")] == [20, 5, 0]
    assert (straight["counters"]["auto_rho"] > 0) == (optim == "sophia_eigen")
    assert resumed["losses"] == straight["losses"] and len(straight["losses"]) == 20
    for a, b in zip(straight["weights"], resumed["weights"], strict=True):
        assert torch.equal(a, b) and str(a.dtype).endswith(dtype)
    for a, b in zip(straight["state"], resumed["state"], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key])
            wide = key == "progress" or a[key].dtype == torch.float32
            assert wide or "exp_avg_sq" in a, "AdamW keeps its state in the parameter's dtype"


def test_adamw_checkpoint_is_refused_with_a_sentence(tmp_path):
    options = dict(save_strategy="steps", save_steps=5, max_steps=5)
    make_trainer(tmp_path, optim="adamw_torch", optim_args=None, **options).train()
    trainer = make_trainer(tmp_path, **{**options, "max_steps": 10})
    with pytest.raises(ValueError, match="written by Adam or AdamW"):
        trainer.train(resume_from_checkpoint=True)


def test_train_twice_goes_on(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6)
    trainer.train()
    trainer.train()
    assert sophia_of(trainer).progress.step == 12


def test_names_are_real_enum_members():
    assert OptimizerNames("sophia") is OptimizerNames.SOPHIA
    assert OptimizerNames.SOPHIA in list(OptimizerNames) and "SOPHIA_G" in OptimizerNames.__members__
    assert tiny_model("llama").config.model_type == "llama"
