"""Where text comes from, as rows of one format in two splits, the same on every machine; never tokens."""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..cache import digest
from ..errors import UserError, needs
from . import formats
from .bad_rows import Tally
from .cache import table_in_memory
from .files import read_files, standard_library
from .hub import read_hub
from .raw import RawTable
from .rows import Split, row_features, row_stream, row_table, scan_rows


@dataclass(frozen=True)
class Source:
    """Text of one format in two splits.

    Attributes:
        format: text, prompt-completion, chat or classification.
        train, validation: the splits; the rows of `train` may be a stream.
        labels: of a classification, names in the order of their numbers: a hub data set's own, else sorted.
        label_numbers: the number of each label, as the rows hold it.
        label_counts: training rows of each label, in the order of the numbers.
        bad_rows: "error" or "skip": what to do about rows that prove to be bad later.
        bad: rows that were left out as bad.
        digest: identifies text, format and split; of a stream only where it comes from.
    """

    format: str
    train: Split
    validation: Split
    digest: str
    labels: list[str] | None = None
    label_numbers: dict[str, int] = field(default_factory=dict)
    label_counts: list[int] = field(default_factory=list)
    bad_rows: str = "error"
    bad: Tally = field(default_factory=Tally)

    @property
    def streaming(self) -> bool:
        """Whether the training rows come from a stream."""
        return not hasattr(self.train.rows, "__len__")

    def training_texts(self) -> Iterator[str]:
        """All training text, for a tokenizer to learn from."""
        for row in self.train.rows:
            yield from formats.texts(self.format, row)


def load_source(
    *,
    source: str | None = None,
    files: Sequence[str] | None = None,
    hub: Mapping[str, str | None] | None = None,
    validation_files: Sequence[str] | None = None,
    validation_fraction: float = 0.05,
    task: str = "pretrain",
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    streaming: bool = False,
    bad_rows: str = "error",
    say: Callable[[str], object] = print,
) -> Source:
    """Reads `source` ("python-stdlib"), `files` (patterns) or `hub` (path, name, split, validation_split, revision).

    Args:
        validation_files: patterns of the held-out files; otherwise `validation_fraction` is held out by hash.
        task: pretrain, finetune, classify, seq2seq or masked-lm; it decides the format when `format` is None.
        columns: part of a row (text, prompt, completion, messages, label) to column, where they differ.
        streaming: read training rows as they are needed; validation rows are read at once.
        bad_rows: "error" refuses data with bad rows, "skip" leaves them out and counts them.
        say: receives a line when text is read and not taken from the cache.

    Raises:
        UserError: nothing to read, a missing column, bad rows (how many, the first by file and number), an empty split.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UserError(needs("datasets"))
    raws, held = _tables(source, files, hub, validation_files, streaming)
    format = formats.choose_format(task, format, raws[0].names, columns)
    if streaming:
        _require_streamable(raws[0], held)
        scans = [scan_rows(table_in_memory(row_features(format), row_stream(held, format, columns)), None)]
        train, validation = Split(row_stream(raws, format, columns)), scans[0].train
        hashes = [f"{file} {os.path.getsize(file)}" if os.path.isfile(file) else file for file in raws[0].files]
        hashes.append(str(raws[0].cut))
    else:
        fraction, hashes = None if held else validation_fraction, []
        scans = [scan_rows(row_table(raws, format, columns, say), fraction, raws[0].named)]
        if held:
            scans.append(scan_rows(row_table(held, format, columns, say), None, held[0].named))
        train, validation = scans[0].train, scans[1].train if held else scans[0].validation
    for scan in scans:
        scan.bad.judge(bad_rows)
    _require_text(train, validation, raws[0].origin, held[0].origin if held else None, validation_fraction)
    identity = digest([format, *hashes, *(scan.digest for scan in scans)])
    found = Source(format, train, validation, identity, bad_rows=bad_rows, bad=sum((s.bad for s in scans), Tally()))
    return found if format != "classification" else _with_labels(found, raws[0], columns)


def _tables(
    source: str | None,
    files: Sequence[str] | None,
    hub: Mapping[str, str | None] | None,
    validation_files: Sequence[str] | None,
    streaming: bool,
) -> tuple[list[RawTable], list[RawTable]]:
    """The tables to train on, and those held out, if they are named."""
    if source is not None:
        return [standard_library()], []
    if hub is not None:
        held = hub.get("validation_split")
        return read_hub(hub, hub.get("split") or "train", streaming), read_hub(hub, held, streaming) if held else []
    assert files is not None
    raw = read_files(files, "data.files")
    if validation_files is None:
        return [raw], []
    held = read_files(validation_files, "data.validation_files")
    shared = sorted({*held.files}.intersection(raw.files))
    if shared:
        raise UserError(f"data.validation_files: {shared[0]} is also in data.files; a file may be in one only")
    return [raw], [held]


def _require_streamable(raw: RawTable, held: list[RawTable]) -> None:
    if raw.named or any(other.named for other in held):
        raise UserError(f"data.streaming: {raw.origin} are text files, which are read whole; leave streaming out")
    if not held:
        raise UserError(
            f"data.streaming: {raw.origin} cannot be split while it streams; name the held-out rows in "
            "data.validation_files or data.hub.validation_split"
        )


def _require_text(train: Split, validation: Split, origin: str, held: str | None, fraction: float) -> None:
    if hasattr(train.rows, "__len__") and not train.bytes:
        raise UserError(f"{origin}: there is no text to train on")
    if not validation.bytes and held is not None:
        raise UserError(f"{held}: there is no text to validate on")
    if not validation.bytes:
        raise UserError(
            f"{origin}: none of its {len(train.rows)} document(s) is held out at validation_fraction "
            f"{fraction:g}; give held-out ones, more documents, or raise the fraction"
        )


def _with_labels(source: Source, raw: RawTable, columns: Mapping[str, str] | None) -> Source:
    """The source of a classification, with its labels in the order of their numbers.

    Raises `UserError` when they are no classes.
    """
    counts, held = (Counter(split.rows["label"]) for split in (source.train, source.validation))
    declared = getattr(raw.features.get((columns or {}).get("label") or "label"), "names", None)
    written = _in_order({*counts, *held}, declared, raw.origin)
    return replace(
        source,
        labels=list(declared) if declared else [str(json.loads(label)) for label in written],
        label_numbers={label: number for number, label in enumerate(written)},
        label_counts=[counts[label] for label in written],
    )


def _in_order(found: set[str], declared: Sequence[str] | None, origin: str) -> list[str]:
    """Labels as rows hold them, in the order of their numbers; raises `UserError` when they are no classes."""
    labels = {label: json.loads(label) for label in found}
    if declared:
        unknown = sorted(label for label in labels.values() if not 0 <= label < len(declared))
        if unknown:
            raise UserError(f"{origin}: the label {unknown[0]} is none of the data set's {len(declared)} labels")
        return [str(number) for number in range(len(declared))]
    if len({isinstance(label, str) for label in labels.values()}) > 1:
        raise UserError(f"{origin}: some labels are text and some are numbers; make them all the same")
    if len(labels) < 2:
        (only,) = labels.values()
        raise UserError(f"{origin}: every row has the label {only!r}; a classification needs at least two")
    whole = all(not isinstance(label, str) or label.lstrip("-").isdigit() for label in labels.values())
    return sorted(labels, key=lambda label: int(labels[label]) if whole else labels[label])
