"""Any transformers causal language model as a LightningModule, with decay groups and a warm-up schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .. import models
from ..errors import first_line, nearest
from ..optim import SophiaG, param_groups
from .exact_resume import ExactResume


class CausalLM(LightningModule):
    """A causal language model from a transformers config or a checkpoint; batches are its keyword arguments.

    Weight decay applies to matrices and embeddings, not to biases and norms, as in the Hugging Face Trainer. The
    learning rate rises linearly for `warmup_steps` optimizer steps and then follows `schedule` to the end of
    training. Logs `train_loss` and `val_loss`. Brings `ExactResume` with it. A pretrained model is loaded in float32,
    and trained in what the Trainer's `precision` says. With `peft` and `pretrained`, Lightning's checkpoints hold the
    adapters alone.

    Args:
        config: a transformers config with its `model_type`, for a model from scratch.
        pretrained: path or hub id of a model to go on from, instead of `config`.
        optimizer: makes the optimizer from parameters, or from `groups`.
        warmup_steps: optimizer steps until the full learning rate.
        schedule: what follows: half a cosine to 0, a line to 0, or no change.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        peft: the words of `peft.LoraConfig`, such as `r` and `target_modules`; only the adapters are trained then.
        revision: branch, tag or commit of `pretrained` on the hub.
        trust_remote_code: let `pretrained` run the Python code that it brings along.
        groups: the words of `sophia_integrations.param_groups`, such as `basis: eigen`: matrices follow Sophia and all
            else AdamW. By default one rule trains everything.

    Raises:
        ValueError: not exactly one of `config` and `pretrained` is given, the config lacks `model_type`, `pretrained`
            cannot be loaded, or `peft` has a word that LoraConfig does not know.

    Example:
        >>> sizes = dict(n_layer=1, n_head=1, n_embd=8, vocab_size=16, bos_token_id=0, eos_token_id=0)
        >>> module = CausalLM({"model_type": "gpt2", **sizes})
        >>> type(module.model).__name__
        'GPT2LMHeadModel'
    """

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        optimizer: Callable[[Iterable], Optimizer] = SophiaG,
        warmup_steps: int = 0,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        gradient_checkpointing: bool = False,
        peft: dict[str, Any] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        groups: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (config is None) == (pretrained is None):
            raise ValueError("CausalLM needs either config or pretrained.")
        if config is not None and "model_type" not in config:
            raise ValueError("CausalLM's config needs a model_type, for example gpt2 or llama.")
        if schedule not in _SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, got {schedule!r}.")
        self.save_hyperparameters(ignore=["optimizer"])
        self._make_optimizer, self.groups = optimizer, groups
        self.warmup_steps, self.schedule = warmup_steps, schedule
        if peft is not None:
            _require_known(peft)
        self.model = _build(config, pretrained, revision=revision, trust_remote_code=trust_remote_code)
        if gradient_checkpointing:
            newer = getattr(self.model, "activation_checkpointing_enable", None)
            (newer or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        if peft is not None:
            self.model = models.with_adapters(self.model, {"task_type": "CAUSAL_LM", **peft})
            self.strict_loading = pretrained is None
        self.model.train()

    def configure_callbacks(self) -> list[Callback]:
        return [ExactResume()]

    def configure_model(self) -> None:
        """Shard the model with FSDP2 when `ModelParallelStrategy` runs it, one unit for each block."""
        if self.device_mesh is None or hasattr(self.model, "set_requires_gradient_sync"):
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for block in _blocks(self.model):
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = self.model(**batch).loss
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> dict[str, Any]:
        if self.groups is not None:
            trained: Iterable = param_groups(self.model, **self.groups)
        else:
            trained = (p for p in self.parameters() if p.requires_grad)
        return self.finish_optimizer(self._make_optimizer(trained))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.strict_loading:
            frozen = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
            kept = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name not in frozen}
            checkpoint["state_dict"] = kept

    def finish_optimizer(self, optimizer: Optimizer) -> dict[str, Any]:
        """Exempt biases and norms from weight decay in an optimizer of one group, and add the schedule."""
        if len(optimizer.param_groups) == 1:
            group = optimizer.param_groups[0]
            exempt = [p for p in group["params"] if p.ndim < 2]
            kept = [p for p in group["params"] if p.ndim >= 2]
            if exempt and kept:
                group["params"] = kept
                options = {k: v for k, v in group.items() if k in optimizer.defaults}
                optimizer.add_param_group({**options, "params": exempt, "weight_decay": 0.0})
        if self.schedule == "constant" and not self.warmup_steps:
            return {"optimizer": optimizer}
        total = self.trainer.estimated_stepping_batches
        scheduler = LambdaLR(optimizer, lambda step: _factor(step, self.warmup_steps, total, self.schedule))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def _factor(step: int, warmup: int, total: float, schedule: str) -> float:
    """The learning rate's factor at an optimizer step, 0 at the first of a warm-up and at the end of training."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup) if math.isfinite(total) else 0.0
    return _SCHEDULES[schedule](min(1.0, progress))


def _build(config: dict[str, Any] | None, pretrained: str | None, **options: Any) -> nn.Module:
    if config is not None:
        return models.build_model("AutoModelForCausalLM", config=config)
    try:
        return models.build_model("AutoModelForCausalLM", pretrained=pretrained, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"CausalLM's pretrained: {pretrained!r} cannot be loaded: {first_line(error)}") from error


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The entries of the outermost lists of modules: the transformer's layers."""
    for part in model.children():
        yield from part if isinstance(part, nn.ModuleList) else _blocks(part)


def _require_known(words: dict[str, Any]) -> None:
    from peft import LoraConfig

    known = [item.name for item in dataclasses.fields(LoraConfig) if item.init]
    for word in words:
        if word not in known:
            near = nearest(str(word), known)
            hint = f"; did you mean {near}?" if near else "."
            raise ValueError(f"CausalLM's peft takes the words of peft.LoraConfig, which has no {word!r}{hint}")
