"""Trainer runs on 2 gloo ranks, one for each KIND:LAYOUT:STEPS; each rank writes its first ĥ and what it ended with."""

import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from support import end_of_rank
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler
from workers.lightning_support import (
    Classifier,
    Draw,
    LanguageModel,
    Rows,
    causal_lm,
    hessian_of,
    make_trainer,
    sophia_of,
    token_rows,
)

warnings.simplefilter("ignore")
DDP_OPTIONS = {
    "ddp": {},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
}


class Sharded(Classifier):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net.net[0], self.net.net[2], self.net):
            fully_shard(layer, mesh=mesh)


class Split(Classifier):
    def configure_model(self):
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.net.net, self.device_mesh["tensor_parallel"], plan)


class KeepFirst(pl.Callback):
    h = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.h = self.h or {n: full(h).clone() for n, h in hessian_of(trainer, pl_module).items()}


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def run(kind, layout, steps):
    kinds = {"model": LanguageModel, "logits": Classifier, "sharded": Sharded, "split": Split, "causal": causal_lm}
    module = kinds[kind]()
    ranks = (2, int(os.environ["RANK"]))
    if layout in DDP_OPTIONS:
        strategy = DDPStrategy(process_group_backend="gloo", **DDP_OPTIONS[layout])
    else:
        sizes = {"fsdp2": (2, 1), "tensor": (1, 2)}[layout]
        strategy = ModelParallelStrategy(*sizes, process_group_backend="gloo")
        ranks = ranks if layout == "fsdp2" else (1, 0)
    first = KeepFirst()
    trainer = make_trainer(Draw(), first, max_steps=steps, devices=2, strategy=strategy)
    rows = token_rows() if kind in ("model", "causal") else Rows()
    sampler = DistributedSampler(rows, *ranks, shuffle=False)
    trainer.fit(module, DataLoader(rows, batch_size=4, sampler=sampler))
    return {
        "h": first.h,
        "weights": {n: full(p.detach()) for n, p in module.named_parameters()},
        "updates": sophia_of(trainer).stats()["hessian_updates"],
    }


results = {}
for wanted in sys.argv[2:]:
    kind, layout, steps = wanted.split(":")
    results[wanted] = run(kind, layout, int(steps))
torch.save(results, Path(sys.argv[1]) / f"rank{dist.get_rank()}.pt")
end_of_rank()
