"""How tokens lie in rows of one length: documents joined and cut, or whole examples packed beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

IGNORED = -100
"""The label of a token that carries no loss."""

Ids = Sequence[int]


def joined(documents: Iterable[Ids], size: int, opening: Ids = (), closing: Ids = ()) -> Iterator[list[int]]:
    """Rows of `size` tokens, each between `opening` and `closing`; what fills none at the end is dropped."""
    width, held = size - len(opening) - len(closing), list[int]()
    for document in documents:
        held.extend(document)
        whole = len(held) // width * width
        for start in range(0, whole, width):
            yield [*opening, *held[start : start + width], *closing]
        held = held[whole:]


def packed(examples: Iterable[tuple[Ids, Ids]], size: int, pad: int) -> Iterator[dict[str, list[int]]]:
    """Examples (tokens, labels) of at most `size` tokens in their order, as many in a row as fit whole.

    A row is ``{"input_ids", "labels", "position_ids"}``, each [size].  Positions begin anew with every example, and
    transformers keeps attention within them when no attention mask is given; what fills a row, `pad` without loss, is
    an example of its own.
    """
    held: list[tuple[Ids, Ids]] = []
    for example in examples:
        if sum(len(ids) for ids, _ in [*held, example]) > size:
            yield _row(held, size, pad)
            held = []
        held.append(example)
    if held:
        yield _row(held, size, pad)


def _row(examples: Sequence[tuple[Ids, Ids]], size: int, pad: int) -> dict[str, list[int]]:
    rest = size - sum(len(ids) for ids, _ in examples)
    parts = [*examples, ([pad] * rest, [IGNORED] * rest)]
    return {
        "input_ids": [token for ids, _ in parts for token in ids],
        "labels": [label for _, labels in parts for label in labels],
        "position_ids": [position for ids, _ in parts for position in range(len(ids))],
    }
