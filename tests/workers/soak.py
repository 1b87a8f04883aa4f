"""300 steps on 2 ranks with random shapes, masked batches and NaN losses: counters and whether all is finite."""

import random
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import VOCABULARY, Toy
from torch.nn.parallel import DistributedDataParallel

from sophia_integrations import GaussNewtonBartlett, SophiaG


def soak():
    torch.manual_seed(0)
    model = Toy()
    wrapped = DistributedDataParallel(model)
    optimizer = SophiaG(model.parameters(), lr=1e-3, hessian_interval=3, estimator=GaussNewtonBartlett(model))
    draw = random.Random(dist.get_rank())
    seen = {"masked": 0, "nan": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(300):
            for accumulated in range(2):
                x, labels = batch(draw, seen)
                with wrapped.no_sync() if accumulated == 0 else torch.enable_grad():
                    loss = F.cross_entropy(wrapped(x, labels=labels), labels, reduction="sum") / len(x)
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    tensors = [t for p in model.parameters() for t in (p.detach(), *optimizer.state[p].values())]
    return {
        "counters": {k: getattr(optimizer.progress, k) for k in ("step", "hessian_updates", "hessian_skipped")},
        "finite": all(torch.isfinite(t).all() for t in tensors),
        "seen": seen,
        "weights": [p.detach() for p in model.parameters()],
        "skipped_coordinates": int(optimizer.stats()["nonfinite_gradients"]),
    }


def batch(draw, seen):
    """A micro-batch of 1 to 9 rows; now and then without a label or with a NaN, which `seen` counts."""
    rows = draw.randint(1, 9)
    x, labels = torch.randn(rows, 6), torch.randint(VOCABULARY, (rows,))
    if draw.random() < 0.05:
        labels[:] = -100
        seen["masked"] += 1
    if draw.random() < 0.01:
        x[0, 0] = float("nan")
        seen["nan"] += 1
    return x, labels
