"""Every row of the table of heads: first ĥ of a plain Trainer against a loss written by hand, and a short training."""

import copy

import pytest
import torch
import transformers as hf
from support import assert_trained, first_hessian, make_trainer, sophia_of
from tiny_heads import CASES, FixedDraws, summed

from sophia_integrations.hf.heads import resolve_readout
from sophia_integrations.hf.readouts import CausalLMReadout, HeadReadout

BETA2 = 0.99


def build(name):
    case = CASES[name]
    torch.manual_seed(0)
    return case, case.build(), case.rows(torch.Generator().manual_seed(1))


def by_hand(case, model, rows):
    """Σ S² / N: one backward pass a row, or one for the batch where its rows depend on each other."""
    model = copy.deepcopy(model).train()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if case.whole_batch:
        logits = model(pixel_values=torch.stack([r["pixel_values"] for r in rows])).logits
        units = [summed(logits, torch.stack([r["labels"] for r in rows]))]
    else:
        units = [case.loss(model, row) for row in rows]
    total, n = {k: torch.zeros_like(p) for k, p in named.items()}, 0
    for loss, count in units:
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, g in zip(named, gradients, strict=True):
            total[name] += 0 if g is None else g.square()
        n += count
    return {name: s / n for name, s in total.items()}


def assert_first_estimate(trainer, expected, tolerance=1e-5):
    trainer.create_optimizer()
    readout = trainer.optimizer.estimator.readout
    readout.likelihood = FixedDraws(readout.likelihood)
    trainer.train()
    assert sophia_of(trainer).stats()["hessian_updates"] == 1
    actual = first_hessian(trainer)
    largest = max(v.abs().max() for v in expected.values())
    for name, value in actual.items():
        wanted = (1 - BETA2) * expected[name]
        assert (value - wanted).abs().max() <= tolerance * max(wanted.abs().max(), 1e-6 * largest), name
    assert largest > 0


@pytest.mark.parametrize("name", CASES)
def test_first_estimate(tmp_path, name):
    case, model, rows = build(name)
    expected = by_hand(case, model, rows)
    assert_first_estimate(make_trainer(tmp_path, model=model, data=rows, max_steps=1, logging_steps=1), expected)


@pytest.mark.parametrize("name", ["t5", "masked-lm", "token-classification", "single-label", "multiple-choice"])
def test_label_smoothing_keeps_the_labels_from_the_model_but_not_from_the_pass(tmp_path, name):
    case, model, rows = build(name)
    if name == "t5":  # as DataCollatorForSeq2Seq makes them
        for row in rows:
            row["decoder_input_ids"] = torch.cat([torch.tensor([0]), row["labels"].clamp(min=0)[:-1]])
    options = dict(max_steps=1, logging_steps=1, label_smoothing_factor=0.1)
    expected = by_hand(case, model, rows)
    assert_first_estimate(make_trainer(tmp_path, model=model, data=rows, **options), expected)


def test_the_table_names_what_it_refuses():
    heads = {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    double = hf.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16)
    prophet = hf.ProphetNetConfig(hidden_size=8, vocab_size=16, **heads, **layers)
    for name, config in (("GPT2DoubleHeadsModel", double), ("ProphetNetForCausalLM", prophet)):
        with pytest.raises(ValueError, match=f"loss of {name}; it knows causal.*readout="):
            resolve_readout(getattr(hf, name)(config))


def test_subclasses_follow_the_class_their_forward_comes_from():
    class Same(hf.BertForMaskedLM):
        pass

    class Another(hf.BertForMaskedLM):
        def forward(self, input_ids, labels=None):
            return super().forward(input_ids).logits.mean()

    class OwnForCausalLM(hf.LlamaPreTrainedModel):
        def forward(self, input_ids, labels=None):
            return None

    config = CASES["masked-lm"].build().config
    assert type(resolve_readout(Same(config))) is HeadReadout
    with pytest.raises(ValueError, match="loss of Another"):
        resolve_readout(Another(config))
    assert (
        type(
            resolve_readout(
                OwnForCausalLM(hf.LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
            )
        )
        is CausalLMReadout
    )
    assert resolve_readout(torch.nn.Linear(1, 1)) is None


@pytest.mark.parametrize("name", CASES)
def test_short_training(tmp_path, name):
    case, model, rows = build(name)
    trainer = make_trainer(
        tmp_path,
        model=model,
        data=rows,
        max_steps=8,
        learning_rate=5e-3,
        logging_steps=1,
        optim_args="hessian_interval=3,beta1=0.8",
    )
    assert_trained(trainer, updates=3)
