"""Documents to training blocks: tokens joined by the end-of-text token, cut into rows of equal length."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import UserError
from .cache import cache_dir, digest, store
from .documents import Corpus, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 64  # documents per call of the tokenizer


class Blocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of `block_size` tokens out of one stream; the last, incomplete row is dropped and counted.

    An item is ``{"input_ids": [block_size], "labels": [block_size]}``; the model shifts the labels itself.
    """

    def __init__(self, stream: np.ndarray, block_size: int) -> None:
        rows = len(stream) // block_size
        self.rows = stream[: rows * block_size].reshape(rows, block_size)
        self.dropped_tokens = len(stream) - rows * block_size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"input_ids": row, "labels": row.clone()}


@dataclass(frozen=True)
class Counts:
    """What one split holds; `dropped_tokens` is the tail that fills no block."""

    documents: int
    bytes: int
    tokens: int
    blocks: int
    dropped_tokens: int


@dataclass(frozen=True)
class Splits:
    """Both splits as blocks, their counts, and the digest that identifies text, split and tokenizer."""

    train: Blocks
    validation: Blocks
    counts: dict[str, Counts]
    digest: str

    def describe(self) -> str:
        """The counts in two lines, as printed before training."""
        lines = []
        for name, count in self.counts.items():
            lines.append(
                f"{name}: {count.documents:,} documents, {count.bytes / 1e6:.1f} MB, {count.tokens:,} tokens, "
                f"{count.blocks:,} blocks of {self.train.rows.shape[1]} ({count.dropped_tokens} tokens dropped)"
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """Counts and digest, for the run folder."""
        counts = {name: asdict(count) for name, count in self.counts.items()}
        return json.dumps({"digest": self.digest, **counts}, indent=2) + "\n"


def build_blocks(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, block_size: int, say: Callable[[str], object]
) -> Splits:
    """Tokenizes both splits, or takes them from the cache.  Raises `UserError` when a split fills no block."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    identity = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    key = digest([corpus.digest(), identity, str(tokenizer.eos_token_id)])
    splits, counts = {}, {}
    for name, documents in (("train", corpus.train), ("validation", corpus.validation)):
        stream = _stream(f"tokens-{key[:32]}-{name}.npy", documents, tokenizer, say)
        blocks = splits[name] = Blocks(stream, block_size)
        if not len(blocks):
            raise UserError(
                f"data: the {name} documents hold {len(stream)} tokens, less than one block of {block_size}; "
                "give more text or a smaller data.block_size"
            )
        size = sum(len(document.text.encode("utf-8", "surrogatepass")) for document in documents)
        counts[name] = Counts(len(documents), size, len(stream), len(blocks), blocks.dropped_tokens)
    return Splits(splits["train"], splits["validation"], counts, key)


def _stream(
    name: str, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, say: Callable[[str], object]
) -> np.ndarray:
    cached = cache_dir() / name
    if cached.is_file():
        try:
            return np.load(cached, mmap_mode="r")
        except (ValueError, OSError):
            say(f"Cache: {cached} is damaged; making it again.")
    say(f"Tokens: reading {len(documents):,} documents …")
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    pieces = []
    for start in range(0, len(documents), _BATCH):
        texts = [document.text for document in documents[start : start + _BATCH]]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        pieces.extend(np.array([*ids, tokenizer.eos_token_id], dtype=kind) for ids in encoded["input_ids"])
    stream = np.concatenate(pieces)

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            np.save(file, stream)

    store(name, write, say)
    return stream
