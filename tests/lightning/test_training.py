"""Sophia in the ways that Lightning trains: manual steps, precision plugins, compilation, clipping, logs."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.pytorch.plugins.precision import MixedPrecision
from support import VOCABULARY, tiny_model
from torch import nn
from workers.lightning_support import (
    FILTERS,
    Classifier,
    LanguageModel,
    Record,
    causal_lm,
    make_trainer,
    row_loader,
    sophia_of,
    token_loader,
)

from sophia_integrations import GaussNewtonBartlett, SophiaG, SophiaH
from sophia_integrations.lightning import SophiaCallback

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]
STEPS, UPDATES = 12, 3


def updates(trainer):
    stats = sophia_of(trainer).stats()
    assert stats["hessian_skipped"] == 0
    return stats["hessian_updates"]


class Logs:
    """What reaches a logger, by step."""

    def __init__(self):
        self.seen = {}

    def logger(self):
        seen = self.seen

        class Memory(pl.loggers.logger.DummyLogger):
            def log_metrics(self, metrics, step=None):
                seen.setdefault(step, {}).update(metrics)

        return Memory()


def test_logs_come_every_n_steps_and_win_rate_is_in_the_progress_bar():
    logs = Logs()
    trainer = make_trainer(max_steps=12, logger=logs.logger(), log_every_n_steps=4, accumulate_grad_batches=2)
    trainer.fit(LanguageModel(), token_loader())
    keys = {"sophia/win_rate", "sophia/hessian_norm", "sophia/hessian_time_fraction"}
    logged = {step: values for step, values in logs.seen.items() if keys & values.keys()}
    assert sorted(logged) == [3, 7, 11]
    for values in logged.values():
        assert keys <= values.keys() and 0 <= values["sophia/win_rate"] <= 1
        assert values["sophia/hessian_norm"] > 0 and 0 < values["sophia/hessian_time_fraction"] < 1
    assert "sophia/win_rate" in trainer.progress_bar_metrics
    assert "sophia/hessian_norm" not in trainer.progress_bar_metrics


@pytest.mark.filterwarnings("ignore:Sophia made no Hessian estimate")
def test_dropped_estimates_are_logged():
    logs = Logs()
    trainer = make_trainer(max_steps=8, logger=logs.logger(), log_every_n_steps=1)
    module = Classifier()
    module.sophia_logits = lambda batch: (
        module.net(batch[0]),
        torch.full_like(batch[1], -100) if trainer.global_step == 5 else batch[1],
    )
    module.training_step = lambda batch, batch_idx: F.cross_entropy(module.net(batch[0]), batch[1])
    trainer.fit(module, row_loader())
    assert [step for step, values in logs.seen.items() if values.get("sophia/hessian_skipped")] == [5, 6, 7]


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


def test_each_micro_batch_is_remembered_once():
    class Count(pl.Callback):
        rows = None

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            tap = optimizer.estimator._tap
            if optimizer.hessian_due:
                self.rows = [batch.num_rows for batch in tap._remembered]
            else:
                assert not tap._remembered

    for module, loader in ((Classifier(), row_loader()), (LanguageModel(), token_loader())):
        count = Count()
        make_trainer(count, max_steps=STEPS, accumulate_grad_batches=3).fit(module, loader)
        assert count.rows == [4, 4, 4] or count.rows == [4, 4] or count.rows == [4]


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


@pytest.mark.parametrize("kind", ["model", "logits"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_precision(kind, precision):
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            inner = pl_module.model if kind == "model" else pl_module.net
            inner.register_forward_hook(lambda m, args, out: seen.append(observed(out)))

    def observed(out):
        logits = out.logits if hasattr(out, "logits") else out
        return logits.dtype, torch.get_default_dtype(), torch.is_autocast_enabled("cpu")

    module, loader = (LanguageModel(), token_loader()) if kind == "model" else (Classifier(), row_loader())
    trainer = make_trainer(Look(), max_steps=STEPS, precision=precision)
    trainer.fit(module, loader)
    assert updates(trainer) == UPDATES
    assert len(set(seen)) == 1 and len(seen) > STEPS  # the pass forwards as the training does
    half = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert next(module.parameters()).dtype == half
    wanted = torch.float64 if precision == "64-true" else torch.float32
    assert all(s["hessian"].dtype == wanted for s in sophia_of(trainer).state.values())


@pytest.mark.parametrize("kind", ["model", "logits"])
def test_16_mixed_with_a_gradient_scaler(kind):
    """The first steps overflow and are skipped, with the estimate; the scaled gradients leave no trace in h."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    module, loader = (LanguageModel(), token_loader()) if kind == "model" else (Classifier(), row_loader())
    plain = copy.deepcopy(module)
    trainer = make_trainer(max_steps=STEPS, plugins=[plugin])
    trainer.fit(module, loader)
    sophia = sophia_of(trainer)
    assert scaler.get_scale() < 2.0**26 and 0 < sophia.param_groups[0]["step"] < STEPS
    assert sophia.stats()["hessian_updates"] == math.ceil(sophia.param_groups[0]["step"] / 5)
    reference = make_trainer(max_steps=STEPS)
    reference.fit(plain, loader)
    norms = [o.stats()["hessian_norm"] / o.stats()["hessian_updates"] for o in (sophia, sophia_of(reference))]
    assert 0.3 < norms[0] / norms[1] < 3


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
