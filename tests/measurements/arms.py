"""The default recipe's model and text, or a tenth of it, under any rule in a bare loop: what explains a difference.

    python tests/measurements/arms.py ARM[:option=value,…] … [--size tiny] [--steps 600] [--seeds 0] [--out FILE]

An arm is one of `ARMS`; its options are the learning rate `lr`, `b1`, `b2`, `wd`, and for the Sophia groups any option
of `SophiaG`; `e.lr`, `e.b1`, `e.b2` and `e.wd` are those of the AdamW groups. Every run has its own full schedule:
linear warm-up over a tenth of the steps, cosine to 0. One line a run, and a JSON line in FILE.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sophia_integrations import EmpiricalFisher, GaussNewtonBartlett, SophiaG, param_groups
from sophia_integrations.lightning import TextDataModule
from sophia_integrations.optim.groups import EIGEN_LR_SCALE

SIZES = {
    "default": (dict(n_layer=4, n_embd=160, n_positions=128, vocab_size=1024), dict(batch_size=24)),
    "tiny": (dict(n_layer=2, n_embd=64, n_positions=64, vocab_size=512), dict(batch_size=64)),
}
"""1.4M parameters, the default recipe's; and 131 thousand, which takes a tenth of the time a step."""
REST = dict(n_head=4, bos_token_id=0, eos_token_id=0, **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0))
SIGN = {"rho": 0.0, "bias_correction": True}
SQUARES = {"rho": 0.0, "noise_floor": 10.0, "hessian_interval": 1, "bias_correction": True, "b2": 0.98}
ARMS: dict[str, dict] = {
    "adamw": {},
    "nadamw": {},
    "sophia": {"basis": None},
    "eigen": {"basis": "eigen"},
    "eigen-sign": {"basis": "eigen", **SIGN},
    "sign": {"basis": None, "nesterov": True, "eps": 1e-8, **SIGN},
    "eigen-squares": {"basis": "eigen", **SQUARES},
    "squares": {"basis": None, "nesterov": True, "eps": 1e-8, **SQUARES},
}
"""`adamw` and `nadamw` (torch's NAdam with constant momentum: AdamW with Nesterov) train everything. In the others the
matrices follow Sophia in weight coordinates or in the eigenbasis, with h from our units, without curvature (sign), or
from squares of the training gradient at every step: m/√v, which is Adam in weight coordinates and in the eigenbasis
SOAP (clipped at 10, so never)."""


def value_of(text: str):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    if "/" in text:
        return tuple(value_of(part) for part in text.split("/"))
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def build(model, name: str, given: dict):
    options = {**ARMS[name], **given}
    embed = {k[2:]: options.pop(k) for k in list(options) if k.startswith("e.")}
    lr, weight_decay = options.pop("lr"), options.pop("wd", 0.1)
    if name in ("adamw", "nadamw"):
        betas = (options.pop("b1", 0.8), options.pop("b2", 0.98))
        groups = [
            {"params": g["params"], "lr": g.get("lr", lr), "weight_decay": g.get("weight_decay", weight_decay)}
            for g in param_groups(model, adamw={"lr": embed.pop("lr", lr)})
        ]
        if name == "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
        return torch.optim.NAdam(groups, lr=lr, betas=betas, momentum_decay=1e4, decoupled_weight_decay=True)
    squares, eigen = name.endswith("squares"), options["basis"] == "eigen"
    adamw = {"lr": embed.pop("lr", EIGEN_LR_SCALE * lr if eigen else lr)}
    adamw |= {"betas": (embed.pop("b1", 0.8), embed.pop("b2", 0.98)), "weight_decay": embed.pop("wd", weight_decay)}
    if eigen:
        options["betas"] = (options.pop("b1", 0.9), options.pop("b2", 0.9))
    elif "b1" in options or "b2" in options:
        options["betas"] = (options.pop("b1", 0.965), options.pop("b2", 0.99))
    units = {k: options.pop(k) for k in ("fraction", "units") if k in options}
    if squares:
        lr *= options["noise_floor"]
    interval = options.pop("hessian_interval", 10)
    groups = param_groups(model, weight_decay=weight_decay, adamw=adamw, **options)
    for group in groups:
        if group["name"] == "vectors":
            group["weight_decay"] = 0.0
    estimator = EmpiricalFisher(model) if squares else GaussNewtonBartlett(model, **units)
    return SophiaG(groups, lr=lr, hessian_interval=interval, estimator=estimator)


def data(size: str, seed: int) -> TextDataModule:
    model, batch = SIZES[size]
    shape = dict(vocab_size=model["vocab_size"], block_size=model["n_positions"], **batch)
    module = TextDataModule(**shape, validation_fraction=0.05, seed=seed)
    module.say = lambda line: None
    module.setup("fit")
    return module


@torch.no_grad()
def evaluate(model, module) -> float:
    model.eval()
    total = count = 0
    for batch in module.val_dataloader():
        rows = batch["input_ids"].numel() - len(batch["input_ids"])
        total, count = total + model(**batch).loss.item() * rows, count + rows
    model.train()
    return total / count


def train(arm: str, size: str, steps: int, seed: int, floor: float, schedule: str) -> dict:
    name, _, text = arm.partition(":")
    given = {k: value_of(v) for k, v in (pair.split("=") for pair in text.split(",") if pair)}
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**SIZES[size][0], **REST))
    model.train()
    optimizer, module = build(model, name, given), data(size, seed)
    warmup = max(1, steps // 10)
    decay = {"cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)), "linear": lambda x: 1 - x, "constant": lambda x: 1}

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return floor + (1 - floor) * decay[schedule]((step - warmup) / max(1, steps - warmup))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    loader, batches, curve, seconds = module.train_dataloader(), iter(()), [], 0.0
    for step in range(steps):
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        started = time.perf_counter()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        seconds += time.perf_counter() - started
        if (step + 1) % max(1, steps // 6) == 0 or step + 1 == steps:
            point = {"step": step + 1, "loss": evaluate(model, module)}
            if isinstance(optimizer, SophiaG):
                stats = optimizer.stats()
                point |= {key: round(float(stats[key]), 4) for key in ("win_rate", "curvature_share", "rho")}
            curve.append(point)
            if not math.isfinite(point["loss"]):
                break
    spent = getattr(optimizer, "hessian_seconds", 0.0)
    return {
        "arm": arm,
        "size": size,
        "steps": steps,
        "seed": seed,
        "schedule": schedule,
        "loss": curve[-1]["loss"],
        "ms": 1000 * seconds / steps,
        "pass_share": spent / seconds,
        "curve": curve,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--floor", type=float, default=0.0, help="learning rate at the end, as a share of the peak")
    parser.add_argument("--schedule", choices=("cosine", "linear", "constant"), default="cosine")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    unknown = [arm for arm in options.arms if arm.partition(":")[0] not in ARMS]
    if unknown:
        sys.exit(f"no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")
    for arm in options.arms:
        for seed in options.seeds.split(","):
            result = train(arm, options.size, options.steps, int(seed), options.floor, options.schedule)
            shape = " ".join(f"{p['step']}:{p['loss']:.3f}" + (f"/{p['win_rate']:.2f}" if "win_rate" in p else "")
                             for p in result["curve"])  # fmt: skip
            line = f"{result['loss']:.4f}  {result['ms']:.0f} ms  pass {result['pass_share']:.1%}  seed {seed}  "
            print(f"{line}{options.steps} steps  {arm}  {shape}", flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
