"""FSDP2 and DDP through transformers and accelerate on 2 gloo ranks, one run for each WHAT; every rank writes its own.

Accelerate shards on accelerators only; on a CPU it takes FSDP for DDP without a word. `sharding_on_cpu` renames the
distributed type, and nothing else: `fully_shard`, the collectives and the checkpoints are the real ones.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from support import (
    FixedLabels,
    Toy,
    end_of_rank,
    lora_llama,
    make_trainer,
    sophia_of,
    tiny_model,
    token_rows,
    toy_batches,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader

from sophia_integrations import GaussNewtonBartlett, SophiaG

OUT = Path(sys.argv[1])
ROWS, LR = 2, 1e-3


def sharding_on_cpu():
    """From here on accelerate shards on the CPU as it does elsewhere."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True, backend="gloo")
    PartialState._shared_state.update(distributed_type=DistributedType.MULTI_GPU, device=torch.device("cpu"))


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def watch(model, number):
    """The token ids of the first `number` micro-batches, filled in as the model is called."""
    seen = []

    def keep(module, args, kwargs):
        if module.training and torch.is_grad_enabled() and len(seen) < number:
            seen.append(kwargs["input_ids"])

    model.register_forward_pre_hook(keep, with_kwargs=True)
    return seen


def result(model, optimizer, seen=(), losses=(), kind=""):
    stats = optimizer.stats()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    state = {n: {k: full(v) for k, v in optimizer.state[p].items()} for n, p in named}
    return {
        "type": type(model).__name__,
        "kind": kind,
        "seen": torch.cat(list(seen)) if len(seen) else None,
        "h": {n: s["hessian"] for n, s in state.items()},
        "m": {n: s["exp_avg"] for n, s in state.items()},
        "weights": {n: full(p.detach()).clone() for n, p in model.named_parameters()},
        "updates": stats["hessian_updates"],
        "win_rate": float(stats["win_rate"]),
        "norm": float(stats["hessian_norm"]),
        "losses": list(losses),
    }


def sharded_trainer(folder, model, **options):
    sharding_on_cpu()
    layer = "GPT2Block" if model.config.model_type == "gpt2" else "LlamaDecoderLayer"
    fsdp = {"version": 2, **options.pop("fsdp_config", {})}
    if transformers.__version__.startswith("4."):  # it leaves these to `accelerate launch`, which passes them so
        os.environ.update({f"FSDP_{name.upper()}": str(value) for name, value in fsdp.items()})
        config = {"fsdp": "full_shard auto_wrap"}
    else:
        config = {"fsdp": True}
    config["fsdp_config"] = {**fsdp, "transformer_layer_cls_to_wrap": [layer]}
    defaults = dict(per_device_train_batch_size=ROWS, logging_steps=1, ddp_backend="gloo")
    return make_trainer(
        folder, model=model, accelerator_config={"use_configured_state": True}, **{**config, **defaults, **options}
    )


def trained(trainer, accumulation, resume=None):
    seen = watch(trainer.model, accumulation)
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    kind = f"{trainer.accelerator.distributed_type.name} {getattr(trainer.accelerator, 'is_fsdp2', False)}"
    return result(trainer.model, sophia_of(trainer), seen, losses, kind)


def through_trainer(accumulation, **options):
    options = {"fixed_labels": True, "max_steps": 1, **options}
    model = options.pop("model", None) or tiny_model("llama")
    trainer = sharded_trainer(OUT, model, gradient_accumulation_steps=accumulation, **options)
    return trained(trainer, accumulation)


def twice():
    trainer = sharded_trainer(OUT, tiny_model(), max_steps=6)
    trained(trainer, 1)
    return trained(trainer, 1)


def saved_llama(**sizes):
    """A model that `from_pretrained` splits, as transformers 5 does by itself."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    folder = OUT / "tiny-llama"
    PartialState(cpu=True, backend="gloo")
    if dist.get_rank() == 0:
        tiny_model("llama").save_pretrained(folder)
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))


def at_load():
    """Transformers' own FSDP2, which accelerate does not know of: it works on a CPU as it is."""
    options = dict(logging_steps=1, per_device_train_batch_size=ROWS, ddp_backend="gloo")
    trainer = make_trainer(OUT, model=saved_llama(fsdp_size=2), fixed_labels=True, max_steps=1, **options)
    return trained(trainer, 1)


def own_loop(kind, precision="no"):
    """Accelerate without a Trainer: 2 steps with k = 2, the model, the optimizer and the data given to `prepare`."""
    if kind == "fsdp2":
        sharding_on_cpu()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["GPT2Block"]
        )
        accelerator = Accelerator(fsdp_plugin=plugin, cpu=True, mixed_precision=precision)
    else:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = tiny_model()
    seen = watch(model, 1 if kind == "fsdp2" else 2)
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=64)
    estimator.readout.likelihood = FixedLabels()
    optimizer = SophiaG(model.parameters(), lr=LR, hessian_interval=2, estimator=estimator)
    loader = DataLoader(token_rows(16), batch_size=ROWS)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, sophia = [], optimizer.optimizer
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if sophia.stats()["hessian_updates"]:
            break
    name = f"{accelerator.distributed_type.name} {accelerator.is_fsdp2}"
    return result(accelerator.unwrap_model(model), sophia, seen, losses, name)


def resumed(kind):
    """8 steps with a checkpoint at step 4, and the last 4 again by another Trainer with other weights."""
    folder = OUT / kind
    ended = []
    for model, checkpoint in ((tiny_model(), None), (moved(tiny_model()), str(folder / "checkpoint-4"))):
        trainer = sharded_trainer(
            folder,
            model,
            max_steps=8,
            save_strategy="steps",
            save_steps=4,
            optim_args="hessian_interval=3,hessian_units=2",
            fsdp_config={"state_dict_type": f"{kind.upper()}_STATE_DICT"},
        )
        ended.append(trained(trainer, 1, checkpoint))
    return ended


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


def plain_fsdp1():
    """A loop of its own under FSDP1, whose ranks mask different numbers of rows."""
    PartialState(cpu=True, backend="gloo")
    torch.manual_seed(0)
    wrapped = FullyShardedDataParallel(Toy(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = SophiaG(wrapped.parameters(), lr=LR, estimator=GaussNewtonBartlett(wrapped, fraction=1.0, units=64))
    for x, labels in toy_batches(0, dist.get_rank()):
        torch.nn.functional.cross_entropy(wrapped(x, labels=labels), labels).backward()
    optimizer.step()


def tensor_parallel():
    sharding_on_cpu()
    trainer = make_trainer(
        OUT, model=saved_llama(tp_size=2), accelerator_config={"use_configured_state": True}, ddp_backend="gloo"
    )
    trainer.train()


def refused(run):
    """The sentence that `run` raises."""
    try:
        run()
    except ValueError as error:
        return str(error)
    return "not refused"


RUNS = {
    "trainer": lambda: through_trainer(1),
    "accumulation": lambda: through_trainer(3),
    "tied": lambda: through_trainer(1, model=tiny_model()),
    "no-reshard": lambda: through_trainer(1, fsdp_config={"reshard_after_forward": False}),
    "checkpointing": lambda: through_trainer(
        1, model=tiny_model("llama", use_cache=False), fsdp_config={"activation_checkpointing": True}
    ),
    "low-memory-loading": lambda: through_trainer(1, fsdp_config={"cpu_ram_efficient_loading": True}),
    "bf16": lambda: through_trainer(1, bf16=True),
    "compiled": lambda: through_trainer(1, torch_compile=True, torch_compile_backend="aot_eager"),
    "lora": lambda: through_trainer(1, model=lora_llama()),
    "twice": twice,
    "at-load": at_load,
    "loop-fsdp2": lambda: own_loop("fsdp2"),
    "loop-ddp": lambda: own_loop("ddp"),
    "full-checkpoint": lambda: resumed("full"),
    "sharded-checkpoint": lambda: resumed("sharded"),
    "refused-fsdp1": lambda: refused(
        lambda: through_trainer(1, fsdp_config={"version": 1, "sync_module_states": False}, fixed_labels=False)
    ),
    "refused-sophia_h": lambda: refused(lambda: through_trainer(1, optim="sophia_h", optim_args=None)),
    "refused-plain-fsdp1": lambda: refused(plain_fsdp1),
    "refused-tensor": lambda: refused(tensor_parallel),
}
results = {}
for wanted in sys.argv[2:]:
    results[wanted] = RUNS[wanted]()
    for name in [n for n in os.environ if n.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)
torch.save(results, OUT / f"rank{dist.get_rank()}.pt")
end_of_rank()
