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
