"""Where text comes from, as rows of one format in two splits, the same on every machine; never tokens."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UserError
from . import formats
from .bad_rows import Tally, require_action
from .cache import digest
from .documents import read_documents, standard_library
from .files import find, kind_of
from .readers import read_files, read_hub
from .rows import Row, StreamRows, Table, TableRows
from .split import Found, inspect


@dataclass(frozen=True)
class Side:
    """The rows of one split, without empty ones: how many bytes of text they hold and how many were empty."""

    rows: Collection[Row] | StreamRows
    bytes: int = 0
    empty: int = 0


@dataclass(frozen=True)
class Source:
    """Text of one format in two splits.

    Attributes:
        format: text, prompt-completion, chat or classification.
        train, validation: the splits; `train` may be a stream.
        labels: of a classification, names in the order of their numbers: a hub data set's own, else sorted.
        label_numbers: the number of each label as it stands in the rows.
        label_counts: training rows of each label, in the order of the numbers.
        skipped: names of the standard library's files that are not text.
        bad_rows: "error" or "skip": what to do about rows that prove to be bad later.
        bad: rows that were left out as bad.
        digest: identifies text, format and split; of a stream only where it comes from.
    """

    format: str
    train: Side
    validation: Side
    digest: str
    labels: list[str] | None = None
    label_numbers: dict[Any, int] = field(default_factory=dict)
    label_counts: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    bad_rows: str = "error"
    bad: Tally = field(default_factory=Tally)

    @property
    def streaming(self) -> bool:
        """Whether the training rows come from a stream."""
        return isinstance(self.train.rows, StreamRows)

    def training_texts(self) -> Iterator[str]:
        """All training text, for a tokenizer to learn from."""
        for row in self.train.rows:
            yield from formats.texts(self.format, row.values)


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
        say: receives a line when reading takes long.

    Raises:
        UserError: nothing to read, a missing column, bad rows (how many, the first by file and number), an empty split.
        ValueError: another word for `bad_rows`.
    """
    require_action(bad_rows)
    skipped: list[str] = []
    held: _Part | None = None
    if source is not None:
        documents, skipped = standard_library()
        part = _Part(documents, None, f"the standard library in {sysconfig.get_path('stdlib')}")
    elif hub is not None:
        part = _hub_part(hub, hub.get("split") or "train", streaming)
        if hub.get("validation_split"):
            held = _hub_part(hub, str(hub["validation_split"]), streaming)
    else:
        assert files is not None
        part = _files_part(files, "data.files", streaming)
        if validation_files is not None:
            held = _files_part(validation_files, "data.validation_files", streaming)
            shared = sorted(part.paths & held.paths)
            if shared:
                raise UserError(f"data.validation_files: {shared[0]} is also in data.files; a file may be in one only")
    chosen = formats.choose_format(task, format, part.names, columns)
    if streaming:
        found = _streamed(part, held, chosen, columns, bad_rows, say)
    else:
        found = _split(part, held, chosen, columns, validation_fraction, bad_rows, say)
    return replace(found, skipped=skipped, bad_rows=bad_rows)


@dataclass(frozen=True)
class _Part:
    """What was found in one place: documents, or a `Table` with its columns `names`."""

    found: Any
    names: list[str] | None
    origin: str
    paths: frozenset[Any] = frozenset()

    def rows(self, format: str, columns: Mapping[str, str] | None) -> Collection[Row]:
        chosen = self._columns(format, columns)
        return TableRows(self.found, chosen) if isinstance(self.found, Table) else self.found

    def stream(self, format: str, columns: Mapping[str, str] | None) -> StreamRows:
        return StreamRows(self.found, self._columns(format, columns))

    def _columns(self, format: str, columns: Mapping[str, str] | None) -> dict[str, str]:
        chosen = formats.choose_columns(format, self.names, columns, self.origin)
        for name in chosen.values():
            if isinstance(self.found, Table) and name in self.found.mixed:
                raise UserError(self.found.mixed[name])
        return chosen

    def named_labels(self, columns: Mapping[str, str] | None) -> list[str] | None:
        """The names of a hub data set's labels, in the order of their numbers."""
        feature = getattr(self.found, "features", {}).get((columns or {}).get("label") or "label")
        return list(feature.names) if hasattr(feature, "names") else None


def _files_part(patterns: Sequence[str], key: str, streaming: bool) -> _Part:
    paths = find(patterns, key)
    origin, kind = f"{key} ({', '.join(patterns)})", kind_of(paths, key)
    if kind == "text":
        if streaming:
            raise UserError(f"data.streaming: {origin} are text files, which are read whole; leave streaming out")
        return _Part(read_documents(paths), None, origin, paths=frozenset(paths))
    table = read_files(paths, kind, streaming=streaming)
    return _Part(table, table.names, origin, frozenset(paths))


def _hub_part(hub: Mapping[str, str | None], split: str, streaming: bool) -> _Part:
    path = str(hub["path"])
    table = read_hub(path, hub.get("name"), split, hub.get("revision"), streaming=streaming)
    return _Part(table, table.names, f"data.hub {path} ({split})")


def _split(
    part: _Part,
    held: _Part | None,
    format: str,
    columns: Mapping[str, str] | None,
    fraction: float,
    bad_rows: str,
    say: Callable[[str], object],
) -> Source:
    rows = part.rows(format, columns)
    found, held_found, hashed, bad = inspect(format, rows, None if held else fraction, say, named=part.names is None)
    bad.judge(bad_rows)
    train, hashes = _side(rows, found), [format, hashed]
    if held is None:
        validation = _side(rows, held_found)
    else:
        others = held.rows(format, columns)
        held_found, _, hashed, more = inspect(format, others, None, say, named=held.names is None)
        more.judge(bad_rows)
        bad += more
        validation = _side(others, held_found)
        hashes.append(hashed)
    _require_text(train, validation, part.origin, held, fraction)
    source = Source(format, train, validation, digest(hashes), bad=bad)
    if format != "classification":
        return source
    counts, named = found.labels, part.named_labels(columns)
    values = _label_values({*counts, *held_found.labels}, named, part.origin)
    numbers = {value: number for number, value in enumerate(values)}
    names = named or [str(int(value) if isinstance(value, float) else value) for value in values]
    return replace(source, labels=names, label_numbers=numbers, label_counts=[counts.get(v, 0) for v in values])


def _side(rows: Collection[Row], found: Found) -> Side:
    kept = rows.only(found.numbers) if isinstance(rows, TableRows) else [rows[n] for n in found.numbers]  # type: ignore[index]
    return Side(kept, found.bytes, found.empty)


def _streamed(
    part: _Part,
    held: _Part | None,
    format: str,
    columns: Mapping[str, str] | None,
    bad_rows: str,
    say: Callable[[str], object],
) -> Source:
    if held is None:
        raise UserError(
            f"data.streaming: {part.origin} cannot be split while it streams; name the held-out rows in "
            "data.validation_files or data.hub.validation_split"
        )
    if format == "classification":
        raise UserError("data.streaming: a classification needs all its labels before training; leave streaming out")
    others = list(held.stream(format, columns))
    found, _, hashed, bad = inspect(format, others, None, say)
    bad.judge(bad_rows)
    validation = _side(others, found)
    _require_text(None, validation, part.origin, held, 0.0)
    places = [f"{path} {path.stat().st_size}" for path in sorted(part.paths)] or [part.origin]
    key = digest([format, *places, hashed])
    return Source(format, Side(part.stream(format, columns)), validation, key, bad=bad)


def _require_text(train: Side | None, validation: Side, origin: str, held: _Part | None, fraction: float) -> None:
    if train is not None and not train.bytes:
        raise UserError(f"{origin}: there is no text to train on")
    if not validation.bytes:
        if held is not None:
            raise UserError(f"{held.origin}: there is no text to validate on")
        assert train is not None
        raise UserError(
            f"{origin}: none of its {len(train.rows)} document(s) is held out at validation_fraction "  # type: ignore[arg-type]
            f"{fraction:g}; give held-out ones, more documents, or raise the fraction"
        )


def _label_values(found: set[Any], named: list[str] | None, origin: str) -> list[Any]:
    """All labels in the order of their numbers; raises `UserError` when they are no classes."""
    if named is not None:
        unknown = sorted(label for label in found if not 0 <= label < len(named))
        if unknown:
            raise UserError(f"{origin}: the label {unknown[0]} is none of the data set's {len(named)} labels")
        return list(range(len(named)))
    if len({isinstance(label, str) for label in found}) > 1:
        raise UserError(f"{origin}: some labels are text and some are numbers; make them all the same")
    if len(found) < 2:
        raise UserError(f"{origin}: every row has the label {next(iter(found))!r}; a classification needs at least two")
    whole = all(not isinstance(label, str) or label.lstrip("-").isdigit() for label in found)
    return sorted(found, key=int if whole else None)
