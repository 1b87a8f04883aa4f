"""Parts of `gpu.py`, the step: each prints its figures as JSON lines, and asserts what has to be right."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from sophia_integrations import SophiaG
from sophia_integrations.optim import Rule, sophia_update, triton_step

TESTS = ("test_triton_step.py", "test_basis_batches.py", "../test_synchronisation.py", "test_on_device.py")
RULE = dict(lr=1e-3, beta1=0.965, rho=0.05, eps=1e-12, weight_decay=0.1)


class Bench:
    """Where and how long to measure; `tiny` is everything in miniature, for a machine without a GPU."""

    def __init__(self, device: str, seconds: float, mark: str) -> None:
        self.device, self.tiny, self._mark = device, device == "cpu", mark
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def say(self, **figures: object) -> None:
        print(self._mark + json.dumps({name.replace("__", " "): value for name, value in figures.items()}), flush=True)

    def wait(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def once(self, run: Callable[[], object]) -> float:
        """Milliseconds of one call, from an idle device to an idle device."""
        self.wait()
        started = time.perf_counter()
        run()
        self.wait()
        return 1000 * (time.perf_counter() - started)

    def medians(self, runs: dict[str, Callable[[], object]], repeats: int = 20) -> dict[str, float]:
        """Milliseconds of each, in turn: A B C A B C …, after two rounds that warm up."""
        repeats = 2 if self.tiny else repeats
        found: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(repeats + 2):
            for name, run in runs.items():
                spent = self.once(run)
                if repeat > 1:
                    found[name].append(spent)
        return {name: statistics.median(spent) for name, spent in found.items()}

    def model(self, **config: int) -> nn.Module:
        """A GPT-2 in training mode; the same weights every time."""
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        if self.tiny:
            config = dict(n_layer=2, n_embd=32, n_head=2, n_positions=32, vocab_size=256)
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model = GPT2LMHeadModel(GPT2Config(**config, **dropout, bos_token_id=0, eos_token_id=0))
        return model.to(self.device).train()

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, dtype=torch.bfloat16)


def shapes(size: str) -> list[tuple[int, ...]]:
    """Of the parameters of a GPT-2."""
    layers, width, vocabulary, length = {
        "124M": (12, 768, 50257, 1024),
        "10M": (6, 256, 18000, 512),
        "tiny": (1, 16, 100, 8),
    }[size]
    block = [(width, 3 * width), (3 * width,), (width, width), (width,), (width, 4 * width), (4 * width,)]
    block += [(4 * width, width), *[(width,)] * 5]
    return [(vocabulary, width), (length, width), *block * layers, (width,), (width,)]


def part_machine(bench: Bench) -> None:
    """What is there, and its two ceilings: a large copy, and a large product."""
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if triton_step.available():
        versions["triton"] = triton_step.triton.__version__
    bench.say(**versions)
    if not bench.tiny:
        properties = torch.cuda.get_device_properties(0)
        bench.say(GPU=properties.name, GiB=properties.total_memory / 2**30, cuda=torch.version.cuda)
    bench.say(copy__TB__per__s=bytes_copied_per_ms(bench) / 1e9)
    size = 128 if bench.tiny else 8192
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    ms = bench.medians({"product": lambda: a @ b})["product"]
    bench.say(bf16__TFLOP__per__s=2 * size**3 / ms / 1e9)


def bytes_copied_per_ms(bench: Bench) -> float:
    """Read and written."""
    x = torch.randn(1 << (20 if bench.tiny else 29), device=bench.device)
    y = torch.empty_like(x)
    return 2 * 4 * x.numel() / bench.medians({"copy": lambda: y.copy_(x)})["copy"]


def part_tests(bench: Bench) -> None:
    """The tests that can run on a GPU, with compiled kernels."""
    folder = Path(__file__).parents[1] / "optim"
    found = [str(folder / name) for name in TESTS if (folder / name).exists()]
    beside = ["-n", "8"] if not bench.tiny else []
    environment = {**os.environ, "SOPHIA_TEST_DEVICE": bench.device}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", *beside, *(found[1:2] if bench.tiny else found)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    bench.say(pytest=done.stdout.strip().splitlines()[-1])
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if failed:
        bench.say(failures=failed)
    sys.stderr.write(done.stdout[-3500:])
    sys.exit(done.returncode)


def parameters(bench: Bench, size: str, dtype: torch.dtype) -> list[list[Tensor]]:
    """θ, g, m and h."""
    draw = torch.Generator(bench.device).manual_seed(0)

    def normal(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=draw, device=bench.device).to(kind)

    every = shapes("tiny" if bench.tiny else size)
    params, grads = ([normal(s, dtype) for s in every] for _ in range(2))
    return [params, grads, [normal(s, torch.float32) for s in every], [normal(s, torch.float32).abs() for s in every]]


def part_step(bench: Bench) -> None:
    """The update against AdamW's, and as a share of what a copy moves."""
    copied, rule = bytes_copied_per_ms(bench), Rule(**RULE)
    for size in ("10M", "124M"):
        for dtype in (torch.float32, torch.bfloat16):
            tensors = parameters(bench, size, dtype)
            adamw_params = [nn.Parameter(p.clone()) for p in tensors[0]]
            sophia_params = [nn.Parameter(p.clone()) for p in tensors[0]]
            for mine, yours, g in zip(adamw_params, sophia_params, tensors[1], strict=True):
                mine.grad, yours.grad = g, g
            adamw = torch.optim.AdamW(adamw_params, lr=1e-3, fused=True)
            sophia = SophiaG(sophia_params, lr=1e-3, hessian_interval=1 << 20)
            sophia.update_hessian(1)
            runs = {
                "adamw fused": adamw.step,
                "SophiaG": sophia.step,
                "eager": lambda t=tensors: sophia_update(*t, rule, fused=False),
            }
            if triton_step.available():
                runs["triton"] = lambda t=tensors: triton_step.update(*t, rule, False)
                runs["triton counting"] = lambda t=tensors: triton_step.update(*t, rule, True)
            name = f"{size} {str(dtype).removeprefix('torch.')}"
            found = bench.medians(runs)
            for what, ms in found.items():
                bench.say(**{f"{name}, {what}, ms": ms, f"{name}, {what} / AdamW": ms / found["adamw fused"]})
            if "triton" in found:
                moved = sum(p.numel() for p in tensors[0]) * (3 * dtype.itemsize + 12)
                bench.say(**{f"{name}, triton, share of the copy": moved / found["triton"] / copied})
            if not bench.tiny:
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                sophia.step()
                weights = sum(p.numel() * p.element_size() for p in tensors[0])
                bench.say(**{f"{name}, SophiaG, temporaries": (torch.cuda.max_memory_allocated() - held) / weights})


def part_graph(bench: Bench) -> None:
    """The update in a CUDA graph: a replay follows the learning rate, and takes what a launch takes."""
    if bench.tiny and not triton_step.available():
        bench.say(graph="needs a GPU and triton")
        return
    tensors = parameters(bench, "124M", torch.float32)
    lr = torch.tensor(1e-3, device=bench.device)
    rule = Rule(**{**RULE, "lr": lr})
    twins = [[x.clone() for x in xs] for xs in tensors]
    if bench.tiny:
        assert triton_step.update(*tensors, rule, True).tolist()[0] == 0
        bench.say(graph="needs a GPU")
        return
    graph, beside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        triton_step.update(*tensors, rule, True)
    torch.cuda.current_stream().wait_stream(beside)
    with torch.cuda.graph(graph):
        counts = triton_step.update(*tensors, rule, True)
    triton_step.update(*twins, rule, True)
    for value in (1e-3, 3e-4):
        lr.fill_(value)
        graph.replay()
        expected = triton_step.update(*twins, rule, True)
        assert torch.equal(counts, expected)
    assert all(torch.equal(x, y) for x, y in zip(tensors[0], twins[0], strict=True))
    found = bench.medians({"replay": graph.replay, "launch": lambda: triton_step.update(*twins, rule, True)})
    bench.say(**{f"124M float32, {name}, ms": ms for name, ms in found.items()})
