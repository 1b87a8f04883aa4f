"""The Hutchinson estimator against the exact Hessian diagonal, its exact noise, and what it must refuse."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracles import draws_of, flat, hessian, hutchinson_variance
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia_integrations import GaussNewtonBartlett, Hutchinson, SophiaG, SophiaH
from sophia_integrations.curvature.reduction import DiagonalSum


class OwnLoss(nn.Module):
    """A classifier that computes its own mean loss, as Hugging Face models do."""

    def __init__(self, checkpoint=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.checkpoint = checkpoint

    def forward(self, x, labels=None, num_items_in_batch=None):
        if self.checkpoint is None:
            logits = self.net(x)
        else:
            from torch.utils.checkpoint import checkpoint

            hidden = self.net[0](x)
            logits = checkpoint(self.net[1:], hidden, use_reentrant=self.checkpoint == "reentrant")
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": loss / (num_items_in_batch or (labels != -100).sum()), "logits": logits}


def batches_of(sizes_and_masks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for rows, masked in sizes_and_masks:
        labels = torch.randint(3, (rows,), generator=generator)
        labels[:masked] = -100
        batches.append((torch.randn(rows, 4, generator=generator, dtype=torch.float64), labels))
    return batches


def mean_loss(x, labels):
    return lambda call: call(x, labels=labels)["loss"]


@pytest.mark.parametrize(
    ("probe", "probes", "draws"), [("rademacher", 1, 400), ("rademacher", 4, 150), ("gaussian", 1, 800)]
)
def test_mean_and_noise_are_those_of_the_exact_hessian(probe, probes, draws):
    """Unequal micro-batches and masks: unit u weighs its own count; every unit draws its own probe."""
    torch.manual_seed(0)
    model = OwnLoss().double()
    params = list(model.parameters())
    batches = batches_of([(4, 3), (2, 0), (5, 1)])
    counts = [1, 2, 4]
    hessians = [hessian(model, mean_loss(*batch), params) for batch in batches]
    weights = [n / sum(counts) for n in counts]
    exact = sum(w * h.diagonal() for w, h in zip(weights, hessians, strict=True))
    variance = hutchinson_variance(hessians, weights, probe, probes)

    estimator = Hutchinson(model, probe=probe, probes=probes, fraction=1.0, units=1)
    samples = draws_of(estimator, lambda: [model(x, labels=y) for x, y in batches], params, draws)
    error = torch.linalg.norm(samples.mean(0) - exact)
    assert error < 2 * (variance.sum() / draws).sqrt()
    assert abs(samples.var(0).sum() / variance.sum() - 1) < 0.15
    assert exact.min() < 0 < exact.max()


def test_units_of_one_micro_batch_add_up_to_its_hessian():
    torch.manual_seed(1)
    model = OwnLoss().double()
    params = list(model.parameters())
    ((x, labels),) = batches_of([(9, 4)])
    exact = hessian(model, mean_loss(x, labels), params).diagonal()
    estimator = Hutchinson(model, fraction=1.0, units=3, probes=2)
    samples = draws_of(estimator, lambda: model(x, labels=labels), params, 200)
    assert torch.linalg.norm(samples.mean(0) - exact) < 2 * (samples.var(0).sum() / 200).sqrt()


def first_h(model, forward, **options):
    """ĥ of one pass, by parameter."""
    estimator = Hutchinson(model, fraction=1.0, **options)
    params = [p for p in model.parameters() if p.requires_grad]
    estimator.arm(True)
    forward(model, estimator)
    return estimator.estimate(params, 0).diagonal


def assert_same(actual, expected, rtol=1e-9):
    for a, b in zip(actual.values(), expected.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)
    assert any(v.any() for v in expected.values())


def test_the_loss_may_be_computed_outside_the_model_and_the_labels_noted():
    torch.manual_seed(0)
    model = OwnLoss().double()
    ((x, labels),) = batches_of([(6, 2)])
    inside = first_h(model, lambda m, e: m(x, labels=labels))
    assert_same(first_h(model, lambda m, e: m(x, labels=labels, num_items_in_batch=100)), inside)

    def noted(m, estimator):
        estimator.note_labels(labels)
        m(x)

    assert_same(first_h(model, noted), inside)
    plain = first_h(
        model.net,
        lambda m, e: (e.note_labels(labels), m(x)),
        loss=lambda output, batch: F.cross_entropy(output, batch.labels),
    )
    assert_same(plain, inside)


@pytest.mark.parametrize("form", ["dict", "scalar", "tuple", "attribute"])
def test_the_models_own_loss_is_found(form):
    class Form(OwnLoss):
        def forward(self, x, labels=None):
            output = super().forward(x, labels)
            if form == "attribute":
                return type("Output", (), output)()
            return {"dict": output, "scalar": output["loss"], "tuple": tuple(output.values())}[form]

    torch.manual_seed(0)
    model = Form().double()
    ((x, labels),) = batches_of([(6, 2)])
    torch.manual_seed(0)
    reference = first_h(OwnLoss().double(), lambda m, e: m(x, labels=labels))
    assert_same(first_h(model, lambda m, e: m(x, labels=labels)), reference)


def test_without_any_labels_a_unit_weighs_its_rows():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    params = list(model.parameters())
    inputs = [torch.randn(rows, 3, dtype=torch.float64) for rows in (2, 5)]

    def loss(output, batch=None):
        return output.pow(4).sum(1).mean()

    exact = hessian(model, lambda call: loss(call(torch.cat(inputs))), params).diagonal()
    estimator = Hutchinson(model, loss=loss, fraction=1.0, units=1)
    samples = draws_of(estimator, lambda: [model(x) for x in inputs], params, 300)
    assert torch.linalg.norm(samples.mean(0) - exact) < 2 * (samples.var(0).sum() / 300).sqrt()


def gpt2(**config):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    options = dict(n_layer=2, n_head=2, n_embd=8, n_positions=8, vocab_size=11, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(GPT2Config(**options, **dropout, attn_implementation="sdpa", **config)).double()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, hidden_size=8, vocab_size=11)
    config = LlamaConfig(intermediate_size=8, max_position_embeddings=8, attn_implementation="sdpa", **options)
    return LlamaForCausalLM(config).double()


def token_rows():
    ids = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, masked in enumerate((1, 5, 3)):
        labels[row, :masked] = -100
    return ids, labels


def block_hessian(loss, params):
    """[coordinates, coordinates]: double backward with one basis vector a time."""
    with sdpa_kernel(SDPBackend.MATH):
        first = flat_with_graph(torch.autograd.grad(loss(), params, create_graph=True))
        rows = [torch.autograd.grad(g, params, retain_graph=True) for g in first]
    return torch.stack([flat(row) for row in rows])


def flat_with_graph(tensors):
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize(("make", "names"), [(gpt2, ("h.1.attn.c_attn.b", "h.0.ln_1")), (llama, ("norm", "k_proj"))])
def test_hugging_face_models_with_sdpa_attention(make, names):
    """Each row is a unit, with the count that remains after the causal shift; the batch's own count is not used."""
    model = make()
    ids, labels = token_rows()
    params = [p for n, p in model.named_parameters() if any(part in n for part in names)]
    blocks = [
        block_hessian(lambda i=i: model(input_ids=ids[i : i + 1], labels=labels[i : i + 1]).loss, params)
        for i in range(3)
    ]
    counts = [5, 1, 3]
    exact = sum(n / 9 * b.diagonal() for n, b in zip(counts, blocks, strict=True))
    variance = hutchinson_variance(blocks, [n / 9 for n in counts], "rademacher", 1)
    estimator = Hutchinson(model, fraction=1.0, units=3)
    forward = lambda: model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(50))  # noqa: E731
    samples = draws_of(estimator, forward, params, 60)
    assert torch.linalg.norm(samples.mean(0) - exact) < 2 * (variance.sum() / 60).sqrt()
    assert torch.linalg.norm(exact) > 4 * (variance.sum() / 60).sqrt()


def test_labels_that_the_trainer_keeps_from_the_model_reach_its_loss():
    ids, labels = token_rows()
    inside = first_h(gpt2(), lambda m, e: m(input_ids=ids, labels=labels))
    noted = first_h(gpt2(), lambda m, e: (e.note_labels(labels), m(input_ids=ids)))
    assert_same(noted, inside)


@pytest.mark.parametrize("probes", [1, 2])
def test_non_reentrant_checkpointing_gives_the_same_estimate(probes):
    ids, labels = token_rows()

    def run(checkpointing):
        model = gpt2()
        recomputed.clear()
        model.transformer.h[0].ln_1.register_forward_hook(lambda *_: recomputed.append(1))
        if checkpointing:
            name = "activation_checkpointing_enable"
            enable = getattr(model, name, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return first_h(model, lambda m, e: m(input_ids=ids, labels=labels), probes=probes)

    recomputed = []
    plain = run(False)
    once = len(recomputed)
    assert_same(run(True), plain)
    assert len(recomputed) > once


def test_reentrant_checkpointing_is_refused_and_the_gradients_come_back():
    model = OwnLoss(checkpoint="reentrant")
    estimator = Hutchinson(model, fraction=1.0)
    optimizer = SophiaH(model.parameters(), estimator=estimator)
    model(torch.randn(4, 4), labels=torch.tensor([0, 1, 2, 0]))["loss"].backward()
    grads = [p.grad for p in model.parameters()]
    with pytest.raises(ValueError, match="cannot differentiate through reentrant gradient checkpointing: use use_re"):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def flash_attention(output):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*[output.view(1, 1, 4, 3)] * 3)


@pytest.mark.parametrize("operation", [Square.apply, flash_attention])
def test_an_operation_without_second_derivative_is_refused(operation):
    with pytest.raises(ValueError, match="second derivatives, and an operation of the model has none"):
        first_h(
            nn.Linear(4, 3),
            lambda m, e: m(torch.randn(4, 4)),
            loss=lambda output, batch: operation(output).square().mean(),
            units=1,
        )


def test_no_loss_and_sharded_parameters_and_bad_options_are_refused():
    model = OwnLoss()
    with pytest.raises(ValueError, match="found no loss in the output of OwnLoss: pass the labels"):
        first_h(model, lambda m, e: m(torch.randn(4, 4)))
    model.set_requires_gradient_sync = None
    with pytest.raises(ValueError, match="does not run on sharded parameters"):
        first_h(model, lambda m, e: m(torch.randn(4, 4)))
    for options, message in (({"probe": "normal"}, "probe must be one of"), ({"probes": 0}, "probes must be a whole")):
        with pytest.raises(ValueError, match=message):
            Hutchinson(OwnLoss(), **options)


def test_frozen_parameters_are_skipped_and_unused_and_flat_ones_get_zero():
    class Odd(OwnLoss):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2))
            self.linear = nn.Parameter(torch.ones(()))
            self.net[0].weight.requires_grad_(False)

        def forward(self, x, labels=None):
            return {"loss": super().forward(x, labels)["loss"] + self.linear}

    torch.manual_seed(0)
    model = Odd()
    optimizer = SophiaH(model.parameters(), lr=0.0, betas=(0.9, 0.0), estimator=Hutchinson(model, fraction=1.0))
    model(torch.randn(4, 4), labels=torch.tensor([0, 1, 2, 0]))["loss"].backward()
    optimizer.step()
    h = {n: optimizer.state[p].get("hessian") for n, p in model.named_parameters()}
    assert h["net.0.weight"] is None
    assert not h["unused"].any() and not h["linear"].any() and h["net.2.weight"].any()


def test_a_loss_without_curvature_gives_zero():
    model = nn.Linear(3, 2)
    diagonal = first_h(model, lambda m, e: m(torch.randn(4, 3)), loss=lambda output, batch: output.mean())
    assert not any(d.any() for d in diagonal.values())


def test_a_masked_window_makes_no_estimate_and_a_masked_unit_adds_nothing():
    torch.manual_seed(0)
    model = OwnLoss().double()
    estimator = Hutchinson(model, fraction=1.0, units=1)
    estimator.arm(True)
    (masked, full) = batches_of([(3, 3), (4, 0)])
    model(masked[0], labels=masked[1])
    assert estimator.estimate(list(model.parameters()), 0).dropped == "every label of the rows that it used is masked"
    estimator.arm(True)
    for x, labels in (full, masked):
        model(x, labels=labels)
    both = estimator.estimate(list(model.parameters()), 0)
    assert both.num_predictions == 4
    assert_same(both.diagonal, first_h(model, lambda m, e: m(full[0], labels=full[1]), units=1))


def test_an_estimate_of_minus_infinity_is_dropped():
    model = OwnLoss()
    total = DiagonalSum(list(model.parameters()), model, None)
    total.count(3)
    total.add({model.net[0].bias: torch.tensor([0.0, 1.0, -torch.inf, 2.0, 0.0])})
    assert total.reduced(True, "").dropped == "its sum over the batch was not finite"


def test_bf16_parameters_get_float32_estimates():
    torch.manual_seed(0)
    ((x, labels),) = batches_of([(8, 2)])
    torch.manual_seed(0)
    half = first_h(OwnLoss().bfloat16(), lambda m, e: m(x.bfloat16(), labels=labels), probes=4)
    torch.manual_seed(0)
    full = first_h(OwnLoss(), lambda m, e: m(x.float(), labels=labels), probes=4)
    assert all(d.dtype == torch.float32 for d in half.values())
    assert (flat(half.values()) - flat(full.values())).norm() < 0.05 * flat(full.values()).norm()


class Messy(OwnLoss):
    """Dropout, running statistics and a counter."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, labels=None):
        self.calls += 1
        return super().forward(x, labels)


def test_the_pass_changes_nothing_but_h_and_keeps_no_graph():
    torch.manual_seed(0)
    model = Messy()
    optimizer = SophiaH(model.parameters(), lr=0.0, weight_decay=0.0, estimator=Hutchinson(model, fraction=1.0))
    model(torch.randn(8, 4), labels=torch.randint(3, (8,)))["loss"].backward()
    grads = {p: p.grad.clone() for p in model.parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    rng = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.stats()["hessian_updates"] == 1 and torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(p.grad, g) and p.grad.grad_fn is None for p, g in grads.items())
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert all(not optimizer.state[p]["hessian"].requires_grad for p in model.parameters())


def test_sophia_h_is_sophia_g_with_its_own_rho():
    model = nn.Linear(2, 2)
    g, h = SophiaG(model.parameters(), lr=1e-3), SophiaH(model.parameters(), lr=1e-3, hessian_interval=7)
    assert isinstance(h, SophiaG) and (h.defaults["rho"], h.defaults["hessian_interval"]) == (0.01, 7)
    changed = {"rho", "hessian_interval"}
    assert {k: v for k, v in g.defaults.items() if k not in changed} == {
        k: v for k, v in h.defaults.items() if k not in changed
    }
    estimator = GaussNewtonBartlett(model)
    assert SophiaH(model.parameters(), estimator=estimator).estimator is estimator
