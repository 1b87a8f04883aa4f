"""One or more steps of a plain loop on 2 gloo ranks, in a named layout; each rank writes what it ended with."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.nn.functional as F
from support import FixedLabels, Toy, end_of_rank, toy_batches, toy_loss
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sophia_integrations import GaussNewtonBartlett, Hutchinson, SophiaG
from sophia_integrations.curvature import Readout

out, layout, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = Toy()
wrapped, group, data_rank, readout = model, None, rank, Readout(FixedLabels())
if layout == "ddp-same-rows":
    data_rank, readout = 0, Readout()
if layout == "tp":
    plan = {"net.0": ColwiseParallel(), "net.2": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    alone = [dist.new_group([r]) for r in range(2)]
    group, data_rank = alone[rank], 0
elif layout == "empty":
    pass
elif layout.startswith("fsdp"):
    options = {"reshard_after_forward": layout != "fsdp-no-reshard"}
    if layout == "fsdp-mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.net:
        if list(layer.parameters()):
            fully_shard(layer, **options)
    fully_shard(model, **options)
else:
    options = {
        "ddp": {},
        "ddp-same-rows": {},
        "ddp-hutchinson": {},
        "ddp-views": {"gradient_as_bucket_view": True},
        "ddp-static": {"static_graph": True},
        "ddp-unused": {"find_unused_parameters": True},
    }[layout]
    wrapped = DistributedDataParallel(model, **options)
estimator = GaussNewtonBartlett(model, fraction=1.0, units=64, readout=readout, process_group=group)
if layout == "ddp-hutchinson":
    estimator = Hutchinson(model, fraction=1.0, units=64, loss=toy_loss)
optimizer = SophiaG(wrapped.parameters(), lr=1e-2, betas=(0.9, 0.5), rho=0.1, estimator=estimator, hessian_interval=2)
for step in range(steps):
    unseen = {"fsdp-one-unseen": [1], "fsdp-none-seen": [0, 1]}.get(layout, []) if step == 0 else []
    model.train(rank not in unseen)
    if layout == "empty" and rank == 1:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    else:
        rows = 0 if (layout, rank, step) == ("fsdp-one-without-rows", 1, 0) else 4
        for x, labels in toy_batches(step, data_rank, rows):
            F.cross_entropy(wrapped(x, labels=labels), labels, reduction="sum").backward()
    if layout == "empty":
        for p in model.parameters():
            dist.all_reduce(p.grad)
    grads = [p.grad for p in model.parameters()]
    before = [None if g is None else g.clone() for g in grads]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    for g, b in zip(grads, before, strict=True):
        assert g is None or torch.equal(getattr(g, "_local_tensor", g), getattr(b, "_local_tensor", b))
    optimizer.zero_grad()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


_NOT_NUMBERS = ("hessian_seconds", "hessian_quantiles", "ratio_quantiles")
stats = {k: float(v) for k, v in optimizer.stats().items() if k not in _NOT_NUMBERS}
h = {n: full(optimizer.state[p]["hessian"]) for n, p in model.named_parameters() if p in optimizer.state}
weights = {n: full(p.detach()) for n, p in model.named_parameters()}
if len(sys.argv) > 4:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=sys.argv[4])
m = {n: full(optimizer.state[p]["exp_avg"]) for n, p in model.named_parameters() if p in optimizer.state}
torch.save({"h": h, "m": m, "weights": weights, "stats": stats}, out / f"rank{rank}.pt")
end_of_rank()
