"""What SophiaCallback logs, and when."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from workers.lightning_support import FILTERS, Classifier, LanguageModel, make_trainer, row_loader, token_loader

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]


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


def test_manual_logs_come_every_n_batches_however_many_steps_each_makes():
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(3):
                self.optimizers().zero_grad()
                self.manual_backward(F.cross_entropy(*self.sophia_logits(batch)))
                self.optimizers().step()

    logs = Logs()
    trainer = make_trainer(max_steps=24, logger=logs.logger(), log_every_n_steps=4)
    trainer.fit(Manual(), row_loader())
    assert [step for step, values in logs.seen.items() if "sophia/win_rate" in values] == [3, 7]
