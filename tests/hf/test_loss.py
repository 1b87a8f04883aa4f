"""The loss that a Trainer trains is compared with the likelihood: another one is refused, known scales stay quiet."""

import pytest
import torch
import torch.nn.functional as F
from support import make_trainer, sophia_of, tiny_model, token_rows
from tiny_heads import classifier, rows_for
from transformers import Trainer

from sophia_integrations import GaussNewtonBartlett
from sophia_integrations.curvature.tap import MicroBatch
from sophia_integrations.hf.readouts import CausalLMReadout

REFUSED = "training loss is not the mean negative log-likelihood.*weighs one prediction.*readout=.*Hutchinson"


class Weighted(Trainer):
    """A thousand times the loss, and half of the classes a hundredfold."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        if logits.ndim == 3:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        weight = torch.ones(logits.shape[-1])
        weight[::2] = 100.0
        return 1000 * F.cross_entropy(logits, labels, weight=weight)


def focal(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    log_p = logits.log_softmax(-1)[targets != -100].gather(-1, targets[targets != -100, None])
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def sharper(model):
    """A model whose predictions differ: at random weights all of them are near uniform."""
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


@pytest.mark.parametrize("bf16", [False, True])
def test_class_weights_in_compute_loss_are_refused(tmp_path, bf16):
    trainer = make_trainer(tmp_path, bf16=bf16)
    trainer.__class__ = Weighted
    with pytest.raises(ValueError, match=REFUSED):
        trainer.train()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_focal_loss_through_compute_loss_func_is_refused(tmp_path, bf16):
    with pytest.raises(ValueError, match=REFUSED):
        make_trainer(tmp_path, model=sharper(tiny_model()), compute_loss_func=focal, bf16=bf16).train()


def test_class_weights_of_a_classifier_are_refused(tmp_path):
    model = classifier()
    trainer = make_trainer(tmp_path, model=model, data=rows_for(model), per_device_train_batch_size=8)
    trainer.__class__ = Weighted
    with pytest.raises(ValueError, match=REFUSED):
        trainer.train()


QUIET = {
    "plain": {},
    "bf16": {"bf16": True},
    "smoothed": {"label_smoothing_factor": 0.1},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing(_kwargs)?. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", QUIET)
def test_the_loss_of_the_model_is_heard_and_stays_quiet(tmp_path, name):
    """Warnings are errors here; and the witness did hear something each time."""
    trainer = make_trainer(tmp_path, model=sharper(tiny_model("llama")), max_steps=6, **QUIET[name])
    trainer.create_optimizer()
    readout, heard = sophia_of(trainer).estimator.readout, []
    original = readout.ask
    readout.ask = lambda batch: heard.append(original(batch)) or heard[-1]
    trainer.train()
    counts = {int(h.counts.sum()) for h in heard}
    assert len(heard) == 2 * QUIET[name].get("gradient_accumulation_steps", 1) and min(counts) > 0
    assert all(h.complaint is None and h.class_dim == 2 and h.weight > 0 for h in heard)


def test_the_trainers_mask_and_the_witness_agree_on_every_row(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.create_optimizer()
    estimator, estimates = sophia_of(trainer).estimator, []
    seen, original, estimate = [], estimator.readout.ask, estimator.estimate
    estimator.readout.ask = lambda batch: seen.append((batch, original(batch))) or seen[-1][1]
    estimator.estimate = lambda *a: estimates.append(estimate(*a)) or estimates[-1]
    trainer.train()
    (batch, heard), labels = seen[0], seen[0][0].kwargs["labels"]
    assert torch.equal(heard.counts[:, :-1], labels[:, 1:] != -100) and not heard.counts[:, -1].any()
    assert estimates[0].num_predictions == int((labels[:, 1:] != -100).sum())
    assert heard.weight == pytest.approx(1 / int(batch.kwargs["num_items_in_batch"]), rel=1e-4)


def test_shift_labels_lie_one_to_the_left_of_labels():
    """`shift_labels` come moved already, and the last of them counts: it may be the first label of another rank.

    Behind virtual tokens the first label has a position before it, and counts where the labels themselves are given.
    """
    labels = torch.tensor([[-100, 5, 6, 7], [4, 5, -100, 7]])
    shifted = torch.tensor([[5, 6, 7, -100], [5, -100, 7, -100]])
    model = tiny_model()
    for virtual in (0, 2):
        readout = CausalLMReadout(virtual_tokens=virtual)
        for given in ({"labels": labels}, {"shift_labels": shifted}, {"labels": labels, "shift_labels": shifted}):
            batch = MicroBatch((), {"input_ids": labels.clamp(min=0), **given}, None, None)
            wanted = F.pad(shifted, (virtual, 0), value=-100)
            if "shift_labels" not in given:
                wanted = F.pad(labels, (virtual, 1), value=-100)[:, 1:]
            assert torch.equal(readout.aligned(readout.labels(model, batch)), wanted)


def test_shift_labels_give_the_estimate_of_labels():
    rows = token_rows(4)
    labels, ids = (torch.stack([row[name] for row in rows]) for name in ("labels", "input_ids"))
    diagonals = []
    for given in ({}, {"shift_labels": F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()}):
        model = tiny_model("llama").train()
        estimator = GaussNewtonBartlett(model, fraction=1.0, units=2)
        estimator.arm(True)
        model(input_ids=ids, labels=labels, **given).loss.backward()
        estimate = estimator.estimate(list(model.parameters()), 0)
        diagonals.append((estimate.num_predictions, [d.clone() for d in estimate.diagonal.values()]))
    assert diagonals[0][0] == diagonals[1][0] == int((labels[:, 1:] != -100).sum())
    assert all(torch.equal(a, b) for a, b in zip(diagonals[0][1], diagonals[1][1], strict=True))


def test_arguments_without_rows_stay_whole_whatever_their_length():
    ids, mask, axes = torch.arange(8).view(2, 4), torch.ones(2, 3), torch.arange(16).view(2, 2, 4)
    named = {"head_mask": mask, "input_ids": ids, "position_ids": axes, "cache_position": torch.arange(2)}
    model, readout = tiny_model(), CausalLMReadout()
    batch = MicroBatch((), named, None, None)
    assert readout.num_rows(model, batch) == 2
    part = readout.rows(model, batch, torch.tensor([1])).kwargs
    assert part["head_mask"] is mask and part["cache_position"] is named["cache_position"]
    assert torch.equal(part["input_ids"], ids[1:]) and torch.equal(part["position_ids"], axes[:, 1:])
    positional = MicroBatch((ids,), {"labels": ids}, None, None)
    assert torch.equal(readout.rows(model, positional, torch.tensor([1])).args[0], ids[1:])
