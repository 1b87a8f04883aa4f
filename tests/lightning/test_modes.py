"""Sophia in the ways that Lightning trains: manual steps, clipping, two optimizers, compilation, Fabric."""

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from support import VOCABULARY, tiny_model
from torch import nn
from workers.lightning_support import (
    FILTERS,
    Classifier,
    LanguageModel,
    causal_lm,
    make_trainer,
    row_loader,
    sophia_of,
    token_loader,
    updates,
)

from sophia_integrations import GaussNewtonBartlett, SophiaG

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]
STEPS, UPDATES = 12, 3


class Manual(Classifier):
    """Several steps on each batch, by hand."""

    def __init__(self, steps_per_batch=1, **options):
        super().__init__(**options)
        self.automatic_optimization = False
        self.steps_per_batch = steps_per_batch

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(self.steps_per_batch):
            optimizer.zero_grad()
            logits, targets = self.sophia_logits(batch)
            self.manual_backward(F.cross_entropy(logits, targets))
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()


@pytest.mark.parametrize("steps_per_batch", [1, 3])
def test_manual_optimization(steps_per_batch):
    trainer = make_trainer(max_steps=STEPS)
    trainer.fit(Manual(steps_per_batch), row_loader())
    assert updates(trainer) == UPDATES


def test_manual_equals_automatic():
    weights = []
    for module, options in ((Manual(), {}), (Classifier(), {"gradient_clip_val": 1.0})):
        make_trainer(max_steps=STEPS, **options).fit(module, row_loader())
        weights.append([p.detach() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_clipping_changes_the_gradient_but_not_the_estimate():
    hessians = []
    for clip in (None, 1e-3):
        module = Classifier()
        trainer = make_trainer(max_steps=1, gradient_clip_val=clip)
        trainer.fit(module, row_loader())
        hessians.append([sophia_of(trainer).state[p]["hessian"] for p in module.net.net.parameters()])
        norm = torch.stack([sophia_of(trainer).state[p]["exp_avg"].norm() for p in module.net.net.parameters()]).norm()
        assert (norm < 1e-3) == (clip is not None)
    assert all(torch.equal(a, b) for a, b in zip(*hessians, strict=True))


def test_two_optimizers_one_of_them_sophia():
    class Two(Manual):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(6, VOCABULARY)

        def training_step(self, batch, batch_idx):
            super_loss = F.cross_entropy(self.other(batch[0]), batch[1])
            adam, sophia = self.optimizers()
            for optimizer, loss in ((adam, super_loss), (sophia, F.cross_entropy(*self.sophia_logits(batch)))):
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self):
            adam = torch.optim.AdamW(self.other.parameters())
            return [adam, SophiaG(self.net.parameters(), **self.options)]

    trainer = make_trainer(max_steps=2 * STEPS)
    module = Two()
    trainer.fit(module, row_loader())
    assert updates(trainer) == UPDATES
    assert "hessian" not in trainer.optimizers[0].state[module.other.weight]


def test_gradient_checkpointing_changes_nothing():
    weights = []
    for checkpointing in (False, True):
        module = causal_lm(gradient_checkpointing=checkpointing)
        assert any(getattr(m, "gradient_checkpointing", False) for m in module.modules()) == checkpointing
        trainer = make_trainer(max_steps=STEPS)
        trainer.fit(module, token_loader())
        assert updates(trainer) == UPDATES
        weights.append([p.detach() for p in module.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


class Silent(LanguageModel):
    """Without `self.log`, which dynamo cannot trace."""

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss


@pytest.mark.parametrize("what", ["module", "submodule"])
@pytest.mark.parametrize("kind", [pytest.param("model", marks=pytest.mark.slow), "logits"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled(kind, what):
    def train(what):
        torch._dynamo.reset()
        module, loader = (Silent(), token_loader()) if kind == "model" else (Classifier(), row_loader())
        given = module
        if what == "module":
            given = torch.compile(module, backend="aot_eager")
        elif what == "submodule":
            name = "model" if kind == "model" else "net"
            setattr(module, name, torch.compile(getattr(module, name), backend="aot_eager"))
        trainer = make_trainer(max_steps=7)
        trainer.fit(given, loader)
        assert updates(trainer) == 2
        return [sophia_of(trainer).state[p]["hessian"] for p in module.parameters() if p in sophia_of(trainer).state]

    for a, b in zip(train(what), train("eager"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_fabric():
    """Fabric has no callbacks: the estimator goes into the optimizer, before `setup` wraps both."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    raw = tiny_model()
    model, optimizer = fabric.setup(raw, SophiaG(raw.parameters(), lr=1e-3, estimator=GaussNewtonBartlett(raw)))
    losses = []
    for batch in [*fabric.setup_dataloaders(token_loader())] * 2:
        loss = model(**batch).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert optimizer.optimizer.stats()["hessian_updates"] == 4 and losses[-1] < losses[0]
