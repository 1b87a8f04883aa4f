"""Steps of a Trainer under torchrun; every rank writes h, m and its weights, by parameter name."""

import os
import sys
from pathlib import Path

import torch
from support import first_hessian, first_momentum, make_trainer, sophia_of, tiny_model
from tiny_heads import classifier, rows_for

out = Path(sys.argv[1])
steps, masked_rank = int(sys.argv[2]), sys.argv[3]
classify = sys.argv[4:] == ["classifier"]
model = classifier() if classify else tiny_model()
trainer = make_trainer(
    out,
    model=model,
    data=rows_for(model) if classify else None,
    fixed_labels=not classify,
    max_steps=steps,
    per_device_train_batch_size=4 if classify else 2,
    ddp_backend="gloo",
    logging_steps=1,
    max_grad_norm=1e9,
)
if masked_rank != "none":
    original = trainer.data_collator

    def mask_on_one_rank(rows):
        batch = original(rows)
        if trainer.args.process_index == int(masked_rank):
            batch["labels"][:] = -100
        return batch

    trainer.data_collator = mask_on_one_rank
trainer.train()
rank = trainer.args.process_index
stats = sophia_of(trainer).stats()
state = {
    "h": first_hessian(trainer),
    "m": first_momentum(trainer),
    "weights": {n: p.detach() for n, p in trainer.model.named_parameters()},
    "updates": stats["hessian_updates"],
    "distributed": str(trainer.accelerator.distributed_type),
}
torch.save(state, out / f"rank{rank}.pt")
os._exit(0)  # the Trainer leaves gloo's threads running, which now and then abort an interpreter that exits
