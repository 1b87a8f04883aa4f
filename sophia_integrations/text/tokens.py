"""The rows of a split as a table of tokens: made once for the same text and tokenizer, and mapped from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..cache import digest
from ..errors import UserError
from .bad_rows import Tally
from .cache import Notes, cached_table
from .rows import Split

if TYPE_CHECKING:
    import datasets

    from .encode import Encoder


_VERSION = "4"  # part of every name in the cache: raise it when the same tokens are kept in another way


@dataclass
class Counts:
    """What one split holds.

    Attributes:
        documents: files or rows, without empty ones.
        bytes: of their text.
        tokens: of all that is trained on; for seq2seq inputs and targets.
        rows: blocks, packed rows or examples.
        dropped_tokens: at the end of the text, where they fill no block.
        empty: rows without text.
        cut: examples cut to the block size.
        left_out: examples without loss within the block size.
        padding: tokens that only fill packed rows.
        learned: labels that carry loss; None when all do.
    """

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    rows: int = 0
    dropped_tokens: int = 0
    empty: int = 0
    cut: int = 0
    left_out: int = 0
    padding: int = 0
    learned: int | None = None


def token_table(
    name: str, split: Split, encoder: Encoder, key: str, bad_rows: str, say: Callable[[str], object]
) -> tuple[datasets.Dataset, Counts, Tally]:
    """The items of a split, their counts, and the rows that the chat template does not take.

    Args:
        name: train or validation.
        split: the rows.
        encoder: makes items of them.
        key: identifies text and tokens, for the name in the cache.
        bad_rows: "error" or "skip", for rows that the chat template does not take.
        say: receives the lines for the reader.

    Raises:
        UserError: bad rows under "error", text that fills no block, no example that carries loss.
    """

    def items(notes: Notes) -> Iterator[dict[str, Any]]:
        counts, bad = Counts(bytes=split.bytes, empty=split.empty), Tally(len(split.rows))
        yield from encoder.items(split.rows, counts, bad.add)
        notes.update(counts=asdict(counts), bad=asdict(bad))

    what = f"Tokens: reading {len(split.rows):,} {'documents' if encoder.layout == 'blocks' else 'examples'} …"
    table, notes = cached_table(f"tokens-{digest([_VERSION, key])[:32]}-{name}", encoder.features, items, what, say)
    counts, bad = Counts(**notes["counts"]), Tally(**notes["bad"])
    bad.judge(bad_rows)
    size = encoder.block_size
    if not counts.rows and encoder.layout == "blocks":
        raise UserError(
            f"data: the {name} documents hold {counts.tokens} tokens, less than one block of {size}; "
            "give more text or a smaller data.block_size"
        )
    if not counts.rows:
        raise UserError(
            f"data: no {name} example carries loss within {size} tokens; raise data.block_size or look at the data"
        )
    return table.with_format("torch"), counts, bad
