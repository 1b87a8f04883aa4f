"""The Hessian pass inside a Lightning step: what it sees, what it leaves alone, which estimator makes it."""

from importlib import metadata

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from support import hand_estimate, token_rows
from torch import nn
from workers.lightning_support import (
    FILTERS,
    Classifier,
    Draw,
    LanguageModel,
    Record,
    hessian_of,
    make_trainer,
    row_loader,
    rows_remembered,
    sophia_of,
    token_loader,
    updates,
)

from sophia_integrations import SophiaH
from sophia_integrations.lightning import SophiaCallback

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]
STEPS, UPDATES = 12, 3


def test_the_pass_leaves_gradients_buffers_and_random_numbers_alone():
    class WithNorm(Classifier):
        def __init__(self, **options):
            super().__init__(**options)
            self.norm = nn.BatchNorm1d(6)
            self.dropout = nn.Dropout(0.5)

        def sophia_logits(self, batch):
            return self.net(self.dropout(self.norm(batch[0]))), batch[1]

    class Compare(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            estimator = sophia_of(trainer).estimator
            original = estimator.estimate

            def checked(params, step):
                before = self.state(pl_module)
                result = original(params, step)
                assert str(before) == str(self.state(pl_module))
                self.checked = True
                return result

            estimator.estimate = checked

        def state(self, module):
            grads = [None if p.grad is None else p.grad.tolist() for p in module.parameters()]
            buffers = [b.tolist() for b in module.buffers()]
            return grads, buffers, torch.get_rng_state().tolist(), [m.training for m in module.modules()]

    compare = Compare()
    trainer = make_trainer(compare, max_steps=STEPS)
    trainer.fit(WithNorm(), row_loader())
    assert compare.checked and updates(trainer) == UPDATES


@pytest.mark.parametrize(
    ("build", "loader", "last_window"), [(Classifier, row_loader, 2), (LanguageModel, token_loader, 1)]
)
def test_each_micro_batch_is_remembered_once(build, loader, last_window):
    """k = 5, windows of 3: step 5 is the shorter one at the end of an epoch of 8 or 16 micro-batches of 4 rows."""
    due = []

    class Count(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if optimizer.hessian_due:
                due.append((optimizer.progress.step, rows_remembered(optimizer)))
            else:
                assert not rows_remembered(optimizer)

    make_trainer(Count(), max_steps=STEPS, accumulate_grad_batches=3).fit(build(), loader())
    assert due == [(0, [4] * 3), (5, [4] * last_window), (10, [4] * 3)]


def test_labels_kept_from_the_model_are_noted():
    class Outside(LanguageModel):
        def training_step(self, batch, batch_idx):
            logits = self.model(input_ids=batch["input_ids"]).logits[:, :-1]
            return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    hessians = []
    for module in (LanguageModel(), Outside()):
        trainer = make_trainer(max_steps=1)
        trainer.fit(module, token_loader())
        hessians.append([sophia_of(trainer).state[p]["hessian"] for p in module.parameters()])
    for a, b in zip(*hessians, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("kind", ["model", "logits"])
@pytest.mark.filterwarnings("ignore:Sophia made no Hessian")
def test_sophia_h_gets_hutchinson(kind):
    cls = LanguageModel if kind == "model" else Classifier

    class WithH(cls):
        def configure_optimizers(self):
            return SophiaH(self.parameters(), **self.options)

    trainer = make_trainer(max_steps=STEPS)
    trainer.fit(WithH(), token_loader() if kind == "model" else row_loader())
    assert type(sophia_of(trainer).estimator).__name__ == "Hutchinson" and updates(trainer) == UPDATES


def test_fitting_twice_builds_a_new_pass():
    module, callback, record = LanguageModel(), SophiaCallback(), Record()
    for _ in range(2):
        trainer = make_trainer(record, sophia=callback, max_steps=STEPS)
        trainer.fit(module, token_loader())
        assert updates(trainer) == UPDATES
    assert record.losses[-1] < record.losses[0]


class Both(LanguageModel):
    """Logits in two places: a method, and a transformers model."""

    def sophia_logits(self, batch):
        return self.model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]


@pytest.mark.parametrize("place", ["argument", "method", "model"])
def test_logits_are_looked_for_in_the_documented_order(place):
    module = LanguageModel() if place == "model" else Both()
    sophia = SophiaCallback("model" if place == "argument" else None, fraction=1.0, units=64)
    trainer = make_trainer(Draw(), sophia=sophia)
    expected = hand_estimate(module.model, token_rows()[:4])
    trainer.fit(module, token_loader())
    watched = sophia_of(trainer).estimator.model
    assert (type(watched).__name__ == "BatchLogits") == (place == "method")
    assert place == "method" or watched is module.model
    for name, h in hessian_of(trainer, module).items():
        torch.testing.assert_close(h, expected[name.removeprefix("model.")], rtol=1e-5, atol=1e-9)


def test_no_trainer_gets_the_callback_unasked():
    """Lightning would load a `callbacks_factory` entry point into every Trainer of every user."""
    shipped = metadata.entry_points(group="lightning.pytorch.callbacks_factory")
    assert not [entry for entry in shipped if entry.value.startswith("sophia_integrations")]
    assert not any("Sophia" in type(callback).__name__ for callback in make_trainer(sophia="none").callbacks)
