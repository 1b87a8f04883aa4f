"""The first ĥ of a plain Trainer against a reference written by hand: own shift, own mask, own sum."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import (
    VOCABULARY,
    first_hessian,
    hand_estimate,
    make_trainer,
    sophia_of,
    tiny_model,
    token_rows,
)
from transformers import TrainingArguments

BETA2 = 0.99
_NEW = "activation_checkpointing"
CHECKPOINTING = _NEW if _NEW in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"


def ordered_rows(rows, seen):
    """The dataset rows whose input_ids the trainer saw, in its own order."""
    by_ids = {tuple(r["input_ids"].tolist()): r for r in rows}
    return [by_ids[tuple(ids.tolist())] for ids in seen]


def first_step(tmp_path, model, rows, **arguments):
    """Run one step; return h and the hand-written (1 − β₂) ĥ at the initial weights."""
    seen = []
    initial = copy.deepcopy(model)
    model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["input_ids"]) if m.training and len(seen) < accumulation else None,
        with_kwargs=True,
    )
    accumulation = arguments.get("gradient_accumulation_steps", 1)
    trainer = make_trainer(
        tmp_path, model=model, data=rows, fixed_labels=True, max_steps=1, logging_steps=1, **arguments
    )
    trainer.train()
    assert sophia_of(trainer).stats()["hessian_updates"] == 1
    expected = hand_estimate(initial, ordered_rows(rows, torch.cat(seen)))
    return first_hessian(trainer), {n: (1 - BETA2) * v for n, v in expected.items()}


def assert_same(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max()
        assert (actual[name] - value).abs().max() <= tolerance * scale, name
    assert max(v.abs().max() for v in expected.values()) > 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_prompt_masks_and_accumulation(tmp_path, kind, accumulation):
    actual, expected = first_step(
        tmp_path,
        tiny_model(kind),
        token_rows(),
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2,
    )
    assert_same(actual, expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_label_smoothing_keeps_the_labels_from_the_model_but_not_from_the_pass(tmp_path, kind):
    actual, expected = first_step(tmp_path, tiny_model(kind), token_rows(), label_smoothing_factor=0.1)
    assert_same(actual, expected)


def test_compute_loss_func(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs.logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1))

    actual, expected = first_step(tmp_path, tiny_model(), token_rows(), compute_loss_func=loss)
    assert_same(actual, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tmp_path, reentrant):
    actual, expected = first_step(
        tmp_path,
        tiny_model("llama"),
        token_rows(),
        **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}},
    )
    assert_same(actual, expected)


def test_bf16_autocast(tmp_path):
    actual, expected = first_step(tmp_path, tiny_model("llama"), token_rows(), bf16=True)
    for name, value in expected.items():
        assert (actual[name] - value).abs().sum() <= 0.1 * value.abs().sum(), name


def test_gradient_clipping_does_not_touch_the_estimate(tmp_path):
    actual, expected = first_step(tmp_path, tiny_model(), token_rows(), max_grad_norm=1e-3)
    assert_same(actual, expected)


def test_one_process_accumulation_and_two_processes_agree(tmp_path, ddp_ranks):
    rows = token_rows()
    together, expected = first_step(tmp_path / "a", tiny_model(), rows, per_device_train_batch_size=4)
    assert_same(together, expected)
    split, _ = first_step(
        tmp_path / "b", tiny_model(), rows, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    ranks = ddp_ranks["causal"]
    assert ranks[0]["distributed"].endswith("MULTI_CPU")
    assert_same(split, together)
    for rank in ranks:
        assert_same(rank["h"], together)
    for name, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][name]), name


def test_a_rank_whose_labels_are_all_masked_joins_with_zeros(ddp_ranks):
    ranks = ddp_ranks["masked"]
    assert ranks[0]["updates"] == ranks[1]["updates"] == 2
    for name, value in ranks[0]["h"].items():
        assert torch.equal(value, ranks[1]["h"][name]) and torch.isfinite(value).all()
