"""A Trainer run that may kill itself with SIGKILL and may resume; writes weights, state and losses at the end."""

import os
import signal
import sys
from pathlib import Path

import torch
from support import make_trainer, sophia_of, tiny_model
from transformers import TrainerCallback


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


out, mode, dtype, optim = Path(sys.argv[1]), *sys.argv[2:5]
extra = ",basis_interval=3,basis_warmup=2" if optim == "sophia_eigen" else ",rho=0.05"
trainer = make_trainer(
    out,
    model=tiny_model(resid_pdrop=0.1).to(getattr(torch, dtype)),
    callbacks=[KillAt(13)] if mode == "killed" else None,
    optim=optim,
    optim_args=f"hessian_interval=4{extra}",
    max_steps=20,
    logging_steps=1,
    save_strategy="steps",
    save_steps=10,
    gradient_accumulation_steps=2,
)
trainer.train(resume_from_checkpoint=str(out / "checkpoint-10") if mode == "resumed" else None)
optimizer = sophia_of(trainer)
torch.save(
    {
        "weights": [p.detach() for p in trainer.model.parameters()],
        "state": [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]],
        "counters": {
            k: getattr(optimizer.progress, k) for k in ("step", "hessian_updates", "hessian_skipped", "auto_rho")
        },
        "losses": {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e},
    },
    out / f"{mode}.pt",
)
