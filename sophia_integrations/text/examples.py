"""Data sets of examples: one of them a row, or several packed into a row that none of them can look out of."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from .arrays import cached_arrays
from .bad_rows import Tally
from .blocks import batches
from .encode import IGNORED, Encoder
from .rows import Row

_BATCH = 256  # rows per call of the tokenizer

Item = dict[str, Tensor]


class Examples(torch.utils.data.Dataset[Item]):
    """Examples of different lengths, in memory as two long arrays.

    An item is ``{"input_ids": [tokens], "labels": [labels]}``; of a classification, `labels` is one number.

    Args:
        arrays: ``ids`` and ``labels`` of all examples behind one another, ``ends`` [examples, 2] of each in them,
            ``left_out`` [2]: how many were cut to the block size, and how many carry no loss and are not here,
            and ``bad``: what `Tally` counted, as bytes of JSON.
        one_label: items have one label and not one per token.
    """

    def __init__(self, arrays: dict[str, np.ndarray], one_label: bool = False) -> None:
        self.ids, self.labels, self.ends = arrays["ids"], arrays["labels"], arrays["ends"]
        self.cut, self.left_out = (int(count) for count in arrays["left_out"])
        self.bad = Tally(**json.loads(arrays["bad"].tobytes())) if "bad" in arrays else Tally()
        self.one_label = one_label
        self.lengths = np.diff(self.ends[:, 0], prepend=0)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def tokens(self) -> int:
        """Tokens of all examples; for seq2seq those of the targets too."""
        return len(self.ids) + (0 if self.one_label or len(self.labels) == len(self.ids) else len(self.labels))

    @property
    def learned(self) -> int:
        """Labels that carry loss."""
        return int((self.labels != IGNORED).sum())

    def __getitem__(self, index: int) -> Item:
        index = range(len(self))[index]
        starts = self.ends[index - 1] if index else (0, 0)
        ids, labels = (
            torch.from_numpy(values[start:end].astype(np.int64))
            for values, start, end in zip((self.ids, self.labels), starts, self.ends[index], strict=True)
        )
        return {"input_ids": ids, "labels": labels[0] if self.one_label else labels}


class Packed(torch.utils.data.Dataset[Item]):
    """Examples in their order, as many in a row of `block_size` as fit whole.

    An item is ``{"input_ids", "labels", "position_ids"}``, each [block_size].  Positions begin anew with every example,
    and transformers keeps attention within them when no attention mask is given; padding at the end of a row is an
    example without loss.
    """

    def __init__(self, examples: Examples, block_size: int, pad: int) -> None:
        self.examples, self.block_size, self.pad = examples, block_size, pad
        self.starts = _fill(examples.lengths, block_size)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def padding(self) -> int:
        """Tokens that only fill rows."""
        return len(self) * self.block_size - len(self.examples.ids)

    def __getitem__(self, index: int) -> Item:
        index = range(len(self))[index]
        return pack([self.examples[i] for i in range(*self.starts[index : index + 2])], self.block_size, self.pad)


def _fill(lengths: np.ndarray, size: int) -> list[int]:
    """The first example of each row, and one past the last."""
    starts, used = [0], 0
    for number, length in enumerate(lengths.tolist()):
        if used + length > size:
            starts.append(number)
            used = 0
        used += length
    return [*starts, len(lengths)]


def pack(items: Sequence[Item], size: int, pad: int) -> Item:
    """One row of `size` tokens from examples that fit into it."""
    rest = size - sum(len(item["input_ids"]) for item in items)
    padding = {"input_ids": torch.full((rest,), pad), "labels": torch.full((rest,), IGNORED)}
    parts = [*items, padding]
    row = {name: torch.cat([part[name] for part in parts]) for name in ("input_ids", "labels")}
    row["position_ids"] = torch.cat([torch.arange(len(part["input_ids"])) for part in parts])
    return row


def build_examples(
    name: str, rows: Collection[Row], encoder: Encoder, one_label: bool, say: Callable[[str], object]
) -> Examples:
    """The examples of `rows`, from the cache entry `name` or made now."""
    what = f"Tokens: reading {len(rows):,} examples"
    return Examples(cached_arrays(f"{name}.npz", lambda: _arrays(rows, encoder), what, say), one_label)


def _arrays(rows: Collection[Row], encoder: Encoder) -> dict[str, np.ndarray]:
    bad = Tally(len(rows))
    examples = itertools.chain.from_iterable(encoder(batch, bad) for batch in batches(rows, _BATCH))
    ids, labels, ends, cut, left_out = [], [], [], 0, 0
    total = np.zeros(2, np.int64)
    for example in examples:
        if not example.learns:
            left_out += 1
            continue
        cut += example.cut
        ids.append(np.array(example.ids, np.int32))
        labels.append(np.array(example.labels, np.int32))
        total = total + (len(example.ids), len(example.labels))
        ends.append(total)
    nothing = np.zeros(0, np.int32)
    return {
        "ids": np.concatenate([nothing, *ids]),
        "labels": np.concatenate([nothing, *labels]),
        "ends": np.array(ends, np.int64).reshape(-1, 2),
        "left_out": np.array([cut, left_out]),
        "bad": np.frombuffer(json.dumps(asdict(bad)).encode(), np.uint8),
    }
