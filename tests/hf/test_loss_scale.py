"""A step has the same gradients however its rows are split, whether or not the model heeds `num_items_in_batch`."""

import contextlib
import inspect
import warnings

import pytest
import torch
from support import first_momentum, make_trainer, run_worker, tiny_model
from tiny_heads import classifier, rows_for, t5
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from sophia_integrations.hf import SophiaTrainer

ROWS = 8


def first_gradients(folder, model, accumulation, **options):
    """The gradients of the first step, from the momentum that it leaves: m = (1 - beta1) g."""
    trainer = make_trainer(
        folder,
        model=model,
        data=rows_for(model),
        max_steps=1,
        max_grad_norm=1e9,
        per_device_train_batch_size=ROWS // accumulation,
        gradient_accumulation_steps=accumulation,
        **options,
    )
    trainer.train()
    return first_momentum(trainer)


def assert_same(whole, parts):
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert (parts[name] - value).abs().max() <= 1e-6 + 1e-4 * value.abs().max(), name


def test_processes_count_as_micro_batches_do(tmp_path):
    whole = first_gradients(tmp_path, classifier(), 1)
    run_worker("trainer_ddp", tmp_path, 1, "none", "classifier", processes=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert_same(first["m"], second["m"])
    assert_same(whole, first["m"])


@pytest.mark.parametrize("build", [classifier, t5])
def test_a_model_that_ignores_the_count_is_averaged_with_one_warning(tmp_path, build):
    torch.manual_seed(0)
    model = build()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    whole = first_gradients(tmp_path, model, 1)
    model.load_state_dict(weights)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = first_gradients(tmp_path, model, 4)
    assert_same(whole, parts)
    said = [str(w.message) for w in caught if "num_items_in_batch" in str(w.message)]
    counted = make_trainer(tmp_path, model=model, data=rows_for(model)).model_accepts_loss_kwargs
    assert len(said) == counted  # from transformers 5 on
    assert all(text.startswith(f"{type(model).__name__} ignores num_items_in_batch, and the Trainer") for text in said)


def test_a_causal_model_trains_as_ever(tmp_path):
    assert_same(first_gradients(tmp_path, tiny_model(), 1), first_gradients(tmp_path, tiny_model(), 4))


def test_label_smoothing_is_averaged_too(tmp_path):
    """Its loss heeds the count from transformers 5.15 on."""
    smoothing = dict(label_smoothing_factor=0.1)
    whole = first_gradients(tmp_path, tiny_model(), 1, **smoothing)
    heeded = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters
    counted = make_trainer(tmp_path).model_accepts_loss_kwargs
    said = (
        contextlib.nullcontext()
        if heeded or not counted
        else pytest.warns(UserWarning, match="^label smoothing ignores num_items")
    )
    with said:
        parts = first_gradients(tmp_path, tiny_model(), 4, **smoothing)
    assert_same(whole, parts)


def test_the_trial_changes_nothing_for_a_model_that_heeds_the_count(tmp_path):
    """Dropout draws the same numbers with and without the trial, and the mode of the model comes back."""
    from transformers.trainer_utils import set_seed

    losses = []
    for known in (False, True):
        set_seed(0)
        options = dict(max_steps=2, logging_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=2)
        trainer = make_trainer(tmp_path, model=tiny_model(resid_pdrop=0.3), **options)
        trainer._sophia_loss_scale_is_known = known
        trainer.train()
        assert trainer.model.training
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_a_loss_of_the_users_own_is_left_alone(tmp_path):
    class OwnLoss(SophiaTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    model = classifier()
    args = make_trainer(tmp_path, model=model, data=rows_for(model), max_steps=1, gradient_accumulation_steps=2).args
    trainer = OwnLoss(model, args, train_dataset=rows_for(model))
    before = trainer.model_accepts_loss_kwargs
    trainer.train()
    assert trainer.model_accepts_loss_kwargs == before
