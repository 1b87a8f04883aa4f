"""Trainer runs, each in a child of this process: one to the end, one that dies by SIGKILL, one that goes on from it.

For each DTYPE:OPTIM a folder with straight.pt and resumed.pt: weights, state and losses at the end.
"""

import os
import signal
import sys
import warnings
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


def run(out, mode, dtype, optim):
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
    counted = ("step", "hessian_updates", "hessian_skipped", "auto_rho")
    torch.save(
        {
            "weights": [p.detach() for p in trainer.model.parameters()],
            "state": [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]],
            "counters": {k: getattr(optimizer.progress, k) for k in counted},
            "losses": {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e},
        },
        out / f"{mode}.pt",
    )


def in_a_child(*arguments):
    """Run in a process of its own, which has imported everything already; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(*arguments)
            status = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


warnings.simplefilter("ignore")
for name in sys.argv[2:]:
    straight, broken = (Path(sys.argv[1]) / name / part for part in ("straight", "broken"))
    for folder, mode, ends in ((straight, "straight", 0), (broken, "killed", signal.SIGKILL), (broken, "resumed", 0)):
        folder.mkdir(parents=True, exist_ok=True)
        assert in_a_child(folder, mode, *name.split(":")) == ends, (name, mode)
