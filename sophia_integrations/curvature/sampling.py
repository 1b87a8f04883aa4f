"""Random numbers of the Hessian pass: keyed generators, the choice of rows, and labels from logits."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21
"""Logits turned into probabilities at a time; bounds the sampler's memory whatever the batch and vocabulary."""


def keyed_generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator whose stream depends on `key` alone, so that there is no state to checkpoint."""
    generator = torch.Generator(device)
    generator.manual_seed(key_to_seed(*key))
    return generator


def key_to_seed(*key: int | str) -> int:
    """A 63-bit seed from a tuple such as (seed, step, rank, unit)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def sample_categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one class per row by inverting the cumulative distribution.

    Args:
        logits: [rows, classes], any floating dtype; -inf excludes a class.
        generator: on the device of `logits`.

    Returns:
        int64 [rows]. A class of probability 0 is never drawn.
    """
    rows, classes = logits.shape
    labels = torch.empty(rows, dtype=torch.int64, device=logits.device)
    step = max(1, CHUNK_ELEMENTS // max(classes, 1))
    uniform = torch.rand(rows, 1, generator=generator, device=logits.device, dtype=torch.float32)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        cdf = torch.softmax(logits[part], dim=-1, dtype=torch.float32)
        torch.cumsum(cdf, dim=-1, out=cdf)
        total = cdf[:, -1:]
        below_total = torch.nextafter(total, torch.zeros_like(total))
        threshold = torch.minimum(uniform[part] * total, below_total)
        labels[part] = torch.searchsorted(cdf, threshold, right=True).squeeze(1).clamp_(max=classes - 1)
    return labels


def choose_units(
    row_counts: list[int], fraction: float, units: int, generator: torch.Generator
) -> list[tuple[int, Tensor]]:
    """Draw rows of the remembered micro-batches without replacement and split them into units.

    Args:
        row_counts: rows of each micro-batch.
        fraction: share of all rows to use, rounded up or down by chance to keep it on average; at least one row is.
        units: units to form; a unit never crosses micro-batches, so there may be a few more.
        generator: on the CPU.

    Returns:
        One (micro-batch, row indices [rows of the unit]) pair per unit, in order.
    """
    total = sum(row_counts)
    order = torch.randperm(total, generator=generator)
    whole, rest = divmod(fraction * total, 1)
    wanted = min(total, max(1, int(whole) + int(torch.rand((), generator=generator) < rest)))
    chosen = order[:wanted].sort().values
    size = -(-wanted // units)
    result, offset = [], 0
    for batch, count in enumerate(row_counts):
        rows = chosen[(chosen >= offset) & (chosen < offset + count)] - offset
        result += [(batch, part) for part in rows.split(size) if len(part)]
        offset += count
    return result
