"""A step has the same gradients however its rows are split, whether or not the model heeds `num_items_in_batch`."""

import contextlib
import inspect
import sys
import warnings

import pytest
import torch
from support import first_momentum, make_trainer, tiny_model
from tiny_heads import classifier, rows_for, t5
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from sophia_integrations.hf import SophiaTrainer, SophiaTrainerMixin
from sophia_integrations.hf.loss_scale import divide_once, divide_where_the_model_does_not

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


def test_processes_count_as_micro_batches_do(tmp_path, ddp_ranks):
    whole = first_gradients(tmp_path, classifier(), 1)
    first, second = ddp_ranks["classifier"]
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


class As446(Trainer):
    """The step of transformers 4.46 and 4.47, which divides what it returns by the micro-batches, and no gradient."""

    divisors, fails = (), False

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.divisors = (*self.divisors, self.accelerator.gradient_accumulation_steps)
        if self.fails:
            raise ZeroDivisionError
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach() / self.args.gradient_accumulation_steps


class With446(SophiaTrainerMixin, As446):
    pass


def with_446(folder, monkeypatch, version, model=None, **options):
    """A Trainer with four micro-batches a step, and the step of 4.46, which believes that it is `version`."""
    loss = {name: options.pop(name) for name in ("compute_loss_func",) if name in options}
    model = model or classifier()
    options = {"max_steps": 1, "max_grad_norm": 1e9, "gradient_accumulation_steps": 4, **options}
    args = make_trainer(folder, model=model, per_device_train_batch_size=ROWS // 4, **options).args
    trainer = With446(model, args, train_dataset=rows_for(model), **loss)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    return trainer


@pytest.mark.filterwarnings("ignore:BertForSequenceClassification ignores num_items_in_batch")
@pytest.mark.parametrize("version", ["4.46.0", "4.46.3", "4.47.1", "4.48.0", "4.460.0", "5.23.0"])
def test_the_gradients_that_4_46_and_4_47_forget_to_divide(tmp_path, monkeypatch, version):
    whole = first_gradients(tmp_path, classifier(), 1)
    trainer = with_446(tmp_path, monkeypatch, version)
    trainer.train()
    forgotten = version.startswith(("4.46.", "4.47."))
    assert trainer.divisors == ((4,) * 4 if forgotten else (1,) * 4)
    assert trainer.accelerator.gradient_accumulation_steps == 1
    assert_same({name: (1 if forgotten else 4) * value for name, value in whole.items()}, first_momentum(trainer))


def test_4_46_and_4_47_divide_a_loss_that_somebody_else_scales_once(tmp_path, monkeypatch):
    """The model that heeds the count, or a loss function of the user's, has divided already."""
    causal = with_446(tmp_path, monkeypatch, "4.46.3", tiny_model())
    assert causal.model_accepts_loss_kwargs
    causal.train()

    def own(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    users = with_446(tmp_path, monkeypatch, "4.46.3", compute_loss_func=own)
    users.model_accepts_loss_kwargs = False
    users.train()
    assert causal.divisors == users.divisors == (1,) * 4


@pytest.mark.filterwarnings("ignore:BertForSequenceClassification ignores num_items_in_batch")
def test_a_step_that_fails_leaves_accelerate_as_it_was(tmp_path, monkeypatch):
    trainer = with_446(tmp_path, monkeypatch, "4.46.3")
    trainer.fails = True
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.divisors == (4,) and trainer.accelerator.gradient_accumulation_steps == 1


def batch_of(model, masked=False):
    rows = rows_for(model)[:2]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return {**batch, "labels": torch.full_like(batch["labels"], -100)} if masked else batch


def started(folder, model):
    """A Trainer that leaves the division to its model, as transformers 5 does with every model here."""
    trainer = make_trainer(folder, model=model, data=rows_for(model), gradient_accumulation_steps=2)
    trainer.model_accepts_loss_kwargs = True
    return trainer


@pytest.mark.parametrize(("build", "needed"), [(classifier, True), (t5, True), (tiny_model, False)])
def test_a_batch_without_labels_tells_nothing_and_the_next_one_is_tried(tmp_path, build, needed):
    """All labels masked, the loss is nan for the mean of none, and 0 for a sum divided by the count."""
    trainer = started(tmp_path, build())
    masked, labelled = batch_of(trainer.model, masked=True), batch_of(trainer.model)
    assert divide_where_the_model_does_not(trainer, masked) is None
    divide_once(trainer, masked, torch.tensor(4))
    assert trainer.model_accepts_loss_kwargs and not trainer._sophia_loss_scale_is_known
    with pytest.warns(UserWarning, match="ignores num_items") if needed else contextlib.nullcontext():
        divide_once(trainer, labelled, torch.tensor(4))
    assert trainer.model_accepts_loss_kwargs is not needed and trainer._sophia_loss_scale_is_known
    trainer.compute_loss = None  # from now on it is not tried again
    divide_once(trainer, labelled, torch.tensor(4))


@pytest.mark.parametrize(
    ("other", "needed"), [({"told": False, "differs": False}, None), ({"told": True, "differs": False}, True),
                          ({"told": True, "differs": True}, False)],
)  # fmt: skip
def test_a_process_without_labels_hears_it_from_another(tmp_path, monkeypatch, other, needed):
    trainer = started(tmp_path, classifier())
    row = torch.tensor([[other["differs"], other["told"]]])
    monkeypatch.setattr(trainer.accelerator, "gather", lambda own: torch.cat([own, row]))
    assert divide_where_the_model_does_not(trainer, batch_of(trainer.model, masked=True)) is needed
    assert trainer.model_accepts_loss_kwargs is (needed is not True)


def test_one_process_whose_loss_heeds_the_count_decides_for_all(tmp_path, monkeypatch):
    trainer = started(tmp_path, tiny_model())
    ignores = torch.tensor([[False, True]])
    monkeypatch.setattr(trainer.accelerator, "gather", lambda own: torch.cat([ignores, own]))
    assert divide_where_the_model_does_not(trainer, batch_of(trainer.model)) is False


def test_nothing_is_tried_where_nothing_is_divided(tmp_path):
    """One micro-batch a step on one process, or no count from the Trainer."""
    for accumulation, count in ((1, torch.tensor(4)), (2, None)):
        trainer = started(tmp_path, classifier())
        trainer.args.gradient_accumulation_steps = accumulation
        divide_once(trainer, batch_of(trainer.model), count)
        assert trainer.model_accepts_loss_kwargs and not hasattr(trainer, "_sophia_loss_scale_is_known")
