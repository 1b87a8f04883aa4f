"""24 steps in the eigenbasis with a checkpoint every 4: whole, killed by itself in the 15th, or resumed after that."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from sophia_integrations import GaussNewtonBartlett, SophiaG, param_groups

path, mode = Path(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Embedding(11, 8),
    torch.nn.Flatten(),
    torch.nn.Linear(24, 12),
    torch.nn.Dropout(0.2),
    torch.nn.Linear(12, 11),
).bfloat16()
groups = param_groups(model, basis="eigen", basis_warmup=5, basis_interval=3)
optimizer = SophiaG(groups, lr=1e-2, hessian_interval=5, estimator=GaussNewtonBartlett(model))
scheduler = CosineAnnealingLR(optimizer, 24)


def save(step):
    new = path.with_suffix(".new")
    state = dict(step=step, model=model.state_dict(), optimizer=optimizer.state_dict())
    torch.save({**state, "scheduler": scheduler.state_dict(), "rng": torch.get_rng_state()}, new)
    os.replace(new, path)


start = 0
if mode == "resume":
    saved = torch.load(path)
    start = saved["step"]
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    torch.set_rng_state(saved["rng"])
for step in range(start, 24):
    tokens = torch.randint(11, (16, 3))
    F.cross_entropy(model(tokens).float(), tokens[:, 0]).backward()
    if mode == "kill" and step == 14:
        optimizer._update_adamw = lambda group: os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    if (step + 1) % 4 == 0:
        save(step + 1)
