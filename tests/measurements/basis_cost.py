"""What the eigenbasis costs at the shapes of GPT-2 small (124M parameters): state, time and arithmetic.

State comes from the layout itself. Times are medians of processor time on one thread, which is wall-clock time where a
core is free: what a step adds for each matrix, the whole step of `SophiaG` on one block with and without the basis, and
forward and backward of that block. A step makes six products (two into the basis, two out of it, two for the factors),
and at a refresh those that turn the eigenvectors. None of them depends on the tokens of a step, so their share falls as
1 / tokens. Run it with `make basis-cost`; takes about a minute on one free core.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from sophia_integrations import SophiaG, param_groups
from sophia_integrations.optim.basis import Basis, Layout, average, carry_hessian, layout_of
from sophia_integrations.optim.eigenvectors import refresh

BLOCKS, WIDTH, LENGTH, PARAMETERS = 12, 768, 1024, 124_439_808
MATRICES = {"attn.c_attn": (768, 2304), "attn.c_proj": (768, 768), "mlp.c_fc": (768, 3072), "mlp.c_proj": (3072, 768)}
CAPS = (None, 768, 384, 192)
TOKENS = (3_072, 16_384, 491_520)
INTERVAL = 10
MIB = 2**20


def layouts(cap: int | None) -> dict[str, Layout]:
    return {name: layout_of(torch.Size(shape), cap) for name, shape in MATRICES.items()}


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Of `repeats` runs, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds[1:])


def matrix_seconds(layout: Layout) -> dict[str, float]:
    """What one matrix adds to a step, part by part; the gradient has a falling spectrum, as gradients have."""
    rows, columns = layout.rows, layout.columns
    gradient = torch.randn(rows, columns) * torch.linspace(1, 0.01, columns)
    state: dict[str, Tensor] = {"hessian": torch.rand(rows, columns)}
    basis = Basis(layout, state)
    average([basis], [gradient], 0.95)
    started = time.process_time()
    refresh(basis.sides())
    first = time.process_time() - started
    return {
        "rotate in": median_seconds(lambda: basis.into(gradient), 5),
        "rotate out": median_seconds(lambda: basis.out_of(gradient), 5),
        "factors": median_seconds(lambda: average([basis], [gradient], 0.95), 5),
        "refresh": median_seconds(lambda: carry_hessian([basis], refresh(basis.sides())), 3),
        "first": first,
    }


def per_step(parts: dict[str, float], interval: int) -> float:
    return parts["rotate in"] + parts["rotate out"] + parts["factors"] + parts["refresh"] / interval


def arithmetic(layout: Layout) -> dict[str, float]:
    """Floating-point operations: of the six products, and of a refresh.

    A product with a side in pieces of n takes 2 n for each element. A refresh of n×n makes F·Q, the test that the
    result is orthonormal and the overlap (2 n³ each) and twice a Gram matrix (2 n³), a Cholesky factor (n³/3) and a
    triangular solve (n³), and carries h over with two products.
    """
    elements = layout.matrices * layout.rows * layout.columns
    product = 2 * elements * (layout.left + layout.right)
    cubes = layout.matrices * (layout.rows * layout.left**2 + layout.columns * layout.right**2)
    return {"products": 3 * product, "refresh": (3 * 2 + 2 * (2 + 1 / 3 + 1)) * cubes + product}


def block() -> GPT2Block:
    config = GPT2Config(n_embd=WIDTH, resid_pdrop=0, attn_pdrop=0)
    config._attn_implementation = "sdpa"
    return GPT2Block(config, layer_idx=0)


def block_seconds_per_token(module: nn.Module) -> float:
    """Forward and backward of one block over one row of LENGTH tokens."""
    x = torch.randn(1, LENGTH, WIDTH, requires_grad=True)

    def run() -> None:
        output = module(x)
        (output if isinstance(output, Tensor) else output[0]).sum().backward()
        module.zero_grad()

    return median_seconds(run, 5) / LENGTH


def step_seconds(module: nn.Module, basis: str | None) -> tuple[float, float]:
    """`SophiaG.step` on the block's parameters: an ordinary step, and one that refreshes the eigenvectors."""
    same = dict(betas=(0.9, 0.9), rho=0.3, eps=1e-8, nesterov=True, bias_correction=True)
    optimizer = SophiaG(param_groups(module, basis=basis, **same), lr=1e-9, basis_warmup=0, basis_interval=2)
    optimizer.param_groups[0]["hessian_interval"] = 1000
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    optimizer.update_hessian(1)
    optimizer.step()
    seconds = []
    for _ in range(8):
        started = time.process_time()
        optimizer.step()
        seconds.append(time.process_time() - started)
    module.zero_grad()
    return statistics.median(seconds[0::2]), statistics.median(seconds[1::2])


def table(header: list[str], rows: list[list[str]]) -> None:
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def print_state() -> None:
    matrices = BLOCKS * sum(rows * columns for rows, columns in MATRICES.values())
    rows = []
    for cap in CAPS:
        floats = {name: layout.floats for name, layout in layouts(cap).items()}
        total = BLOCKS * sum(floats.values())
        rows.append(
            [
                f"`{cap}`",
                *(f"{4 * n / MIB:.1f}" for n in floats.values()),
                f"{4 * total / MIB:,.0f}",
                f"{total / matrices:.2f}",
                f"{total / PARAMETERS:.2f}",
            ]  # fmt: skip
        )
    names = [f"{name} {rows}×{columns}" for name, (rows, columns) in MATRICES.items()]
    print(
        f"\nExtra state, MiB of float32 (m and h take {2 * 4 * matrices / MIB:,.0f} MiB, 2 floats a matrix parameter):"
    )
    table(
        ["`basis_max_dim`", *names, f"{BLOCKS} blocks", "floats / matrix parameter", "floats / model parameter"], rows
    )


def print_times() -> dict[int, dict[int, float]]:
    """Milliseconds a step for each matrix, and for one block under each cap.

    Returns:
        Seconds that one block adds to a step, by cap and interval.
    """
    found: dict[int, dict[int, float]] = {}
    rows = []
    for cap in CAPS[1:]:
        parts = {name: matrix_seconds(layout) for name, layout in layouts(cap).items()}
        parts["one block"] = {key: sum(p[key] for p in parts.values()) for key in next(iter(parts.values()))}
        found[cap] = {interval: per_step(parts["one block"], interval) for interval in (INTERVAL, 1)}
        for name, p in parts.items():
            cells = [p[key] for key in ("rotate in", "rotate out", "factors", "refresh")]
            cells += [per_step(p, INTERVAL), per_step(p, 1), p["first"]]
            rows.append([str(cap), name, *(f"{1000 * cell:.1f}" for cell in cells)])
    print("\nExtra time, ms:")
    ends = ["refresh", f"a step, refresh every {INTERVAL}", "a step, refresh in each", "first `eigh`, once"]
    table(["`basis_max_dim`", "matrix", "rotate in", "rotate out", "factors", *ends], rows)
    return found


def print_shares(seconds: dict[int, dict[int, float]], per_token: float) -> None:
    rows = []
    for cap in CAPS[1:]:
        flops = [arithmetic(layout) for layout in layouts(cap).values()]
        for interval in (INTERVAL, 1):
            extra = BLOCKS * sum(f["products"] + f["refresh"] / interval for f in flops)
            by_flops = [f"{extra / (6 * PARAMETERS * tokens):.1%}" for tokens in TOKENS]
            by_time = [f"{seconds[cap][interval] / (per_token * tokens):.1%}" for tokens in TOKENS]
            every = "every step" if interval == 1 else f"every {interval}"
            rows.append([str(cap), every, f"{extra / 1e9:,.0f}", *by_flops, *by_time])
    step = ", ".join(f"{6 * PARAMETERS * tokens / 1e12:,.1f}" for tokens in TOKENS)
    print(f"\nShare of a training step. By arithmetic, of 6·N·tokens ({step} TFLOP); by time, of forward and backward")
    one = f"{1000 * per_token * LENGTH:.0f} ms a block for {LENGTH} tokens"
    print(f"of the {BLOCKS} blocks, without embeddings and head ({one}):")
    ends = [f"{what}, {tokens:,} tokens" for what in ("arithmetic", "time") for tokens in TOKENS]
    table(["`basis_max_dim`", "refresh", "GFLOP a step", *ends], rows)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread, {processor()}, {os.cpu_count()} cores{load}")
    print_state()
    seconds = print_times()
    module = block()
    print_shares(seconds, block_seconds_per_token(module))
    (plain, _), (rotated, refreshing) = step_seconds(module, None), step_seconds(module, "eigen")
    times = f"{1000 * plain:.0f} ms without the basis, {1000 * rotated:.0f} ms with it"
    print(f"\n`SophiaG.step` on one block: {times}, {1000 * refreshing:.0f} ms when it refreshes.")
    if hasattr(os, "getloadavg"):
        print(f"Load at the end: {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    main()
