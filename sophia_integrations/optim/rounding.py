"""A momentum kept in bfloat16, two bytes a parameter, rounded so that no small change is lost on average.

m ← β₁ m + (1 − β₁) g changes m by less than half of bfloat16's last place where g is small beside it, and rounding to
the nearest would leave m as it was. Stochastic rounding goes up with the probability of what lies above the lower
neighbour, so that the stored value is m in the mean (Gupta et al., arXiv 1502.02551, §3).

The random bits are a hash of the value and of the step, nothing else: no state to save, and the same on every rank,
however a tensor is sharded, cut or laid out in memory; equal values are rounded alike in a step. `native_step.c` and
`triton_step` have it in their languages.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOMENTUM_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
"""Of `SophiaG`; None is the dtype of the rest of the state."""

_WORD = 1 << 32
_MIXING = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))
"""Shifts and factors of the last mixing of MurmurHash3, which is public domain."""


def momentum_seed(step: int) -> int:
    """32 bits for the rounding of a step."""
    x = (step * 0x9E3779B9 + 1) % _WORD
    for shift, factor in _MIXING:
        x = (x ^ (x >> shift)) * factor % _WORD
    return x ^ (x >> 16)


def rounded_to_bfloat16(m: Tensor, seed: int) -> Tensor:
    """`m`, float32 or wider, as bfloat16: one of its two neighbours, the nearer one more often."""
    bits = m.to(torch.float32).contiguous().view(torch.int32)
    x = bits ^ _signed(seed)
    for shift, factor in _MIXING:
        x.bitwise_xor_((x >> shift) & ((1 << (32 - shift)) - 1)).mul_(_signed(factor))
    x.bitwise_xor_(x >> 16).bitwise_and_(0xFFFF)
    return x.add_(bits).bitwise_and_(-0x10000).view(torch.float32).to(torch.bfloat16)


def _signed(word: int) -> int:
    """The int32 of the same bits."""
    return word - _WORD if word >= _WORD // 2 else word
