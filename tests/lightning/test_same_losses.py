"""The same data, seed and model give the same losses in a bare loop, in the Trainer and in Lightning."""

import pytest
import torch
from support import make_trainer as make_hf_trainer
from support import sophia_of as sophia_of_hf
from support import tiny_model, token_rows
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, get_cosine_schedule_with_warmup
from workers.lightning_support import FILTERS, Record, causal_lm, make_trainer, sophia_of

from sophia_integrations import GaussNewtonBartlett, SophiaG
from sophia_integrations.lightning import SophiaCallback

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]
STEPS, WARMUP, ROWS, LR = 20, 4, 80, 3e-3
OPTIONS = dict(lr=LR, rho=0.05, weight_decay=0.1, hessian_interval=5)


def rows():
    """The Trainer divides by all labels that are not masked, also a row's first, which no position predicts."""
    data = token_rows(ROWS)
    for row in data:
        row["labels"][0] = -100
    return data


def bare():
    model = tiny_model()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    estimator = GaussNewtonBartlett(model, fraction=0.5, units=2, seed=3)
    optimizer = SophiaG(groups, **OPTIONS, estimator=estimator)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses = []
    for batch in DataLoader(rows(), batch_size=4):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


def hugging_face(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self, *_: SequentialSampler(self.train_dataset))
    trainer = make_hf_trainer(
        tmp_path,
        data=rows(),
        learning_rate=LR,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        weight_decay=0.1,
        max_grad_norm=1.0,
        max_steps=STEPS,
        logging_steps=1,
        seed=3,
        optim_args="rho=0.05,hessian_interval=5,hessian_fraction=0.5,hessian_units=2",
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, sophia_of_hf(trainer)


def lightning():
    module, record = causal_lm(warmup_steps=WARMUP, schedule="cosine", **OPTIONS), Record()
    sophia = SophiaCallback(fraction=0.5, units=2, seed=3)
    trainer = make_trainer(record, sophia=sophia, max_steps=STEPS, gradient_clip_val=1.0)
    trainer.fit(module, DataLoader(rows(), batch_size=4))
    return record.losses, sophia_of(trainer)


def test_three_loops_give_the_same_losses(tmp_path, monkeypatch):
    expected, optimizer = bare()
    assert len(expected) == STEPS and optimizer.stats()["hessian_updates"] == 4
    for losses, other in (hugging_face(tmp_path, monkeypatch), lightning()):
        assert losses == pytest.approx(expected, abs=1e-5)
        assert other.stats()["hessian_updates"] == 4 and other.stats()["hessian_skipped"] == 0
        norms = [float(o.stats()["hessian_norm"]) for o in (other, optimizer)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
