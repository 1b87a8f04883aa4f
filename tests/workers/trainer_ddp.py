"""Trainers under torchrun, one for each WHAT; every rank writes h, m and its weights, by parameter name."""

import os
import sys
from pathlib import Path

import torch
from support import first_hessian, first_momentum, make_trainer, sophia_of
from tiny_heads import classifier, rows_for

OUT = Path(sys.argv[1])


def classification():
    model = classifier()
    return run(model=model, data=rows_for(model), per_device_train_batch_size=4)


def masked_on_the_second():
    """Every label of its rows is masked on rank 1."""

    def mask(trainer):
        original = trainer.data_collator

        def collate(rows):
            batch = original(rows)
            if trainer.args.process_index == 1:
                batch["labels"][:] = -100
            return batch

        trainer.data_collator = collate

    return run(mask, fixed_labels=True, max_steps=6)


def run(prepare=lambda trainer: None, **options):
    defaults = dict(max_steps=1, per_device_train_batch_size=2, ddp_backend="gloo", logging_steps=1, max_grad_norm=1e9)
    trainer = make_trainer(OUT, **{**defaults, **options})
    prepare(trainer)
    trainer.train()
    return {
        "h": first_hessian(trainer),
        "m": first_momentum(trainer),
        "weights": {n: p.detach() for n, p in trainer.model.named_parameters()},
        "updates": sophia_of(trainer).stats()["hessian_updates"],
        "distributed": str(trainer.accelerator.distributed_type),
    }


RUNS = {"causal": lambda: run(fixed_labels=True), "masked": masked_on_the_second, "classifier": classification}
results = {name: RUNS[name]() for name in sys.argv[2:]}
torch.save(results, OUT / f"rank{os.environ['RANK']}.pt")
os._exit(0)  # the Trainer leaves gloo's threads running, which now and then abort an interpreter that exits
