"""The rows of a split as a table of tokens: made once for the same text and tokenizer, and mapped from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .bad_rows import Tally
from .cache import Notes, cached_table
from .encode import Counts, Encoder
from .split import Split

if TYPE_CHECKING:
    import datasets


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
        say(f"Tokens: reading {len(split.rows):,} {encoder.things} …")
        counts, bad = Counts(bytes=split.bytes, empty=split.empty), Tally(len(split.rows))
        yield from encoder.items(split.rows, counts, bad.add)
        notes.update(counts=asdict(counts), bad=asdict(bad))

    table, notes = cached_table(f"items-{key[:32]}-{name}", encoder.features, items, say)
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
