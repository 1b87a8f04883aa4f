"""Optimizers built or swapped after the hooks were set, and trial steps that run without the callbacks."""

import logging

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from support import FixedLabels, hand_estimate, token_rows
from workers.lightning_support import (
    FILTERS,
    Classifier,
    LanguageModel,
    hand_rows,
    make_trainer,
    row_loader,
    rows_remembered,
    sophia_of,
    token_loader,
    updates,
)

from sophia_integrations import GaussNewtonBartlett, Hutchinson, SophiaG, SophiaH
from sophia_integrations.curvature import Readout
from sophia_integrations.curvature.rows import count_rows
from sophia_integrations.lightning import SophiaCallback

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]
STEPS, UPDATES = 12, 3
FINDERS_REWIND = tuple(map(int, pl.__version__.split(".")[:2])) >= (2, 6)
"""Older finders leave the place in the epoch and the schedule where their trial steps ended, with AdamW as well."""


class Tuned:
    """What the tuners need of a module: `lr`, `batch_size`, its own data; it keeps a diary of its steps."""

    def __init__(self, lr=1e-3, batch_size=4, **options):
        super().__init__(**options)
        self.lr, self.batch_size, self.diary = lr, batch_size, []

    def train_dataloader(self):
        return self.loader(self.batch_size)

    def configure_optimizers(self):
        sophia = SophiaG(self.parameters(), **{**self.options, "lr": self.lr})
        return [sophia], [torch.optim.lr_scheduler.StepLR(sophia, 3)]

    def on_before_zero_grad(self, optimizer):
        progress = optimizer.progress
        self.diary.append((progress.step, progress.hessian_updates, len(rows_remembered(optimizer))))


class Rows(Tuned, Classifier):
    loader = staticmethod(row_loader)


class Tokens(Tuned, LanguageModel):
    loader = staticmethod(token_loader)


KINDS = pytest.mark.parametrize("kind", [Rows, Tokens])


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    """Finders write their checkpoint into the current folder, and say a lot."""
    monkeypatch.chdir(tmp_path)
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.CRITICAL)


def ended(trainer):
    """What a run leaves: weights, m and h; counters and hyperparameters; the schedule."""
    sophia, schedule = sophia_of(trainer), trainer.lr_scheduler_configs[0].scheduler.state_dict()
    tensors = [value for p in sophia.param_groups[0]["params"] for value in (p.detach(), *sophia.state[p].values())]
    apart = ("params", "differentiable")  # torch adds the second one to every optimizer that loads a state
    group = {k: v for k, v in sophia.param_groups[0].items() if k not in apart}
    return tensors, group, {k: v for k, v in schedule.items() if not k.startswith("_get_lr")}


def assert_same_end(trainer, other):
    """What is the optimizer's own in every version; all of it where the finder rewinds all."""
    counted = [{k: v for k, v in ended(t)[1].items() if k not in ("lr", "initial_lr")} for t in (trainer, other)]
    assert counted[0] == counted[1]
    if not FINDERS_REWIND:
        return
    (tensors, *rest), (tensors2, *rest2) = ended(trainer), ended(other)
    assert rest == rest2
    assert len(tensors) == len(tensors2) and all(torch.equal(a, b) for a, b in zip(tensors, tensors2, strict=True))


def trained(module, *callbacks):
    trainer = make_trainer(*callbacks, max_steps=STEPS)
    trainer.fit(module)
    return trainer


def assert_each_trial_step_had_an_estimate(diary):
    """Every k steps from the first on: the update counter at the forward of step t."""
    assert diary and all(updates == -(-step // 5) for step, updates, _ in diary), diary


@KINDS
@pytest.mark.parametrize("trial_steps", [3, 20])
def test_the_run_after_a_learning_rate_finder_is_as_if_it_had_not_been(kind, trial_steps):
    """Fewer trial steps than k = 5, and more: h, momentum, counters, schedule and the tap come back."""
    finder = LearningRateFinder(num_training_steps=trial_steps, update_attr=False, early_stop_threshold=None)
    module = kind()
    trainer = trained(module, finder)
    trial, run = module.diary[:trial_steps], module.diary[trial_steps:]
    assert_each_trial_step_had_an_estimate(trial)
    plain = kind()
    assert_same_end(trainer, trained(plain))
    assert run[0] == (0, 0, 1) and run == plain.diary and updates(trainer) == UPDATES


@KINDS
def test_tuner_lr_find_and_the_fit_after_it(kind):
    module, trainer = kind(), make_trainer(max_steps=STEPS)
    found = Tuner(trainer).lr_find(module, num_training=20, early_stop_threshold=None)
    assert len(found.results["lr"]) == 20 and module.lr == found.suggestion() != 1e-3
    assert_each_trial_step_had_an_estimate(module.diary)
    trainer.fit(module)
    assert_same_end(trainer, trained(kind(lr=module.lr)))


@KINDS
@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_a_batch_size_finder_that_runs_out_of_memory(kind, mode):
    """The batch that was too large is in no estimate, and the run is that of the size found."""
    asked = []

    class Small(kind):
        def training_step(self, batch, batch_idx):
            rows = len(batch[0] if isinstance(batch, list) else batch["input_ids"])
            loss = super().training_step(batch, batch_idx)
            if rows > 10:
                raise RuntimeError("CUDA out of memory.")
            return loss

        def on_before_zero_grad(self, optimizer):
            super().on_before_zero_grad(optimizer)
            asked.extend(rows_remembered(optimizer))

    module = Small(hessian_interval=1)
    trainer = trained(module, BatchSizeFinder(mode=mode))
    assert max(asked) <= 10 and all(remembered <= 1 for *_, remembered in module.diary)
    assert module.batch_size == 8 if mode == "power" else module.batch_size in (9, 10)  # newer versions keep a margin
    assert_same_end(trainer, trained(kind(batch_size=module.batch_size, hessian_interval=1)))


class EachEpoch(pl.Callback):
    """Calls `configure_optimizers` again, as some strategies and recipes do."""

    def __init__(self):
        self.built = []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:
            trainer.strategy.setup_optimizers(trainer)
        self.built.append(sophia_of(trainer))


@KINDS
@pytest.mark.parametrize("accumulation", [1, 2])
def test_configure_optimizers_called_again(kind, accumulation):
    """A loop over the same two epochs with a new optimizer for the second, and only the last one still remembers."""
    again = EachEpoch()
    module = kind(batch_size=16, hessian_interval=2)
    trainer = make_trainer(
        again, max_epochs=2, max_steps=-1, accumulate_grad_batches=accumulation, limit_train_batches=2
    )
    trainer.fit(module)
    first, second = again.built
    assert first is not second is sophia_of(trainer)
    for sophia in (first, second):
        counted = {k: getattr(sophia.progress, k) for k in ("step", "hessian_updates", "hessian_skipped")}
        assert counted == {"step": 2 // accumulation, "hessian_updates": 1, "hessian_skipped": 0}
    assert first.estimator is None and second.estimator is not None


def test_an_optimizer_of_another_kind_gets_its_own_estimator():
    class Switch(Rows):
        def configure_optimizers(self):
            cls = SophiaH if self.current_epoch else SophiaG
            return cls(self.parameters(), **{**self.options, "lr": 1e-3})

    again, kinds = EachEpoch(), []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            kinds.append(type(sophia_of(trainer).estimator))

    trainer = make_trainer(again, Look(), max_epochs=2, max_steps=-1)
    trainer.fit(Switch())
    assert kinds == [GaussNewtonBartlett, Hutchinson]
    assert all(sophia.progress.hessian_updates == 2 for sophia in again.built)


class TwoSteps(Rows):
    """By hand, two steps on each batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(*self.sophia_logits(batch)))
            optimizer.step()

    def on_before_zero_grad(self, optimizer):
        pass


def test_tuner_scale_batch_size_in_manual_optimization():
    """Each trial step had an estimate: k = 5 steps on 3 batches need two."""
    seen = []

    class Seen(TwoSteps):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            progress = self.optimizers().progress
            seen.append((progress.step, progress.hessian_updates))

    module, trainer = Seen(), make_trainer(max_steps=STEPS)
    assert Tuner(trainer).scale_batch_size(module, max_trials=3) in (8, 16)  # 2.6 stops sooner
    assert seen[:3] == [(2, 1), (4, 1), (6, 2)]
    trainer.fit(module)
    assert updates(trainer) == UPDATES


class Swap(pl.Callback):
    """Two optimizers in turn, one an epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            self.two = [sophia_of(trainer), pl_module.configure_optimizers()[0][0]]
        trainer.strategy.optimizers = [self.two[trainer.current_epoch % 2]]


@pytest.mark.parametrize(("kind", "steps"), [(Rows, 1), (TwoSteps, 2)])
def test_an_optimizer_swapped_out_and_in_again_remembers_each_batch_once(monkeypatch, kind, steps):
    asked, estimate = [], GaussNewtonBartlett.estimate

    def spied(self, params, step):
        asked.append([count_rows(batch, 0) for batch in self._tap._remembered])
        return estimate(self, params, step)

    monkeypatch.setattr(GaussNewtonBartlett, "estimate", spied)
    swap = Swap()
    trainer = make_trainer(swap, max_epochs=4, max_steps=-1, limit_train_batches=2)
    trainer.fit(kind(hessian_interval=1))
    assert asked == [[4]] * (8 * steps)
    assert [sophia.progress.hessian_updates for sophia in swap.two] == [4 * steps] * 2


@KINDS
@pytest.mark.parametrize("new_callback", [False, True])
def test_an_optimizer_kept_from_one_fit_to_the_next(kind, new_callback):
    module = kind()
    kept = SophiaG(module.parameters(), **module.options)
    module.configure_optimizers = lambda: kept
    callback = SophiaCallback(fraction=1.0, units=64)
    for run in (1, 2):
        if new_callback:
            callback = SophiaCallback(fraction=1.0, units=64)
        trainer = make_trainer(sophia=callback, max_steps=10)
        trainer.fit(module)
        assert updates(trainer) == 2 * run and kept.progress.step == 10 * run


class Outside(Tokens):
    """Computes its loss itself: the model is not given the labels."""

    def training_step(self, batch, batch_idx):
        logits = self.model(input_ids=batch["input_ids"]).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def test_labels_are_noted_for_an_optimizer_that_another_callback_served_before():
    ends = []
    for module in (Tokens(), Outside()):
        kept = SophiaG(module.parameters(), **module.options)
        module.configure_optimizers = lambda kept=kept: kept
        for _ in range(2):
            trainer = make_trainer(max_steps=5)
            trainer.fit(module)
        ends.append([kept.state[p]["hessian"] for p in module.parameters()])
    assert updates(trainer) == 2
    for given, noted in zip(*ends, strict=True):
        assert (noted - given).abs().max() <= 1e-3 * given.abs().max() > 0


def test_the_first_estimate_of_a_late_optimizer_is_right():
    """Labels that the model is not given are still noted: against one backward pass a row."""

    class Late(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.strategy.setup_optimizers(trainer)

    class DrawLate(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            optimizer.estimator.readout.likelihood = FixedLabels()

    for module in (Outside(), Rows()):
        if isinstance(module, Outside):
            expected = hand_estimate(module.model, token_rows()[:4])
        else:
            expected = hand_rows(module.net, *next(iter(row_loader())))
        trainer = make_trainer(Late(), DrawLate(), max_steps=1)
        trainer.fit(module)
        sophia = sophia_of(trainer)
        for name, p in module.named_parameters():
            value = expected[name.partition(".")[2]]
            h = sophia.state[p]["hessian"] / (1 - sophia.param_groups[0]["betas"][1])
            assert (h - value).abs().max() <= 1e-5 * value.abs().max() > 0, name


def test_an_estimator_of_the_users_is_kept_through_a_finder():
    class Own(Tuned, Classifier):
        loader = staticmethod(row_loader)

        def configure_optimizers(self):
            estimator = GaussNewtonBartlett(self.net, readout=Readout(), fraction=1.0, units=64)
            return SophiaG(self.parameters(), **{**self.options, "estimator": estimator})

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0], labels=batch[1]), batch[1])

    module = Own()
    finder = LearningRateFinder(num_training_steps=6, update_attr=False)
    trainer = make_trainer(finder, max_steps=STEPS)
    trainer.fit(module)
    assert sophia_of(trainer).estimator.model is module.net and updates(trainer) == UPDATES
    assert_each_trial_step_had_an_estimate(module.diary)


def test_the_strategy_is_left_as_it_was_even_by_a_fit_that_failed():
    class Broken(Rows):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError

    trainer = make_trainer(max_steps=STEPS)
    before = dict(vars(trainer.strategy))
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Broken())
    assert vars(trainer.strategy).keys() == before.keys()
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, SophiaCallback)] + [SophiaCallback()]
    trainer.fit(Rows())
    assert updates(trainer) == UPDATES and vars(trainer.strategy).keys() == before.keys()
