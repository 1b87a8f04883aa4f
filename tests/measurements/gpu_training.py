"""Parts of `gpu.py`, training: each prints its figures as JSON lines, and asserts what has to be right."""

from __future__ import annotations

import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from gpu_step import Bench
from torch import Tensor, nn

from sophia_integrations import GaussNewtonBartlett, SophiaG, param_groups

SMALL = dict(n_layer=12, n_embd=768, n_head=12, n_positions=1024, vocab_size=50257)
"""GPT-2 small, 124M parameters."""


def syncs(run: Callable[[], object]) -> int:
    """How often `run` waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def part_pass(bench: Bench) -> None:
    """A training step of GPT-2 small with AdamW and with Sophia, where it waits, and the memory it takes."""
    ids = torch.randint(256 if bench.tiny else 50257, (2, 16) if bench.tiny else (16, 1024), device=bench.device)
    peaks = {}
    for name in ("adamw", "sophia", "eigen"):
        model = bench.model(**SMALL)
        estimator = GaussNewtonBartlett(model)
        if name == "adamw":
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        else:
            groups = param_groups(model, basis="eigen" if name == "eigen" else None)
            optimizer = SophiaG(groups, lr=1e-4, estimator=estimator, basis_warmup=0)

        def backward(model: nn.Module = model) -> None:
            with bench.autocast():
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()

        def step(optimizer: torch.optim.Optimizer = optimizer, backward: Callable = backward) -> None:
            backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(2):
            step()
        if not bench.tiny:
            torch.cuda.reset_peak_memory_stats()
        before = optimizer.stats()["hessian_seconds"] if name != "adamw" else 0.0
        spent = [bench.once(step) for _ in range(10 if bench.tiny else 20)]  # of which 1 or 2 are due
        if not bench.tiny:
            peaks[name] = torch.cuda.max_memory_allocated() / 2**20
            bench.say(**{f"{name}, peak MiB": peaks[name]})
        bench.say(**{f"{name}, median ms": statistics.median(spent), f"{name}, mean ms": statistics.mean(spent)})
        if name != "adamw":
            stats = optimizer.stats()
            share = (stats["hessian_seconds"] - before) * 1000 / sum(spent)
            bench.say(**{f"{name}, share of the pass": share, f"{name}, win rate": float(stats["win_rate"])})
            if not bench.tiny:
                backward()
                bench.say(**{f"{name}, waits in a step": syncs(optimizer.step)})
                while not optimizer.hessian_due:
                    step()
                backward()
                bench.say(**{f"{name}, waits in a step with a pass": syncs(optimizer.step)})
        del model, optimizer, estimator


def part_trainer(bench: Bench) -> None:
    """Training through the Trainer in both half precisions: the loss falls, and no estimate is lost."""
    from support import assert_trained, make_trainer

    for precision in ("bf16", "fp16"):
        if precision == "fp16" and bench.tiny:
            continue
        with TemporaryDirectory() as folder:
            trainer = make_trainer(folder, use_cpu=bench.tiny, **{precision: True}, learning_rate=3e-3, max_steps=40)
            assert_trained(trainer, 8)
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        bench.say(**{f"{precision}, first and last loss": [logs[0]["loss"], logs[-1]["loss"]]})


def part_lightning(bench: Bench) -> None:
    """The same through Lightning."""
    import lightning.pytorch as pl
    from support import VOCABULARY, tiny_model, token_rows

    from sophia_integrations.lightning import SophiaCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = tiny_model(), []

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            loss = self.model(**batch).loss
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return SophiaG(self.parameters(), lr=3e-3, hessian_interval=5)

    for precision in ("bf16-mixed", "bf16-true") if bench.tiny else ("bf16-mixed", "bf16-true", "16-mixed"):
        module = Module()
        trainer = pl.Trainer(
            accelerator="cpu" if bench.tiny else "gpu",
            devices=1,
            precision=precision,
            max_steps=40,
            callbacks=[SophiaCallback()],
            **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        )
        trainer.fit(module, torch.utils.data.DataLoader(token_rows(masked=False), batch_size=8))
        updates = trainer.optimizers[0].progress.hessian_updates
        first, last = (float(torch.stack(part).float().mean()) for part in (module.losses[:5], module.losses[-5:]))
        assert last < first < 1.2 * torch.tensor(float(VOCABULARY)).log() and updates >= 6, (first, last, updates)
        bench.say(**{f"{precision}, first and last loss": [first, last]})


def part_compile(bench: Bench) -> None:
    """A compiled model trains as the same model does, pass included."""
    if bench.tiny and sysconfig.get_platform() != "linux-x86_64":
        return
    ids = torch.randint(256, (8, 32), device=bench.device, generator=torch.Generator(bench.device).manual_seed(0))
    losses = {}
    for compiled in (False, True):
        model = bench.model(n_layer=4, n_embd=256, n_head=4, n_positions=128, vocab_size=256)
        called = torch.compile(model, backend="eager" if bench.tiny else "inductor") if compiled else model
        optimizer = SophiaG(model.parameters(), lr=1e-3, hessian_interval=3, estimator=GaussNewtonBartlett(called))
        losses[compiled] = []
        for _ in range(4 if bench.tiny else 12):
            loss = called(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[compiled].append(loss.item())
        assert optimizer.stats()["hessian_skipped"] == 0 and optimizer.stats()["hessian_updates"] >= 2
    apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    bench.say(**{"last loss": losses[True][-1], "largest difference of losses": apart})
    assert apart < 0.05 and losses[True][-1] < losses[True][0]


def part_eigen(bench: Bench) -> None:
    """AdamW and Sophia in the eigenbasis: 30M parameters, 0.1M tokens a step, bytes of the standard library."""
    length, rows = (32, 4) if bench.tiny else (512, 192)
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(bench.device)
    cut = len(data) * 19 // 20
    optimizers = {
        "adamw": lambda model: torch.optim.AdamW(
            [{k: g[k] for k in ("params", "weight_decay") if k in g} for g in param_groups(model)],
            lr=2e-3,
            betas=(0.9, 0.95),
            fused=True,
        ),
        "eigen": lambda model: SophiaG(
            param_groups(model, basis="eigen", adamw={"betas": (0.9, 0.95)}),
            lr=1e-3,
            estimator=GaussNewtonBartlett(model, fraction=1 / 48),
        ),
    }
    steps = 3 if bench.tiny else None
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        for name, build in optimizers.items():
            if precision == "high" and bench.left < 30:
                continue
            if steps is None:
                trained(bench, build, data[:cut], data[cut:], 8, rows, length)
                one = trained(bench, build, data[:cut], data[cut:], 8, rows, length)[1]
                steps = max(20, min(1000, int(0.36 * bench.left * 1000 / one)))
            count = min(steps, 60) if precision == "high" else steps
            loss, ms = trained(bench, build, data[:cut], data[cut:], count, rows, length)
            bench.say(**{f"{name}, {precision}, loss after {count} steps": loss, f"{name}, {precision}, ms": ms})


@torch.no_grad()
def held_out(bench: Bench, model: nn.Module, data: Tensor, rows: int, length: int) -> float:
    batch = data[: rows * length].view(rows, length).long()
    with bench.autocast():
        return float(model(input_ids=batch, labels=batch).loss)


def trained(
    bench: Bench,
    build: Callable[[nn.Module], torch.optim.Optimizer],
    data: Tensor,
    held: Tensor,
    steps: int,
    rows: int,
    length: int,
) -> tuple[float, float]:
    """Held-out loss after `steps`, and mean milliseconds a step; warm-up over a tenth, then a cosine to 0."""
    model = bench.model(n_layer=9, n_embd=512, n_head=8, n_positions=512, vocab_size=256)
    optimizer, draw = build(model), torch.Generator().manual_seed(0)
    warmup = max(1, steps // 10)
    ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [ramp, fall], [warmup])
    starts = torch.randint(len(data) - length, (steps, rows, 1), generator=draw).to(bench.device)
    bench.wait()
    started = time.perf_counter()
    for start in starts:
        batch = data[start + torch.arange(length, device=bench.device)].long()
        with bench.autocast():
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    bench.wait()
    return held_out(bench, model, held, min(rows, len(held) // length), length), 1000 * (
        time.perf_counter() - started
    ) / steps
