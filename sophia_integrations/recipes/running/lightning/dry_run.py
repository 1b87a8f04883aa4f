"""``--dry-run`` of a LightningCLI config: LightningCLI builds it, nothing is fitted."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..folder import RunFolder
from ..memory import weigh
from ..plan import Batch, Length, Passes, Plan, disk_in_words
from .run import build, quiet
from .settings import for_this_run

if TYPE_CHECKING:
    from ....lightning.cli import SophiaCLI
    from ....text.prepare import Prepared


def build_plan(
    settings: dict[str, Any], aside: RunFolder, folder: RunFolder, say: Callable[[str], object], nproc: int
) -> list[str]:
    """Builds everything in the folder `aside`; returns what to say of a batch and of what training would take."""
    import torch

    from ....lightning import TextDataModule
    from ..batch_text import describe_batch, first_batch

    here, processes = for_this_machine(settings)
    model = (here.get("model") or {}).get("init_args") or {}
    with quiet(), torch.device("meta") if model.get("config") else torch.device("cpu"):
        cli = build(for_this_run(here, aside), [])
    if not isinstance(cli.datamodule, TextDataModule):
        return [f"data: {type(cli.datamodule).__name__} prepares itself when training begins"]
    data = cli.datamodule
    data.say = say
    data.prepare_data()
    assert data.prepared is not None
    plan = _plan(cli, data.prepared, data.batch_size, max(processes, nproc))
    shown = describe_batch(first_batch(data.prepared, data.batch_size, data.seed), data.tokenizer_object)
    return [*shown, *plan.describe(), disk_in_words(plan, folder)]


def for_this_machine(settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The settings for one process here, without a GPU where there is none, and how many processes they ask for."""
    import torch

    here = copy.deepcopy(settings)
    trainer = here.setdefault("trainer", {})
    devices, nodes = trainer.pop("devices", 1), trainer.pop("num_nodes", 1)
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    trainer.pop("strategy", None)
    if not torch.cuda.is_available():
        trainer["accelerator"] = "cpu"
        if str(trainer.get("precision", "")).startswith("16"):
            del trainer["precision"]
    return here, count * nodes


def _plan(cli: SophiaCLI, data: Prepared, rows: int, processes: int) -> Plan:
    from torch import nn

    from ....lightning import CausalLM
    from ....optim import param_groups
    from .finish import model_name

    module, trainer = cli.model, cli.trainer
    make = module._make_optimizer if isinstance(module, CausalLM) else None
    groups = param_groups(module.model, **module.groups) if getattr(module, "groups", None) is not None else None
    optimizer = make([nn.Parameter(nn.Linear(1, 1).weight.detach())]) if make is not None else None
    batch = Batch(rows, trainer.accumulate_grad_batches, processes, data.tokens_per_row)
    per_epoch = max(1, math.ceil(len(data.train) // (rows * processes) / batch.accumulated))  # type: ignore[arg-type]
    steps = trainer.max_steps if trainer.max_steps > 0 else (trainer.max_epochs or 1) * per_epoch
    kept = max((abs(getattr(callback, "save_top_k", 1)) for callback in trainer.checkpoint_callbacks), default=0)
    return Plan(
        model_name(module),
        type(optimizer).__name__ if optimizer is not None else "its own",
        weigh(module, make, groups),
        batch,
        Length(steps, steps / per_epoch, len(data.train)),  # type: ignore[arg-type]
        _passes(optimizer, trainer.callbacks),
        kept,
    )


def _passes(optimizer: Any, callbacks: list[Any]) -> Passes | None:
    from ....lightning import SophiaCallback, SophiaG, SophiaH

    if not isinstance(optimizer, SophiaG):
        return None
    ours = next((callback for callback in callbacks if isinstance(callback, SophiaCallback)), SophiaCallback())
    cost = 2.0 if isinstance(optimizer, SophiaH) else 1.0
    return Passes(optimizer.param_groups[0]["hessian_interval"], ours.fraction, ours.units, cost)
