"""The precision plugins of Lightning: the pass forwards as the training does, and a GradScaler leaves no trace."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from workers.lightning_support import (
    FILTERS,
    Classifier,
    Draw,
    LanguageModel,
    make_trainer,
    row_loader,
    sophia_of,
    token_loader,
    updates,
)

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]
STEPS, UPDATES = 12, 3


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


class FirstEstimate(pl.Callback):
    """Keeps the step of the first estimate and its h, and ends the training there."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        sophia = sophia_of(trainer)
        if sophia.progress.hessian_updates:
            self.micro_batches = trainer.fit_loop.total_batch_idx + 1
            self.h = {n: sophia.state[p]["hessian"].clone() for n, p in pl_module.named_parameters()}
            trainer.should_stop = True


@pytest.mark.parametrize("kind", ["model", "logits"])
def test_16_mixed_with_a_gradient_scaler(kind):
    """The first steps overflow and are skipped, with the estimate; the scaled gradients leave no trace in h.

    Every step sees the same rows, and the labels are not drawn: the first estimate of both runs is one number.
    """
    module, loader = (LanguageModel(), token_loader) if kind == "model" else (Classifier(), row_loader)
    twin = copy.deepcopy(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    scaled, plain = FirstEstimate(), FirstEstimate()
    trainer = make_trainer(Draw(), scaled, max_epochs=STEPS, max_steps=-1, plugins=[plugin])
    trainer.fit(module, loader(rows=4))
    make_trainer(Draw(), plain, max_steps=1).fit(twin, loader(rows=4))
    assert scaler.get_scale() < 2.0**26 and scaled.micro_batches > plain.micro_batches == 1
    assert sophia_of(trainer).progress.step == 1 and updates(trainer) == 1
    for name, h in plain.h.items():
        assert (scaled.h[name] - h).abs().max() <= 0.02 * h.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["model", "logits"])
def test_estimates_follow_the_steps_that_a_gradient_scaler_lets_through(kind):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=1000)
    module, loader = (LanguageModel(), token_loader()) if kind == "model" else (Classifier(), row_loader())
    trainer = make_trainer(max_steps=STEPS, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    trainer.fit(module, loader)
    steps = sophia_of(trainer).progress.step
    skipped = round(26 - math.log2(scaler.get_scale()))  # every overflow halves the scale
    assert skipped > 0 and steps == STEPS - skipped
    assert updates(trainer) == math.ceil(steps / 5)
