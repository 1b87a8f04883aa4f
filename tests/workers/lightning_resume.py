"""A Trainer run that may kill itself with SIGKILL and may resume; tells weights, state and losses at the end."""

import os
import signal
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from workers.lightning_support import Record, causal_lm, make_trainer, sophia_of

from sophia_integrations.lightning import SophiaCallback, TextDataModule


class KillAt(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 13:
            os.kill(os.getpid(), signal.SIGKILL)


class Ids(Record):
    """Also keeps the first tokens of every batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append((float(outputs["loss"]), batch["input_ids"][:, 0].tolist()))


def run(out, mode, precision, every, files, tokenizer):
    """Train 20 steps: "straight", "killed" after 13, or "resumed" from step `every`."""
    record = Ids()
    checkpoint = ModelCheckpoint(dirpath=out, every_n_train_steps=every, save_top_k=-1, filename="{step}")
    callbacks = [record, checkpoint, *([KillAt()] if mode == "killed" else [])]
    trainer = make_trainer(
        *callbacks,
        sophia=SophiaCallback(),
        max_steps=20,
        precision=precision,
        accumulate_grad_batches=2,
        enable_checkpointing=True,
        limit_val_batches=0,
    )
    data = TextDataModule([str(files)], str(tokenizer), block_size=12, batch_size=4, validation_fraction=0.5)
    module = causal_lm(hessian_interval=4, warmup_steps=3, schedule="cosine", dropout=0.1)
    trainer.fit(module, data, ckpt_path=str(out / f"step={every}.ckpt") if mode == "resumed" else None)
    optimizer = sophia_of(trainer)
    return {
        "weights": [p.detach() for p in module.parameters()],
        "state": [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]],
        "counters": {k: getattr(optimizer.progress, k) for k in ("step", "hessian_updates", "hessian_skipped")},
        "losses": record.losses,
        "batches_in_an_epoch": len(data.train_dataloader()),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    out, mode, precision, every, files, tokenizer = sys.argv[1:]
    run(Path(out), mode, precision, int(every), files, tokenizer)
