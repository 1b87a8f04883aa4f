"""The Hutchinson estimator against the exact Hessian diagonal, its exact noise, and what it must refuse."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracles import draws_of, flat, hessian, hutchinson_variance
from torch import nn

from sophia_integrations import GaussNewtonBartlett, Hutchinson, SophiaG, SophiaH


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


@pytest.mark.parametrize(("probe", "probes", "draws"), [("rademacher", 1, 600), ("rademacher", 4, 200)] + [("gaussian", 1, 800)])
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
    assert_same(first_h(model, lambda m, e: m(x, labels, 100)), inside)

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


@pytest.mark.parametrize(("make", "names"), [(gpt2, ("h.1.attn.c_attn.bias", "h.0.ln_1")), (llama, ("norm", "k_proj"))])
def test_hugging_face_models_with_sdpa_attention(make, names):
    model = make()
    ids, labels = token_rows()
    params = [p for n, p in model.named_parameters() if any(part in n for part in names)]
    loss = model(input_ids=ids, labels=labels).loss if make is llama else gpt2_eager_loss(model, ids, labels)
    first = flat(torch.autograd.grad(loss, params, create_graph=True))
    rows = [flat(torch.autograd.grad(g, params, retain_graph=True)) for g in first.unbind()] if False else None
    assert rows is None
