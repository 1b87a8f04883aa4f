"""300 steps on 2 ranks with random shapes, masked batches and NaN losses; writes counters and whether all is finite."""

import random
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import VOCABULARY, Toy, end_of_rank
from torch.nn.parallel import DistributedDataParallel

from sophia_integrations import GaussNewtonBartlett, SophiaG

warnings.simplefilter("ignore")
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = Toy()
wrapped = DistributedDataParallel(model)
optimizer = SophiaG(model.parameters(), lr=1e-3, hessian_interval=3, estimator=GaussNewtonBartlett(model))
draw = random.Random(rank)
seen = {"masked": 0, "nan": 0}
for _ in range(300):
    for accumulated in range(2):
        rows = draw.randint(1, 9)
        x, labels = torch.randn(rows, 6), torch.randint(VOCABULARY, (rows,))
        if draw.random() < 0.05:
            labels[:] = -100
            seen["masked"] += 1
        if draw.random() < 0.01:
            x[0, 0] = float("nan")
            seen["nan"] += 1
        context = wrapped.no_sync() if accumulated == 0 else torch.enable_grad()
        with context:
            loss = F.cross_entropy(wrapped(x, labels=labels), labels, reduction="sum") / rows
            loss.backward()
    optimizer.step()
    optimizer.zero_grad()
stats = optimizer.stats()
finite = all(torch.isfinite(t).all() for p in model.parameters() for t in (p.detach(), *optimizer.state[p].values()))
torch.save(
    {
        "counters": {k: getattr(optimizer.progress, k) for k in ("step", "hessian_updates", "hessian_skipped")},
        "finite": finite,
        "seen": seen,
        "weights": [p.detach() for p in model.parameters()],
        "skipped_coordinates": int(stats["nonfinite_gradients"]),
    },
    Path(sys.argv[1]) / f"rank{rank}.pt",
)
end_of_rank()
