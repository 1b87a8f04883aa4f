"""Steps of a plain loop on 2 gloo ranks, one run for each LAYOUT:STEPS, and `soak`; each rank writes its results."""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.nn.functional as F
from soak import soak
from support import FixedLabels, Toy, end_of_rank, toy_batches, toy_loss
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sophia_integrations import GaussNewtonBartlett, Hutchinson, SophiaG
from sophia_integrations.curvature import Readout

OUT = Path(sys.argv[1])
DDP_OPTIONS = {
    "ddp": {},
    "ddp-same-rows": {},
    "ddp-hutchinson": {},
    "ddp-views": {"gradient_as_bucket_view": True},
    "ddp-static": {"static_graph": True},
    "ddp-unused": {"find_unused_parameters": True},
}


def lay_out(model, layout):
    """What is called in place of `model`, its estimator, and the rank whose rows this rank sees."""
    rank = dist.get_rank()
    wrapped, group, data_rank, readout = model, None, rank, Readout(FixedLabels())
    if layout == "ddp-same-rows":
        data_rank, readout = 0, Readout()
    if layout == "tp":
        plan = {"net.0": ColwiseParallel(), "net.2": RowwiseParallel()}
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
        alone = [dist.new_group([r]) for r in range(2)]
        group, data_rank = alone[rank], 0
    elif layout.startswith("fsdp"):
        options = {"reshard_after_forward": layout != "fsdp-no-reshard"}
        if layout == "fsdp-mixed":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.net:
            if list(layer.parameters()):
                fully_shard(layer, **options)
        fully_shard(model, **options)
    elif layout != "empty":
        wrapped = DistributedDataParallel(model, **DDP_OPTIONS[layout])
    if layout == "ddp-hutchinson":
        return wrapped, Hutchinson(model, fraction=1.0, units=64, loss=toy_loss), data_rank
    return wrapped, GaussNewtonBartlett(model, fraction=1.0, units=64, readout=readout, process_group=group), data_rank


def backward(model, wrapped, layout, step, data_rank):
    """The gradient of one step; in some layouts a rank has no rows, or its estimator does not see them."""
    rank = dist.get_rank()
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


def step_once(model, optimizer):
    """A step, which leaves the gradients as they were."""
    grads = [p.grad for p in model.parameters()]
    before = [None if g is None else g.clone() for g in grads]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    for g, b in zip(grads, before, strict=True):
        assert g is None or torch.equal(getattr(g, "_local_tensor", g), getattr(b, "_local_tensor", b))
    optimizer.zero_grad()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def run(layout, steps):
    torch.manual_seed(0)
    model = Toy()
    wrapped, estimator, data_rank = lay_out(model, layout)
    options = dict(lr=1e-2, betas=(0.9, 0.5), rho=0.1, hessian_interval=2)
    optimizer = SophiaG(wrapped.parameters(), estimator=estimator, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            backward(model, wrapped, layout, step, data_rank)
            step_once(model, optimizer)
    not_numbers = ("hessian_seconds", "hessian_quantiles", "ratio_quantiles")
    if layout == "fsdp":
        model_state, optimizer_state = get_state_dict(model, optimizer)
        checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=OUT / f"fsdp:{steps}")
    state = {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}
    return {
        "stats": {k: float(v) for k, v in optimizer.stats().items() if k not in not_numbers},
        "h": {n: full(s["hessian"]) for n, s in state.items()},
        "m": {n: full(s["exp_avg"]) for n, s in state.items()},
        "weights": {n: full(p.detach()) for n, p in model.named_parameters()},
        "said": [str(warning.message) for warning in caught],
    }


dist.init_process_group("gloo")
results = {}
for wanted in sys.argv[2:]:
    layout, _, steps = wanted.partition(":")
    results[wanted] = soak() if layout == "soak" else run(layout, int(steps))
torch.save(results, OUT / f"rank{dist.get_rank()}.pt")
end_of_rank()
