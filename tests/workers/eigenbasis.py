"""The eigenbasis on 2 gloo ranks, in several ways one after the other; each rank writes what it ended with."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import FixedLabels, Toy, end_of_rank, toy_batches
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sophia_integrations import GaussNewtonBartlett, SophiaG, param_groups
from sophia_integrations.curvature import Readout
from sophia_integrations.optim import eigenvectors

dist.init_process_group("gloo")
rank = dist.get_rank()
sent = []
broadcast = dist.broadcast
dist.broadcast = lambda *a, **k: sent.append(1) or broadcast(*a, **k)


def build(group=None, readout=None, **options):
    torch.manual_seed(0)
    model = Toy()
    wrapped = DistributedDataParallel(model)
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=64, readout=readout, process_group=group)
    common = dict(lr=1e-2, hessian_interval=2, estimator=estimator)
    groups = param_groups(model, basis="eigen", basis_warmup=2, basis_interval=3, **options)
    return model, wrapped, SophiaG(groups, **common)


def train(model, wrapped, optimizer, steps):
    for step in range(steps):
        for x, labels in toy_batches(step, rank):
            F.cross_entropy(wrapped(x, labels=labels), labels, reduction="sum").backward()
        grads = [(p, p.grad, p.grad.clone()) for p in model.parameters()]
        optimizer.step()
        assert all(p.grad is g and torch.equal(g, copy) for p, g, copy in grads)
        optimizer.zero_grad()
    stats = optimizer.stats()
    return {
        "state": {n: dict(optimizer.state[p]) for n, p in model.named_parameters()},
        "weights": {n: p.detach() for n, p in model.named_parameters()},
        "stats": {k: float(stats[k]) for k in ("win_rate", "curvature_share", "rho", "hessian_norm")},
        "batch_predictions": optimizer.progress.batch_predictions,
        "sent": len(sent),
    }


results = {"first": train(*build(readout=Readout(FixedLabels()), betas=(0.9, 0.0)), 1)}
sent.clear()
results["together"] = train(*build(), 9)


def perturbed(original):
    """Other eigenvectors of the same factors on rank 1, as another processor might compute: other signs, and turned."""

    def eigenvectors(*arguments):
        vectors = original(*arguments)
        if rank == 1:
            generator = torch.Generator().manual_seed(len(sent))
            turn = torch.randn(vectors.shape, generator=generator) * 0.1 + torch.eye(vectors.shape[-1])
            vectors = -torch.linalg.qr(vectors @ turn)[0].contiguous()
        return vectors

    return eigenvectors


for name in ("_eigenvectors", "_power_iteration"):
    setattr(eigenvectors, name, perturbed(getattr(eigenvectors, name)))
for way, group in (("perturbed", None), ("perturbed group", dist.new_group([0, 1]))):
    sent.clear()
    results[way] = train(*build(group), 9)

torch.manual_seed(0)
model = Toy()
optimizer = SophiaG(param_groups(model, basis="eigen"), estimator=GaussNewtonBartlett(model))
names = {p: name for name, p in model.named_parameters()}
fully_shard(model)
try:
    SophiaG(param_groups(model, basis="eigen"))
except ValueError as error:
    results["sharded, then built"] = str(error)
for group in optimizer.param_groups:  # what accelerate does with an optimizer that was built before
    group["params"] = [model.get_parameter(names[p]) for p in group["params"]]
x, labels = toy_batches(0, rank)[0]
F.cross_entropy(model(x, labels=labels), labels).backward()
before = [p.full_tensor().clone() for p in model.parameters()]
try:
    optimizer.step()
except ValueError as error:
    results["built, then sharded"] = str(error)
assert all(torch.equal(p.full_tensor(), b) for p, b in zip(model.parameters(), before, strict=True))
torch.save(results, Path(sys.argv[1]) / f"rank{rank}.pt")
end_of_rank()
