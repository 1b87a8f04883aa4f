"""Optimizers that a Trainer builds late or again, and trainings that break off: whoever steps has its estimator."""

import pytest
import torch
import transformers
from support import make_trainer, sophia_of, tiny_model, token_rows
from transformers import Trainer, hyperparameter_search
from transformers.trainer_utils import BestRun, HPSearchBackend

from sophia_integrations import GaussNewtonBartlett, Hutchinson, SophiaG, SophiaH
from sophia_integrations.curvature.rows import count_rows


def counters(trainer):
    return {k: getattr(sophia_of(trainer).progress, k) for k in ("step", "hessian_updates", "hessian_skipped")}


def anew(folder, data=None, **options):
    """A Trainer that builds its model, and with it the optimizer, at every `train()`."""
    args = make_trainer(folder, **{"max_steps": 12, **options}).args
    return Trainer(model_init=lambda: tiny_model(), args=args, train_dataset=data or token_rows())


@pytest.mark.parametrize("where", ["forward", "pass"])
def test_a_batch_size_found_by_running_out_of_memory(tmp_path, where):
    """What was too large is in no estimate, and the run is that of the size found."""
    asked = []

    class Small(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            if where == "forward" and len(inputs["input_ids"]) > 6:
                raise RuntimeError("CUDA out of memory.")
            return loss

    def started(**options):
        options = {"max_steps": 12, "dataloader_drop_last": True, **options}
        return Small(tiny_model(), make_trainer(tmp_path, **options).args, train_dataset=token_rows())

    trainer = started(auto_find_batch_size=True, per_device_train_batch_size=8)
    trainer.create_optimizer()
    estimator = sophia_of(trainer).estimator
    estimate = estimator.estimate

    def checked(params, step):
        asked.append([count_rows(batch, 0) for batch in estimator._tap._remembered])
        if max(asked[-1]) > 6:
            raise RuntimeError("CUDA out of memory.")
        return estimate(params, step)

    estimator.estimate = checked
    trainer.train()
    size = trainer._train_batch_size
    assert size <= 6 and asked[-3:] == [[size]] * 3
    assert where == "pass" or len(asked) == 3
    assert counters(trainer) == {"step": 12, "hessian_updates": 3, "hessian_skipped": 0}
    plain = started(per_device_train_batch_size=size)
    plain.train()
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True))


def test_train_after_create_optimizer_and_scheduler(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=12)
    trainer.create_optimizer_and_scheduler(12)
    made = trainer.optimizer
    trainer.train()
    assert sophia_of(trainer) is made
    assert counters(trainer) == {"step": 12, "hessian_updates": 3, "hessian_skipped": 0}
    straight = make_trainer(tmp_path, max_steps=12)
    straight.train()
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), straight.model.parameters(), strict=True))


@pytest.mark.parametrize("built_before", [False, True])
def test_a_model_built_at_every_train_gets_a_fresh_optimizer_and_estimator(tmp_path, built_before):
    trainer, optimizers = anew(tmp_path), []
    if built_before:
        trainer.create_optimizer_and_scheduler(12)
    for _ in range(2):
        trainer.train()
        optimizers.append(sophia_of(trainer))
        assert counters(trainer) == {"step": 12, "hessian_updates": 3, "hessian_skipped": 0}
        assert optimizers[-1].estimator.model is trainer.model
    assert optimizers[0] is not optimizers[1]


def test_one_model_handed_out_at_every_train_gets_a_fresh_optimizer_too(tmp_path):
    model, args = tiny_model(), make_trainer(tmp_path, max_steps=10).args
    trainer = Trainer(model_init=lambda: model, args=args, train_dataset=token_rows())
    for _ in range(2):
        trainer.train()
        assert counters(trainer) == {"step": 10, "hessian_updates": 2, "hessian_skipped": 0}


class InTurn(hyperparameter_search.OptunaBackend):
    """A search that tries what `hp_space` says for trial 0, 1, …, as optuna's backend does."""

    @staticmethod
    def is_available():
        return True

    def run(self, trainer, n_trials, direction, **kwargs):
        for number in range(n_trials):
            trainer.objective = None
            trainer.train(resume_from_checkpoint=None, trial=Trial(number))
            kwargs["after"](trainer)
        return BestRun(str(n_trials - 1), 0.0, {})


class Trial:
    def __init__(self, number):
        self.number, self.params = number, {}


def test_hyperparameter_search(tmp_path, monkeypatch):
    """Every trial has the optimizer, the options and the model of its own."""
    backends = hyperparameter_search.ALL_HYPERPARAMETER_SEARCH_BACKENDS
    monkeypatch.setitem(backends, HPSearchBackend.OPTUNA, InTurn)
    for module in (transformers.trainer, transformers.integrations):  # it looks for a class of optuna's
        if hasattr(module, "hp_params"):
            monkeypatch.setattr(module, "hp_params", lambda trial: trial.params)
    tried = [
        ({"optim": "sophia_h", "optim_args": "hessian_interval=2,rho=0.02", "learning_rate": 1e-2}, SophiaH, 0.02, 6),
        ({"optim": "sophia", "optim_args": "hessian_interval=4", "learning_rate": 2e-3}, SophiaG, 0.05, 3),
        ({"per_device_train_batch_size": 2, "optim_args": "hessian_interval=6,rho=0.1"}, SophiaG, 0.1, 2),
    ]
    seen = []

    def after(trainer):
        sophia = sophia_of(trainer)
        group = sophia.param_groups[0]
        assert sophia.estimator.model is trainer.model
        assert type(sophia.estimator) is (Hutchinson if isinstance(sophia, SophiaH) else GaussNewtonBartlett)
        seen.append((type(sophia), group["rho"], group["initial_lr"], counters(trainer)))

    best = anew(tmp_path, data=token_rows(16)).hyperparameter_search(
        hp_space=lambda trial: tried[trial.number][0], n_trials=3, backend="optuna", after=after
    )
    assert best.run_id == "2"
    for (options, cls, rho, updates), actual in zip(tried, seen, strict=True):
        counted = {"step": 12, "hessian_updates": updates, "hessian_skipped": 0}
        assert actual == (cls, rho, options.get("learning_rate", 2e-3), counted)


@pytest.mark.parametrize("given", ["optimizers", "optimizer_cls_and_kwargs", "none"])
def test_too_few_steps_for_the_error_are_not_silent(tmp_path, given):
    """An optimizer without an estimator raises after k = 10 steps; a training of 4 says so when it ends."""
    model, options = tiny_model(), {}
    if given == "optimizers":
        options = {given: (SophiaG(model.parameters(), lr=1e-3), None)}
    elif given == "optimizer_cls_and_kwargs":
        options = {given: (SophiaG, {"lr": 1e-3})}
    trainer = Trainer(model, make_trainer(tmp_path, max_steps=4).args, train_dataset=token_rows(), **options)
    if given == "none":
        trainer.train()
        return
    with pytest.warns(UserWarning, match="made 4 steps without a single Hessian estimate: they were sign momentum"):
        trainer.train()


def test_the_official_way_by_hand_is_not_warned_about(tmp_path):
    class ByHand(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if self.state.global_step == 0:
                model(**inputs).loss.backward()
                sophia_of(self).update_hessian(44)
                model.zero_grad()
            return super().training_step(model, inputs, *args, **kwargs)

    model = tiny_model()
    optimizer = SophiaG(model.parameters(), lr=1e-3)
    args = make_trainer(tmp_path, max_steps=4).args
    ByHand(model, args, train_dataset=token_rows(), optimizers=(optimizer, None)).train()
    assert optimizer.stats()["hessian_updates"] == 1
