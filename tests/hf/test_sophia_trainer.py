"""SophiaTrainer and its mixin, the callback given by hand, optimizers built by hand, and unusual trainers."""

import copy
import subprocess
import sys

import pytest
import torch
from support import assert_trained, make_trainer, sophia_of, tiny_model, token_rows
from transformers import Trainer, TrainerCallback, TrainingArguments

from sophia_integrations import GaussNewtonBartlett, Hutchinson, SophiaG, SophiaH
from sophia_integrations.hf import SophiaCallback, SophiaTrainer, SophiaTrainerMixin
from sophia_integrations.hf.readouts import ProblemTypeLikelihood

KEYS = {"sophia/win_rate", "sophia/hessian_norm", "sophia/hessian_time_fraction"}


def arguments(folder, **options):
    defaults = dict(optim="sophia", optim_args="hessian_interval=3", max_steps=8, learning_rate=1e-3, seed=3)
    common = dict(logging_steps=2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True)
    return TrainingArguments(str(folder), per_device_train_batch_size=4, **{**defaults, **common, **options})


class Reporter(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def notes_of(trainer):
    """The labels that the estimator is told, call by call."""
    trainer.create_optimizer()
    estimator, notes = sophia_of(trainer).estimator, []
    original = estimator.note_labels
    estimator.note_labels = lambda labels: notes.append(labels) or original(labels)
    return notes


class Mine(SophiaTrainerMixin, Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("cls", [SophiaTrainer, Mine, Trainer])
def test_each_way_trains_the_same_and_notes_labels_once(tmp_path, cls):
    reporter = Reporter()
    data = token_rows(8)
    trainer = cls(model=tiny_model(), args=arguments(tmp_path), train_dataset=data, callbacks=[reporter])
    notes = notes_of(trainer)
    assert_trained(trainer, updates=3)
    assert [n is None for n in notes] == [False, True] * 8
    assert sum(KEYS <= entry.keys() for entry in reporter.logs) == 4
    assert sum(isinstance(c, SophiaCallback) for c in trainer.callback_handler.callbacks) == 1


def test_the_trainer_class_works_without_the_registration_of_the_methods(tmp_path):
    code = f"""
import sophia_integrations, transformers.trainer as t, sys
sys.path.insert(0, {str(__import__("support").TESTS)!r})
from transformers import Trainer, TrainingArguments
from sophia_integrations.hf import SophiaTrainer, SophiaCallback
Trainer.training_step = Trainer.training_step.__wrapped__
Trainer.get_optimizer_cls_and_kwargs = staticmethod(Trainer.get_optimizer_cls_and_kwargs.__wrapped__)
t.DEFAULT_CALLBACKS.remove(SophiaCallback)
from support import tiny_model, token_rows
args = TrainingArguments({str(tmp_path)!r}, optim="sophia", optim_args="hessian_interval=3", max_steps=4, use_cpu=True,
    report_to=[], logging_steps=2, save_strategy="no", label_smoothing_factor=0.1)
try:
    Trainer(model=tiny_model(), args=args, train_dataset=token_rows(8)).train()
    raise SystemExit("the registration is still there")
except (ValueError, KeyError):
    pass
trainer = SophiaTrainer(model=tiny_model(), args=args, train_dataset=token_rows(8))
trainer.train()
assert trainer.optimizer.optimizer.stats()["hessian_updates"] == 2
assert any("sophia/win_rate" in entry for entry in trainer.state.log_history)
"""
    command = ["timeout", "-k", "5", "100", sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_sophia_trainer_refuses_another_optimizer(tmp_path):
    trainer = SophiaTrainer(model=tiny_model(), args=arguments(tmp_path, optim="adamw_torch", optim_args=None))
    with pytest.raises(ValueError, match="trains with Sophia, and optim is 'adamw_torch'"):
        trainer.create_optimizer()


@pytest.mark.parametrize("given", ["optimizers", "optimizer_cls_and_kwargs"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_optimizer_built_by_hand_and_the_callback_given_twice(tmp_path, given, smoothing):
    model, reporter = tiny_model(), Reporter()
    estimator = GaussNewtonBartlett(model)
    if given == "optimizers":
        options = {given: (SophiaG(model.parameters(), lr=1e-3, hessian_interval=3, estimator=estimator), None)}
    else:
        options = {given: (SophiaG, {"lr": 1e-3, "hessian_interval": 3, "estimator": estimator})}
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, optim="adamw_torch", optim_args=None, label_smoothing_factor=smoothing),
        train_dataset=token_rows(8),
        callbacks=[SophiaCallback(), reporter],
        **options,
    )
    assert_trained(trainer, updates=3)
    logged = [entry for entry in reporter.logs if entry.keys() >= KEYS]
    assert len(logged) == 4
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [e["sophia/hessian_time_fraction"] for e in history] == [e["sophia/hessian_time_fraction"] for e in logged]


def test_sophia_h(tmp_path):
    options = "hessian_interval=3,hessian_probes=2,hessian_fraction=0.5,hessian_units=2,eps=1e-8"
    trainer = make_trainer(
        tmp_path,
        data=token_rows(8),
        optim="sophia_h",
        optim_args=options,
        max_steps=8,
        logging_steps=1,
        learning_rate=1e-2,
    )
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is SophiaH and type(optimizer.estimator) is Hutchinson
    assert (optimizer.param_groups[0]["rho"], optimizer.estimator.probes, optimizer.estimator.units) == (0.01, 2, 2)
    assert_trained(trainer, updates=3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sophia_h_first_estimate_is_that_of_a_plain_loop(tmp_path, smoothing):
    """Also when label smoothing keeps the labels from the model: the pass gives them back to it."""
    model, rows, seen = tiny_model(), token_rows(4), []
    twin = copy.deepcopy(model).train()
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    trainer = make_trainer(
        tmp_path, model=model, data=rows, optim="sophia_h", max_steps=1, label_smoothing_factor=smoothing
    )
    trainer.train()
    labels = {tuple(r["input_ids"].tolist()): r["labels"] for r in rows}
    labels = torch.stack([labels[tuple(ids.tolist())] for ids in seen[0]])
    estimator = Hutchinson(twin, fraction=1.0, units=64, seed=trainer.args.seed)
    decayed = set(trainer.get_decay_parameter_names(model))  # the order of the groups keys the probes
    order = sorted(twin.named_parameters(), key=lambda named: named[0] not in decayed)
    optimizer = SophiaH([p for _, p in order], estimator=estimator)
    twin(input_ids=seen[0], labels=labels).loss.backward()
    optimizer.step()
    state = sophia_of(trainer).state
    for (name, plain), (_, trained) in zip(twin.named_parameters(), model.named_parameters(), strict=True):
        h = optimizer.state[plain]["hessian"]
        assert (state[trained]["hessian"] - h).abs().max() <= 1e-4 * h.abs().max(), name


def test_probes_belong_to_sophia_h(tmp_path):
    trainer = make_trainer(tmp_path, optim_args="hessian_probes=2")
    with pytest.raises(ValueError, match="hessian_probes belongs to optim='sophia_h', not to 'sophia'"):
        trainer.train()


class NoLabels(Trainer):
    """A reward model's way: the loss is made of scores, and no label exists."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("labels")
        return -torch.nn.functional.logsigmoid(model(**inputs).logits[:, 0]).mean()


@pytest.mark.parametrize("optim", ["sophia", "sophia_h"])
def test_a_loss_without_labels_gets_one_sentence(tmp_path, optim):
    from tiny_heads import CASES

    rows = [{"input_ids": r["input_ids"].clamp(max=30), "labels": torch.tensor(0)} for r in token_rows(4)]
    trainer = NoLabels(model=CASES["regression"].build(), args=arguments(tmp_path, optim=optim), train_dataset=rows)
    trainer.create_optimizer()
    sophia_of(trainer).estimator.note_labels = lambda labels: None
    with pytest.raises(ValueError, match="no labels reached BertForSequenceClassification.*not a likelihood.*SophiaH"):
        trainer.train()


def test_labels_noted_before_the_model_decides_its_problem_type():
    from tiny_heads import bert

    floats, classes = torch.rand(4), torch.tensor([1, 0, 2, -100])
    regression = ProblemTypeLikelihood(bert("SequenceClassification", num_labels=1).config)
    assert regression.nll_sum(torch.zeros(4), floats) == floats.square().sum() and regression.count(None, floats) == 4
    assert regression.nll_sum(torch.zeros(3), torch.ones(3, dtype=torch.int64)) == 3
    several = ProblemTypeLikelihood(bert("SequenceClassification", num_labels=3).config)
    assert several.count(None, classes) == 3 and several.count(None, torch.rand(4, 3)) == 12


def test_old_transformers_is_refused_when_sophia_is_asked_for(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.45.2")
    with pytest.raises(ValueError, match="needs transformers 4.46 or newer, and this is 4.45.2"):
        trainer.train()


def test_copies_and_casts_of_the_arguments(tmp_path):
    args = arguments(tmp_path)
    assert copy.deepcopy(args).optim is args.optim == "sophia"
    rebuilt = TrainingArguments(**{k: v for k, v in args.to_dict().items() if k in ("output_dir", "optim", "use_cpu")})
    assert rebuilt.optim == "sophia"
    for value, name in (("sophia_h", SophiaH), ("sophia", SophiaG)):  # what a hyperparameter search assigns
        args.optim = type(args.optim)(value)
        assert Trainer.get_optimizer_cls_and_kwargs(args, tiny_model())[0] is name
    args.optim = "sophia_h"
    assert Trainer.get_optimizer_cls_and_kwargs(args, tiny_model())[0] is SophiaH


def test_a_trained_model_can_be_copied_and_saved_whole(tmp_path):
    """The tap stays behind: the copy and the file are plain models, and the file opens without this package."""
    trainer = make_trainer(tmp_path, max_steps=3, optim_args="hessian_interval=2")
    trainer.train()
    optimizer = sophia_of(trainer)
    row = {name: value[None] for name, value in token_rows(1)[0].items()}
    expected = trainer.model(**row).loss
    twin = copy.deepcopy(trainer.model).train()
    assert torch.equal(twin(**row).loss, trainer.model(**row).loss)
    twin(**row).loss.backward()
    torch.save(trainer.model, tmp_path / "model.pt")
    torch.save(row, tmp_path / "row.pt")
    trainer.train()
    assert optimizer is sophia_of(trainer) and optimizer.stats()["hessian_updates"] == 3  # at steps 0, 2 and 4
    code = f"""
import sys, torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False).train()
row = torch.load({str(tmp_path / "row.pt")!r})
loss = model(**row).loss
loss.backward()
assert "sophia_integrations" not in sys.modules
print(loss.item())
"""
    command = ["timeout", "-k", "5", "100", sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert float(result.stdout) == pytest.approx(expected.item(), rel=1e-6)
