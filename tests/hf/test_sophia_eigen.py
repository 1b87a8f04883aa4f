"""`optim="sophia_eigen"` in a plain Trainer: which parameter follows which rule, with what settings."""

import pytest
import torch
from support import assert_trained, lora_llama, make_trainer, sophia_of, tiny_model, token_rows
from transformers import BertConfig, BertForSequenceClassification

from sophia_integrations import SophiaG, param_groups
from sophia_integrations.optim import EIGEN_DEFAULTS


def eigen_trainer(tmp_path, optim_args="hessian_interval=5", **options):
    return make_trainer(tmp_path, optim="sophia_eigen", optim_args=optim_args, **options)


def short_run(tmp_path, model, **options):
    shape = dict(data=token_rows(4), max_steps=8, logging_steps=1)
    return eigen_trainer(tmp_path, "hessian_interval=3", model=model, **shape, **options)


def names(model, group):
    known = {p: n for n, p in model.named_parameters()}
    return {known[p] for p in group["params"]}


def test_matrices_follow_sophia_and_all_else_adamw(tmp_path):
    trainer = eigen_trainer(tmp_path, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7)
    groups = trainer.create_optimizer().param_groups
    matrices, embeddings, vectors = groups
    assert {name.rsplit(".", 2)[-2] for name in names(trainer.model, matrices)} == {"c_attn", "c_proj", "c_fc"}
    assert names(trainer.model, embeddings) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert [g["update"] for g in groups] == ["sophia", "adamw", "adamw"]
    assert [g["weight_decay"] for g in groups] == [0.2, 0.2, 0.0]
    assert {k: matrices[k] for k in EIGEN_DEFAULTS} == EIGEN_DEFAULTS and matrices["basis_max_dim"] == 16
    assert [(g["betas"], g["eps"]) for g in (embeddings, vectors)] == [((0.8, 0.95), 1e-7)] * 2
    assert [g["lr"] for g in groups] == [1e-3, 2e-3, 2e-3] and len(names(trainer.model, vectors)) + 10 == len(
        list(trainer.model.parameters())
    )


def test_every_part_is_reached_by_optim_args(tmp_path):
    trainer = eigen_trainer(
        tmp_path,
        "rho=0.1,beta1=0.95,eps=1e-10,nesterov=false,bias_correction=false,noise_floor=0.25,unclipped_end=0.4,"
        "basis_interval=3,basis_warmup=7,basis_beta=0.9,basis_max_dim=8,adamw_lr=5e-3,hessian_interval=4",
    )
    matrices, embeddings, vectors = trainer.create_optimizer().param_groups
    expected = dict(rho=0.1, betas=(0.95, EIGEN_DEFAULTS["betas"][1]), eps=1e-10, nesterov=False, noise_floor=0.25)
    expected |= dict(bias_correction=False, unclipped=(0.8, 0.4), basis="eigen", basis_interval=3, basis_warmup=7)
    expected |= dict(basis_beta=0.9, basis_max_dim=8, hessian_interval=4, lr=1e-3)
    assert {k: matrices[k] for k in expected} == expected
    assert [g["lr"] for g in (embeddings, vectors)] == [5e-3, 5e-3]
    assert eigen_trainer(tmp_path, "basis=none").create_optimizer().param_groups[0]["basis"] is None


OPTIONS = {
    "plain": {},
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "clipping": {"max_grad_norm": 0.1},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", OPTIONS)
def test_short_training_with_each_option(tmp_path, name):
    trainer = short_run(tmp_path, tiny_model("llama"), learning_rate=5e-3, **OPTIONS[name])
    trainer.train()
    optimizer = sophia_of(trainer)
    assert optimizer.stats()["hessian_updates"] == 3
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"] - 0.3
    assert all(entry["sophia/rho"] > 0 and 0 < entry["sophia/curvature_share"] <= 1 for entry in logs)
    rotated = [s for s in optimizer.state.values() if "left_basis" in s]
    assert len(rotated) == 14 and all(torch.isfinite(s["hessian"]).all() for s in rotated)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
def test_lora_adapters_follow_sophia(tmp_path):
    trainer = short_run(tmp_path, lora_llama(), learning_rate=1e-2)
    assert_trained(trainer, updates=3)
    assert [g["name"] for g in sophia_of(trainer).param_groups] == ["matrices"]


def test_a_classifiers_head_is_a_matrix_and_the_output_embeddings_of_a_language_model_are_not():
    config = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=31)
    classifier = BertForSequenceClassification(BertConfig(**config, num_labels=3))
    assert "classifier.weight" in names(classifier, param_groups(classifier)[0])
    llama = tiny_model("llama", tie_word_embeddings=False)
    groups = {g["name"]: names(llama, g) for g in param_groups(llama, basis="eigen")}
    assert groups["embeddings"] == {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_model_inside_another_module_keeps_its_conventions():
    outer = torch.nn.ModuleDict(
        {"body": tiny_model("llama", tie_word_embeddings=False), "head": torch.nn.Linear(16, 4)}
    )
    matrices, embeddings, vectors = param_groups(outer, basis="eigen")
    assert "head.weight" in names(outer, matrices) and "body.lm_head.weight" in names(outer, embeddings)
    assert matrices["basis_max_dim"] == 16 and "head.bias" in names(outer, vectors)
    assert isinstance(SophiaG([matrices, embeddings, vectors]), SophiaG)


@pytest.mark.parametrize(
    ("optim", "optim_args", "message"),
    [
        ("sophia", "basis_interval=5", "basis_interval belongs to optim='sophia_eigen', not to 'sophia'"),
        ("sophia_eigen", "basis=eig", "basis must be None or 'eigen', got 'eig'"),
        ("sophia_eigen", "basis_max_dim=0", "basis_max_dim must be a whole number of at least 2, or None, got 0"),
        ("sophia_eigen", "nesterov=maybe", "nesterov must be true or false, got 'maybe'"),
        ("sophia_eigen", "rho=automatic", "rho must be a number, or \"auto\", got 'automatic'"),
        ("sophia_eigen", "unclipped_start=1.5", "unclipped_start must be above 0 and below 1, got 1.5"),
        ("sophia_eigen", "basis_intervall=5", "did you mean 'basis_interval'?"),
    ],
)
def test_bad_optim_args_get_one_sentence(tmp_path, optim, optim_args, message):
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, optim=optim, optim_args=optim_args).train()
    assert message in str(error.value)


@pytest.mark.parametrize("optim", ["sophia", "sophia_h", "sophia_eigen"])
def test_momentum_in_bfloat16_is_a_word_of_optim_args(optim, tmp_path):
    trainer = make_trainer(tmp_path, optim=optim, optim_args="momentum_dtype=bfloat16", max_steps=2)
    trainer.train()
    kept = sophia_of(trainer).state[trainer.model.transformer.h[0].attn.c_attn.weight]
    assert kept["exp_avg"].dtype == torch.bfloat16 and kept["hessian"].dtype == torch.float32
    with pytest.raises(ValueError, match="optim_args: momentum_dtype must be 'float32' or 'bfloat16', got 'bf16'"):
        make_trainer(tmp_path, optim=optim, optim_args="momentum_dtype=bf16").create_optimizer()
