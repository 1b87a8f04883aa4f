"""Tied, frozen, adapted and compiled models, and several optimizers on one model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import FixedLabels, fixed_labels, tiny_model, token_rows
from torch import nn

from sophia_integrations import GaussNewtonBartlett, SophiaG
from sophia_integrations.curvature import Readout


def batch():
    rows = token_rows(4)
    return {k: torch.stack([r[k] for r in rows]) for k in ("input_ids", "labels")}


def estimator_for(model):
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=1)
    estimator.readout.likelihood = FixedLabels()
    return estimator


def hand_squares(model, inputs, params):
    """S² / N of one unit with every row, by our own shift and mask."""
    logits, labels = model(input_ids=inputs["input_ids"]).logits[:, :-1], inputs["labels"][:, 1:]
    keep = labels != -100
    loss = F.cross_entropy(logits[keep], fixed_labels(labels[keep]), reduction="sum")
    return [g.square() / int(keep.sum()) for g in torch.autograd.grad(loss, params)]


def test_tied_embedding_is_squared_once_as_a_sum():
    model, inputs = tiny_model("gpt2"), batch()
    assert model.lm_head.weight is model.transformer.wte.weight
    reference = copy.deepcopy(model)
    optimizer = SophiaG(model.parameters(), lr=0.0, betas=(0.9, 0.0), estimator=estimator_for(model))
    model(**inputs).loss.backward()
    optimizer.step()
    for p, h in zip(model.parameters(), hand_squares(reference, inputs, list(reference.parameters())), strict=True):
        torch.testing.assert_close(optimizer.state[p]["hessian"], h, rtol=1e-4, atol=1e-9)


def test_frozen_parameters_are_neither_estimated_nor_moved():
    model, inputs = tiny_model("llama"), batch()
    model.model.embed_tokens.requires_grad_(False)
    frozen = model.model.embed_tokens.weight.clone()
    optimizer = SophiaG(model.parameters(), lr=1e-2, estimator=estimator_for(model))
    model(**inputs).loss.backward()
    optimizer.step()
    assert torch.equal(model.model.embed_tokens.weight, frozen)
    assert model.model.embed_tokens.weight not in optimizer.state
    assert optimizer.state[model.lm_head.weight]["hessian"].any()


@pytest.mark.filterwarnings("ignore:.*checkpointing. is deprecated:FutureWarning")
def test_lora_estimates_adapters_only():
    import peft

    model, inputs = tiny_model("llama"), batch()
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    optimizer = SophiaG(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, hessian_interval=1, estimator=estimator_for(model)
    )
    for step in range(2):
        model(**inputs).loss.backward()
        reference = copy.deepcopy(model)
        h = {n: optimizer.state[p].get("hessian", torch.tensor(0.0)).clone() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        adapters = {n: p for n, p in reference.named_parameters() if p.requires_grad}
        for name, square in zip(adapters, hand_squares(reference, inputs, list(adapters.values())), strict=True):
            now = optimizer.state[model.get_parameter(name)]["hessian"]
            torch.testing.assert_close(now, 0.99 * h[name] + 0.01 * square, rtol=1e-4, atol=1e-10)
            assert now.any() == (step > 0 or "lora_B" in name), name
    assert all("lora" in n for n, p in model.named_parameters() if p in optimizer.state and optimizer.state[p])


def test_two_sophias_on_one_model_estimate_what_one_does():
    inputs = batch()

    def run(split):
        model = tiny_model("llama")
        params = list(model.parameters())
        parts = [params[:5], params[5:]] if split else [params]
        optimizers = [SophiaG(part, lr=0.0, hessian_interval=2, estimator=estimator_for(model)) for part in parts]
        for _ in range(4):
            model(**inputs).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
        assert all(optimizer.stats()["hessian_updates"] == 2 for optimizer in optimizers)
        return [o.state[p]["hessian"] for o in optimizers for p in o.param_groups[0]["params"]]

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
@pytest.mark.parametrize("how", ["wrapped", "in place", "estimator on the inner module"])
def test_compiled_models(how):
    def run(how):
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))
        called = inner
        if how == "in place":
            inner.compile(backend="aot_eager")
        elif how != "eager":
            called = torch.compile(inner, backend="aot_eager")
        watched = called if how == "wrapped" else inner
        estimator = GaussNewtonBartlett(watched, fraction=1.0, readout=Readout())
        optimizer = SophiaG(inner.parameters(), lr=1e-2, hessian_interval=2, estimator=estimator)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(called(torch.randn(8, 4)), torch.randint(5, (8,))).backward()
            optimizer.step()
        assert optimizer.stats()["hessian_updates"] == 3
        return [optimizer.state[p]["hessian"] for p in inner.parameters()]

    torch._dynamo.reset()
    for a, b in zip(run(how), run("eager"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
