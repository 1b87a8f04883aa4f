"""Two gloo ranks train with dropout, each from its own random state; a second Trainer goes on from the middle."""

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from support import end_of_rank
from torch.utils.data import DataLoader, DistributedSampler
from workers.lightning_support import Record, causal_lm, make_trainer, token_rows

warnings.simplefilter("ignore")
os.environ.pop("PL_GLOBAL_SEED", None)  # with which Lightning would give both ranks the same masks
out = Path(sys.argv[1])


def losses(seed, checkpoint=None):
    module, record, rows = causal_lm(dropout=0.3), Record(), token_rows(32)
    saver = ModelCheckpoint(out, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    options = dict(devices=2, strategy=DDPStrategy(process_group_backend="gloo"), enable_checkpointing=True)
    trainer = make_trainer(record, saver, max_steps=8, **options)
    torch.manual_seed(seed + trainer.global_rank)
    loader = DataLoader(rows, batch_size=4, sampler=DistributedSampler(rows, 2, trainer.global_rank, shuffle=False))
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return record.losses


straight = losses(1)
masks = torch.get_rng_state().tolist()
resumed = losses(7, out / "step=4.ckpt")
rank = dist.get_rank()
torch.save({"straight": straight, "resumed": resumed, "masks": masks}, out / f"rank{rank}.pt")
end_of_rank()
