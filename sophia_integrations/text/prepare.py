"""A source and a tokenizer to data sets of tokens, the collator that makes batches of them, and their counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import default_collate

from ..cache import digest
from ..errors import UserError
from ..tasks import TASKS
from .bad_rows import Tally
from .collate import Mask, Pad, with_labels
from .encode import Encoder
from .source import Source
from .stream import Stream
from .tokenizer import identity, padding
from .tokens import Counts, token_table

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_VERSION = "3"  # part of every cache key: raise it when the same text becomes other tokens


@dataclass(frozen=True)
class Prepared:
    """Data for a trainer.

    Attributes:
        train: items as `Encoder.items` makes them; a `Stream` is endless.
        validation: the same, always of a known length.
        collate: items to a batch, ``{name: tensor}``.
        layout: "blocks", "packed" or "rows".
        block_size: tokens of an item at most, and exactly except for "rows".
        counts: by split; a stream has none.
        digest: identifies text, split and tokens.
        labels: names of a classification's labels.
        label_counts: training rows of each.
        bad: rows left out as bad, but for those of a stream; None where a bad row is an error.
    """

    train: datasets.Dataset | Stream
    validation: datasets.Dataset
    collate: Callable[[Any], Any]
    layout: str
    block_size: int
    counts: dict[str, Counts]
    digest: str
    labels: list[str] | None = None
    label_counts: list[int] = field(default_factory=list)
    bad: Tally | None = None

    @property
    def skipped_rows(self) -> int | None:
        """Rows left out as bad; those of a stream as they are met, again in every pass.  None where they are errors."""
        if self.bad is None:
            return None
        return self.bad.count + (self.train.bad if isinstance(self.train, Stream) else 0)

    @property
    def tokens_per_row(self) -> float:
        """Tokens of a training item on average, padding included where items have one length."""
        if self.layout != "rows" or "train" not in self.counts:
            return float(self.block_size)
        return self.counts["train"].tokens / self.counts["train"].rows

    def describe(self) -> str:
        """The counts in a few lines, as printed before training."""
        lines = [] if "train" in self.counts else ["train: a stream, read and tokenized while training"]
        lines += [f"{name}: {_in_words(count, self.layout, self.block_size)}" for name, count in self.counts.items()]
        if self.labels is not None:
            shown = [f"{name} {count:,}" for name, count in zip(self.labels, self.label_counts, strict=True)]
            more = f", … ({len(shown)} in all)" if len(shown) > 20 else ""
            lines.append(f"labels: {', '.join(shown[:20])}{more}")
        if self.bad is not None:
            kind = " of validation" if "train" not in self.counts else ""
            more = f": {self.bad}" if self.bad.count else ""
            lines.append(f"bad rows: {self.bad.count:,} of {self.bad.total:,}{kind} skipped{more}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Counts and digest, for the run folder."""
        counts = {name: asdict(count) for name, count in self.counts.items()}
        skipped = {} if self.bad is None else {"skipped_rows": self.skipped_rows}
        return json.dumps({"digest": self.digest, **counts, **skipped}, indent=2) + "\n"


def prepare(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    task: str = "pretrain",
    packing: bool | None = None,
    mask_probability: float = 0.15,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> Prepared:
    """Tokenizes both splits of `source`, or takes them from the cache.

    Args:
        block_size: tokens in a row; an example is cut to it, text is joined and cut into rows.
        task: pretrain, finetune, classify, seq2seq or masked-lm.
        packing: False gives every document its own row, True packs prompt-completion and chat examples; by default
            only text is packed.
        mask_probability: share of tokens that masked-lm hides.
        seed: key of the masks and of a stream's order.
        say: receives the lines for the reader.

    Raises:
        UserError: a split that fills no row, a tokenizer that lacks what the format needs.
    """
    text = source.format == "text"
    layout = ("rows" if packing is False else "blocks") if text else ("packed" if packing else "rows")
    encoder = Encoder(source.format, task, tokenizer, block_size, layout, source.label_numbers)
    key = digest([_VERSION, source.digest, identity(tokenizer), layout, task, str(block_size)])
    data: dict[str, Any] = {}
    counts: dict[str, Counts] = {}
    bad = source.bad
    for name, split in (("train", source.train), ("validation", source.validation)):
        if source.streaming and name == "train":
            data[name] = Stream(split.rows, encoder, seed, source.bad_rows)
        else:
            data[name], counts[name], later = token_table(name, split, encoder, key, source.bad_rows, say)
            bad = replace(bad + later, total=bad.total)
    collate = _collator(tokenizer, layout, task, mask_probability, seed, block_size if source.streaming else None)
    return Prepared(
        data["train"],
        data["validation"],
        collate,
        layout,
        block_size,
        counts,
        key,
        source.labels,
        source.label_counts,
        bad if source.bad_rows == "skip" else None,
    )


def _collator(
    tokenizer: PreTrainedTokenizerBase, layout: str, task: str, probability: float, seed: int, length: int | None
) -> Callable[[Any], Any]:
    inner = {"rows": Pad(padding(tokenizer), length), "packed": default_collate, "blocks": with_labels}[layout]
    if not TASKS[task].masks:
        return inner
    if tokenizer.mask_token_id is None:
        raise UserError("task: masked-lm needs a tokenizer with a mask token, such as BERT's; this one has none")
    return Mask(tokenizer, probability, seed, inner)


def _in_words(count: Counts, layout: str, size: int) -> str:
    things = "documents" if layout == "blocks" else "examples"
    words = f"{count.documents:,} {things}, {count.bytes / 1e6:.1f} MB, {count.tokens:,} tokens"
    if count.learned is not None:
        words += f" ({count.learned / count.tokens:.0%} carry loss)"
    if layout == "blocks":
        words += f", {count.rows:,} blocks of {size} ({count.dropped_tokens} tokens dropped)"
    elif layout == "packed":
        share = count.padding / (count.rows * size)
        words += f", packed into {count.rows:,} rows of {size} ({share:.1%} padding)"
    notes = [
        f"{count.empty:,} empty rows left out" if count.empty else "",
        f"{count.cut:,} cut to {size} tokens" if count.cut else "",
        f"{count.left_out:,} left out, without loss within {size} tokens" if count.left_out else "",
    ]
    return "; ".join([words, *filter(None, notes)])
