"""Documents to training blocks: tokens joined by the token that ends a document, cut into rows of equal length."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from .arrays import cached_stream
from .rows import Row
from .tokenizer import separator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 64  # documents per call of the tokenizer


class Blocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of `block_size` tokens out of one stream; the last, incomplete row is dropped and counted.

    An item is ``{"input_ids": [block_size], "labels": [block_size]}``; the model shifts the labels itself.

    Args:
        stream: tokens, [tokens].
        block_size: tokens in a row.
        frame: the tokens that open and close each row of an encoder, or None.
    """

    def __init__(self, stream: np.ndarray, block_size: int, frame: tuple[int, int] | None = None) -> None:
        width = block_size - 2 if frame else block_size
        rows = len(stream) // width
        self.rows, self.frame = stream[: rows * width].reshape(rows, width), frame
        self.tokens, self.dropped_tokens = len(stream), len(stream) - rows * width

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return block(self.rows[index], self.frame)


def block(tokens: np.ndarray | list[int], frame: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """The item of one row of tokens."""
    row = torch.from_numpy(np.asarray(tokens, np.int64))
    if frame:
        row = torch.cat([torch.tensor(frame[:1]), row, torch.tensor(frame[1:])])
    return {"input_ids": row, "labels": row.clone()}


def frame_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """The tokens that an encoder's tokenizer puts around a text; None when it has none."""
    pair = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    return None if None in pair else pair


def token_stream(
    name: str, rows: Collection[Row], tokenizer: PreTrainedTokenizerBase, say: Callable[[str], object]
) -> np.ndarray:
    """All tokens of `rows`, each document followed by its end, from the cache entry `name` or made now."""
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32

    def pieces() -> Iterator[np.ndarray]:
        for batch in batches(rows, BATCH):
            yield np.concatenate([np.array(ids, dtype=kind) for ids in document_tokens(batch, tokenizer)])

    return cached_stream(f"{name}.npy", np.dtype(kind), pieces, f"Tokens: reading {len(rows):,} documents", say)


def document_tokens(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each document, with the one that ends it."""
    texts = [row.values["text"] for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [[*ids, separator(tokenizer)] for ids in encoded["input_ids"]]


def batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Lists of up to `size` rows."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
