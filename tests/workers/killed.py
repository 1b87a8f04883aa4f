"""24 steps in the eigenbasis, a checkpoint every 4. "kill": dies in the 15th; "resume": goes on, then runs whole."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from sophia_integrations import GaussNewtonBartlett, SophiaG, param_groups
from sophia_integrations.optim import functional

STEPS = 24


def run(path, resume=False, killed_in=None):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(24, 12), torch.nn.Dropout(0.2), torch.nn.Linear(12, 11)]
    model = torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Flatten(), *layers).bfloat16()
    groups = param_groups(model, basis="eigen", basis_warmup=5, basis_interval=3)
    optimizer = SophiaG(groups, lr=1e-2, hessian_interval=5, estimator=GaussNewtonBartlett(model))
    scheduler = CosineAnnealingLR(optimizer, STEPS)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    start = 0
    if resume:
        saved = torch.load(path)
        start = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
    for step in range(start, STEPS):
        tokens = torch.randint(11, (16, 3))
        F.cross_entropy(model(tokens).float(), tokens[:, 0]).backward()
        if step == killed_in:  # the matrices have moved, AdamW's group has not
            functional.adamw_update = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if (step + 1) % 4 == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"step": step + 1, "rng": torch.get_rng_state(), **state}, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)


folder = Path(sys.argv[1])
if sys.argv[2] == "kill":
    run(folder / "broken.pt", killed_in=14)
run(folder / "broken.pt", resume=True)
run(folder / "whole.pt")
