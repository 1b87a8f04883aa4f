"""The update in compiled C, for dense float32 and bfloat16 parameters on the CPU: one pass over memory, no temporaries.

The library is reached by addresses alone, so it fits every version of torch.
"""

from __future__ import annotations

import array
import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .eager import memory_order
from .native_library import library, threads_of_torch
from .rule import Rule
from .sharding import WHOLE

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""As in `native_step.c`."""

DTYPES = tuple(_TYPES)

_PER_THREAD = 1 << 16
"""Elements that are worth a thread of their own."""


class _Rule(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_float)
        for name in (
            "beta1",
            "one_minus_beta1",
            "sign",
            "ahead",
            "ahead_grad",
            "rho",
            "noise",
            "eps",
            "momentum_scale",
            "decay",
            "lr",
        )
    ] + [("seed", ctypes.c_uint32)]

    @classmethod
    def of(cls, rule: Rule) -> _Rule:
        lr = float(rule.lr)
        return cls(
            beta1=rule.beta1,
            one_minus_beta1=1 - rule.beta1,
            sign=-1 if rule.maximize else 1,
            ahead=rule.beta1 if rule.nesterov else 1,
            ahead_grad=1 - rule.beta1 if rule.nesterov else 0,
            rho=rule.rho * rule.hessian_scale,
            noise=rule.noise * rule.hessian_scale**0.5,
            eps=rule.eps,
            momentum_scale=rule.momentum_scale,
            decay=1 - lr * rule.weight_decay,
            lr=lr,
            seed=rule.seed,
        )


def takes(param: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor) -> bool:
    """Whether `update` can be given these tensors."""
    tensors = (param, grad, exp_avg, hessian)
    for x in tensors:
        if type(x) not in WHOLE or not x.is_cpu:
            return False
    if param.dtype not in _TYPES or grad.dtype not in _TYPES:
        return False
    if exp_avg.dtype not in _TYPES or hessian.dtype != torch.float32:
        return False
    if param.is_contiguous() and grad.is_contiguous() and exp_avg.is_contiguous() and hessian.is_contiguous():
        return True
    return param.stride() == grad.stride() == exp_avg.stride() == hessian.stride() and _is_dense(param)


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    hessians: Sequence[Tensor],
    rule: Rule,
    counting: bool,
) -> Tensor:
    """As `eager.update`, for tensors that `takes` says yes to, where there is a `library`."""
    table, size = array.array("Q"), 0
    for param, grad, exp_avg, hessian in zip(params, grads, exp_avgs, hessians, strict=True):
        length = param.numel()
        types = _TYPES[param.dtype], _TYPES[grad.dtype], _TYPES[exp_avg.dtype]
        addresses = param.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), hessian.data_ptr()
        table.extend((*addresses, length, *types))
        size += length
        torch.autograd.graph.increment_version(param)
    counts = torch.zeros(3, dtype=torch.int64)
    threads = min(torch.get_num_threads(), 1 + size // _PER_THREAD)
    address = table.buffer_info()[0]
    found, _ = library()
    found.sophia_step(
        ctypes.c_void_p(address),
        ctypes.c_int64(size),
        ctypes.byref(_Rule.of(rule)),
        ctypes.c_int(counting),
        ctypes.c_int(threads),
        ctypes.c_void_p(counts.data_ptr()),
        threads_of_torch(),
    )
    return counts


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a piece of memory without holes, in any order of the dimensions."""
    return tensor.permute(memory_order(tensor)).is_contiguous()
