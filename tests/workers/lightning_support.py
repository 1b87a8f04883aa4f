"""LightningModules, data and a quiet Trainer, shared by the Lightning tests and their worker processes."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from support import VOCABULARY, FixedLabels, Toy, fixed_labels, tiny_model, token_rows
from torch.utils.data import DataLoader, Dataset

from sophia_integrations import SophiaG
from sophia_integrations.curvature.rows import count_rows
from sophia_integrations.lightning import CausalLM, SophiaCallback

FILTERS = [
    "ignore::DeprecationWarning:lightning",
    "ignore::FutureWarning:lightning",
    "ignore:.*isinstance.treespec, LeafSpec",
    "ignore:.*does not have many workers",
    "ignore:.*defined a `validation_step` but have no",
    "ignore:.*number of training batches",
    "ignore:.*in eval mode",
    "ignore:.*lr_scheduler.step.* before .*optimizer.step",
    "ignore:.*`torch.jit",
]


class Rows(Dataset):
    """(inputs [6], label) pairs; every third label is masked."""

    def __init__(self, rows=32):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, 6, generator=generator)
        self.y = torch.randint(VOCABULARY, (rows,), generator=generator)
        self.y[::3] = -100

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


class Classifier(pl.LightningModule):
    """A classifier whose logits `sophia_logits` gives."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = Toy()
        self.options = {"lr": 1e-2, "rho": 0.1, "hessian_interval": 5, **options}

    def sophia_logits(self, batch):
        x, y = batch
        return self.net(x), y

    def training_step(self, batch, batch_idx):
        logits, targets = self.sophia_logits(batch)
        return F.cross_entropy(logits, targets)

    def configure_optimizers(self):
        return SophiaG(self.parameters(), **self.options)


class LanguageModel(pl.LightningModule):
    """A transformers model inside a module that knows nothing of Sophia but its optimizer."""

    def __init__(self, model=None, **options):
        super().__init__()
        self.model = model if model is not None else tiny_model()
        self.options = {"lr": 1e-3, "hessian_interval": 5, **options}

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train_loss", loss.detach())
        return loss

    def configure_optimizers(self):
        return SophiaG(self.parameters(), **self.options)


TINY = dict(
    model_type="gpt2", n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=VOCABULARY, bos_token_id=1,
    eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip


def causal_lm(*, warmup_steps=0, schedule="constant", gradient_checkpointing=False, dropout=0.0, **options):
    """A `CausalLM` with the weights of `tiny_model`."""
    options = {"lr": 1e-3, "hessian_interval": 5, **options}
    config = {**TINY, "resid_pdrop": dropout, "attn_pdrop": dropout}
    module = CausalLM(
        config, None, lambda params: SophiaG(params, **options), warmup_steps, schedule, gradient_checkpointing
    )
    module.model.load_state_dict(tiny_model().state_dict())
    return module


class Draw(pl.Callback):
    """Replaces the sampled labels by ones that a test can compute."""

    def on_train_start(self, trainer, pl_module):
        sophia_of(trainer).estimator.readout.likelihood = FixedLabels()


class Record(pl.Callback):
    """Keeps the loss of every micro-batch."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def make_trainer(*callbacks, max_steps=1, sophia=None, **options):
    """A Trainer on the CPU that prints and writes nothing, with a SophiaCallback that uses every row."""
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    sophia = sophia or SophiaCallback(fraction=1.0, units=64)
    callbacks = [*([sophia] if sophia != "none" else []), *callbacks]
    options = {"devices": 1, "use_distributed_sampler": False, **quiet, **options}
    return pl.Trainer(accelerator="cpu", max_steps=max_steps, callbacks=callbacks, **options)


def token_loader(batch_size=4, rows=64, **options):
    return DataLoader(token_rows(rows), batch_size=batch_size, **options)


def row_loader(batch_size=4, rows=32, **options):
    return DataLoader(Rows(rows), batch_size=batch_size, **options)


def sophia_of(trainer):
    return next(o for o in trainer.optimizers if isinstance(o, SophiaG))


def updates(trainer):
    """Estimates made; none was dropped."""
    stats = sophia_of(trainer).stats()
    assert stats["hessian_skipped"] == 0
    return stats["hessian_updates"]


def rows_remembered(optimizer):
    """Rows of each micro-batch that waits for the next estimate."""
    return [count_rows(batch, 0) for batch in optimizer.estimator._tap._remembered]


def hessian_of(trainer, module):
    """ĥ by parameter name after the first estimate."""
    sophia = sophia_of(trainer)
    scale = 1 - sophia.param_groups[0]["betas"][1]
    return {n: sophia.state[p]["hessian"] / scale for n, p in module.named_parameters() if p in sophia.state}


def hand_rows(net, x, y):
    """Σ over rows of S² / N for the classifier: one backward pass a row, labels `fixed_labels`."""
    sums, n = {name: torch.zeros_like(p) for name, p in net.named_parameters()}, int((y != -100).sum())
    for row, target in zip(x, y, strict=True):
        if target != -100:
            for total, g in zip(sums.values(), row_gradients(net, row[None], target[None]), strict=True):
                total += g.square()
    return {name: total / n for name, total in sums.items()}


def row_gradients(net, x, y):
    """Gradients of the summed loss of some rows at `fixed_labels`."""
    targets = torch.where(y == -100, -100, fixed_labels(y))
    return torch.autograd.grad(F.cross_entropy(net(x), targets, reduction="sum"), list(net.parameters()))
