"""The update on a GPU: one Triton launch for a whole list of tensors, each element read and written once.

Tensors are rows of a table that says where they lie and which chunks are theirs; a program updates one chunk. Nothing
here waits for the device: numbers that change from step to step are read there, so that a new value is no new kernel.
`reference_step` is the rule in readable form.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .eager import memory_order
from .rule import Rule
from .sharding import WHOLE

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with torch for CUDA, and on Linux only
    triton = None

CHUNK, BLOCK = 8192, 1024
"""Elements of a program, and those that it works on at a time: 16 bytes and more a thread and tensor."""

_ALIGNMENT = 16
"""Bytes: with every address a multiple of it, a thread moves so much at a time."""

_COLUMNS = 6


def available() -> bool:
    """Whether Triton is installed."""
    return triton is not None


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of the parameters that `update` takes."""


def takes(param: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor) -> bool:
    """Whether `update` can be given these tensors."""
    whole = all(type(x) in WHOLE and x.device == param.device for x in (param, grad, exp_avg, hessian))
    moments = exp_avg.dtype in (torch.float32, torch.bfloat16) and hessian.dtype == torch.float32
    return whole and moments and param.dtype in DTYPES and grad.dtype in DTYPES


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    hessians: Sequence[Tensor],
    rule: Rule,
    counting: bool,
) -> Tensor:
    """One update of many parameters in weight coordinates, in place.

    Args:
        params: θ, of one device and one dtype, any sizes and strides.
        grads: of the shapes of `params`; read.
        exp_avgs: m, at least float32, or bfloat16; updated.
        hessians: h, at least float32; read.
        rule: the numbers; each may be a tensor of one element on the device, read when the kernel runs.
        counting: whether to count what the clip does.

    Returns:
        int64 [3] on the device: coordinates with a non-finite gradient, whose θ and m stay as they were; coordinates
        with |m| < max(ρh, c √(h/N), ε); coordinates whose denominator is ρh. The last two are 0 unless `counting`.
    """
    device = params[0].device
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    launches: dict[tuple[torch.dtype, torch.dtype, bool], list[tuple[int, ...]]] = defaultdict(list)
    copied: list[tuple[Sequence[Tensor], Sequence[Tensor]]] = []
    for tensors in zip(params, grads, exp_avgs, hessians, strict=True):
        size = tensors[0].numel()
        if size == 0:
            continue
        if not _lie_alike(tensors):
            copied.append((tensors, [t.contiguous() for t in tensors]))
            tensors = copied[-1][1]
        addresses = [t.data_ptr() for t in tensors]
        aligned = all(address % _ALIGNMENT == 0 for address in addresses)
        launches[tensors[1].dtype, tensors[2].dtype, aligned].append((size, *addresses))
    if launches:
        numbers = _numbers(rule, device)
        dtypes = {"PARAM": _type(params[0].dtype), "STATE": _type(hessians[0].dtype)}
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            for (grad_dtype, exp_avg_dtype, aligned), entries in launches.items():
                table, programs, depth = _table(entries, device)
                _update_kernel[(programs,)](
                    table,
                    numbers,
                    counts,
                    **dtypes,
                    GRAD=_type(grad_dtype),
                    MOMENTUM=_type(exp_avg_dtype),
                    ALIGNED=aligned,
                    MAXIMIZE=rule.maximize,
                    NESTEROV=rule.nesterov,
                    NOISE=isinstance(rule.noise, Tensor) or rule.noise != 0,
                    COUNTING=counting,
                    DEPTH=depth,
                    CHUNK=CHUNK,
                    BLOCK=BLOCK,
                )
    for originals, copies in copied:
        originals[0].copy_(copies[0])
        originals[2].copy_(copies[2])
    return counts


def _lie_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether one walk through memory meets the same coordinate in each of them."""
    if all(t.is_contiguous() for t in tensors):
        return True
    order = memory_order(tensors[0])
    return all(t.permute(order).is_contiguous() for t in tensors)


def _table(entries: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, int, int]:
    """The rows (first program, elements, addresses) on `device`, the number of programs, and of halvings to find one.

    Padded to a power of two with rows that no program reaches.
    """
    rows, programs = [], 0
    for size, *addresses in entries:
        rows.append((programs, size, *addresses))
        programs += -(-size // CHUNK)
    depth = (len(rows) - 1).bit_length()
    rows += [(programs,) + (0,) * (_COLUMNS - 1)] * (2**depth - len(rows))
    return _constants(tuple(x for row in rows for x in row), torch.int64, device), programs, depth


def _numbers(rule: Rule, device: torch.device) -> Tensor:
    """The numbers of `rule` in the kernel's order, float64 on `device`."""
    scales = (rule.momentum_scale, rule.hessian_scale, rule.noise)
    values = (rule.lr, rule.beta1, rule.rho, rule.eps, rule.weight_decay, *scales, rule.seed)
    there = {i: x for i, x in enumerate(values) if isinstance(x, Tensor) and x.device == device}
    numbers = _constants(tuple(0.0 if i in there else float(x) for i, x in enumerate(values)), torch.float64, device)
    if there:
        numbers = numbers.clone()
        for i, x in there.items():
            numbers[i].copy_(x.reshape(()))
    return numbers


def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` on `device`, without waiting for it."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _written_by_kernels(values, dtype, device)
    return _uploaded(values, dtype, device)


@functools.lru_cache(maxsize=64)
def _uploaded(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)


def _written_by_kernels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As arguments of kernels: a CUDA graph keeps these, and would look for the host's memory again at each replay."""
    constants = torch.zeros(len(values), dtype=dtype, device=device)
    torch._foreach_add_(list(constants.unbind()), list(values))
    return constants


def _type(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _jit(function):
    return function if triton is None else triton.jit(function)


@_jit
def _update_kernel(
    table,
    numbers,
    counts,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTUM: tl.constexpr,
    STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    NESTEROV: tl.constexpr,
    NOISE: tl.constexpr,
    COUNTING: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finds its chunk by halving, and updates it block by block; only the last chunk of a tensor needs a mask."""
    program = tl.program_id(0)
    row = 0
    for halving in tl.static_range(DEPTH):
        middle = row + 2 ** (DEPTH - 1 - halving)
        row = tl.where(tl.load(table + middle * 6) <= program, middle, row)
    entry = table + row * 6
    start = (program - tl.load(entry)) * CHUNK
    length = tl.minimum(tl.load(entry + 1) - start, CHUNK).to(tl.int32)
    theta = tl.load(entry + 2).to(tl.pointer_type(PARAM))
    g = tl.load(entry + 3).to(tl.pointer_type(GRAD))
    m = tl.load(entry + 4).to(tl.pointer_type(MOMENTUM))
    h = tl.load(entry + 5).to(tl.pointer_type(STATE))
    if ALIGNED:
        theta, g = tl.multiple_of(theta, 16), tl.multiple_of(g, 16)
        m, h = tl.multiple_of(m, 16), tl.multiple_of(h, 16)
    theta, g, m, h = theta + start, g + start, m + start, h + start

    lr, beta1, eps = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 3)
    momentum_scale, hessian_scale, noise = tl.load(numbers + 5), tl.load(numbers + 6), tl.load(numbers + 7)
    rule = (
        beta1.to(STATE),
        (1 - beta1).to(STATE),
        (tl.load(numbers + 2) * hessian_scale).to(STATE),
        (noise * noise * hessian_scale).to(STATE),
        eps.to(STATE),
        momentum_scale.to(STATE),
        (1 - lr * tl.load(numbers + 4)).to(STATE),
        lr.to(STATE),
        tl.load(numbers + 8).to(tl.uint32),
    )
    bad = tl.zeros([BLOCK], tl.int32)
    unclipped = tl.zeros([BLOCK], tl.int32)
    curved = tl.zeros([BLOCK], tl.int32)
    if length == CHUNK:
        for offset in range(0, CHUNK, BLOCK):
            at = offset + tl.arange(0, BLOCK)
            of_block = _update_block(
                theta + at, g + at, m + at, h + at, rule, at < CHUNK, False, STATE, MAXIMIZE, NESTEROV, NOISE
            )
            bad += of_block[0]
            unclipped += of_block[1]
            curved += of_block[2]
    else:
        for offset in range(0, CHUNK, BLOCK):
            if offset < length:
                at = offset + tl.arange(0, BLOCK)
                of_block = _update_block(
                    theta + at, g + at, m + at, h + at, rule, at < length, True, STATE, MAXIMIZE, NESTEROV, NOISE
                )
                bad += of_block[0]
                unclipped += of_block[1]
                curved += of_block[2]

    found = tl.sum(bad)
    if found > 0:
        tl.atomic_add(counts, found.to(tl.int64))
    if COUNTING:
        tl.atomic_add(counts + 1, tl.sum(unclipped).to(tl.int64))
        tl.atomic_add(counts + 2, tl.sum(curved).to(tl.int64))


@_jit
def _update_block(
    theta,
    g,
    m,
    h,
    rule,
    inside,
    MASKED: tl.constexpr,
    STATE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    NESTEROV: tl.constexpr,
    NOISE: tl.constexpr,
):
    """One block; returns (not finite, unclipped, curved) of each coordinate as 0 or 1."""
    keep, weight, rho, noise, eps, momentum_scale, decay, lr, seed = rule
    if MASKED:
        old, grad = tl.load(theta, mask=inside, other=0).to(STATE), tl.load(g, mask=inside, other=0).to(STATE)
        average, hessian = tl.load(m, mask=inside, other=0).to(STATE), tl.load(h, mask=inside, other=0)
    else:
        old, grad = tl.load(theta).to(STATE), tl.load(g).to(STATE)
        average, hessian = tl.load(m).to(STATE), tl.load(h)
    usable = tl.abs(grad) < float("inf")
    grad = tl.where(usable, grad, 0.0)
    if MAXIMIZE:
        grad = -grad
    average = tl.where(usable, keep * average + weight * grad, average)
    followed = keep * average + weight * grad if NESTEROV else average

    denominator = hessian * rho
    floor = tl.maximum(_square_root(tl.maximum(hessian * noise, 0.0), STATE), eps) if NOISE else eps
    curved = denominator > floor
    ratio = _quotient(followed, tl.maximum(denominator, floor), STATE) * momentum_scale
    unclipped = tl.abs(ratio) < 1
    step = tl.minimum(tl.maximum(ratio, -1.0), 1.0)
    new = tl.where(usable, old * decay - lr * step, old)

    kept = average if m.dtype.element_ty == STATE else _rounded_by_chance(average, seed)
    if MASKED:
        tl.store(theta, new.to(theta.dtype.element_ty), mask=inside)
        tl.store(m, kept, mask=inside)
    else:
        tl.store(theta, new.to(theta.dtype.element_ty))
        tl.store(m, kept)
    return (inside & (usable == 0)).to(tl.int32), (inside & unclipped).to(tl.int32), (inside & curved).to(tl.int32)


@_jit
def _rounded_by_chance(x, seed):
    """`rounding.rounded_to_bfloat16`."""
    bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
    noise = bits ^ seed
    noise = (noise ^ (noise >> 16)) * 0x85EBCA6B
    noise = (noise ^ (noise >> 13)) * 0xC2B2AE35
    noise = noise ^ (noise >> 16)
    return ((bits + (noise & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@_jit
def _quotient(x, y, STATE: tl.constexpr):
    """Rounded as IEEE asks, so that x / x is 1 and counts as clipped."""
    if STATE == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@_jit
def _square_root(x, STATE: tl.constexpr):
    if STATE == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)
