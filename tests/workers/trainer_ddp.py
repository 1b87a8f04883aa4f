"""One optimizer step of a Trainer under torchrun; rank 0 writes h by parameter name, every rank its weights."""

import sys
from pathlib import Path

import torch
from support import first_hessian, make_trainer, sophia_of

out = Path(sys.argv[1])
steps, masked_rank = int(sys.argv[2]), sys.argv[3]
trainer = make_trainer(
    out, fixed_labels=True, max_steps=steps, per_device_train_batch_size=2, ddp_backend="gloo", logging_steps=1
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
    "weights": {n: p.detach() for n, p in trainer.model.named_parameters()},
    "updates": stats["hessian_updates"],
    "distributed": str(trainer.accelerator.distributed_type),
}
torch.save(state, out / f"rank{rank}.pt")
