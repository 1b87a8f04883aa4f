"""A few rows of a recipe's own data, or of its format where the data is not on this machine."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import UserError
from ....text import formats
from ....text.bad_rows import HINT
from ....text.documents import read_documents, standard_library
from ....text.files import find, kind_of
from ....text.hub import read_hub
from ....text.raw import RawTable, read_files
from ....text.rows import Row, row_stream

_ROWS, _HELD = 160, 16
_DOCUMENT, _TEXT = 4_000, 120_000  # characters kept of a document, and of all
_SEARCHED = 20_000  # rows looked through for a second label


@dataclass(frozen=True)
class Sample:
    """Rows of both splits by the names of their parts; `note` says where they come from."""

    format: str
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    note: str

    def texts(self) -> Iterator[str]:
        """All text of the training rows."""
        for row in self.train:
            if self.format == "chat":
                yield from (message["content"] for message in row["messages"])
            else:
                yield from (row[part] for part in formats.PARTS[self.format] if part != "label")

    def write(self, folder: Path) -> dict[str, list[str]]:
        """Stores both splits in `folder` and returns the names of their files as ``data`` has them."""
        for name, rows in (("train", self.train), ("validation", self.validation)):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        return {"files": ["train.jsonl"], "validation_files": ["validation.jsonl"]}


def sample(data: Mapping[str, Any], task: str) -> Sample:
    """The first rows of `data`, a recipe's section, or made-up ones for a hub data set that is not here.

    Raises:
        UserError: files or columns are wrong, or a row is bad.
    """
    columns, format = data.get("columns"), data.get("format")
    hub = data.get("hub")
    try:
        rows, format, note = _rows(data, task, format, columns)
    except _NotHere as error:
        names = (columns or {}).keys()
        format = formats.choose_format(task, format, names, columns)
        made = made_up_rows(format, (row["text"] for row in row_stream([_library()], "text", None)), _ROWS)
        note = f"{hub['path']} {why(error)}; made-up rows of format {format} take its place"  # type: ignore[index]
        return Sample(format, made[_HELD:], made[:_HELD], note)
    skip = data.get("bad_rows") == "skip"
    taken = _take(rows, format, skip)
    if hub is not None and hub.get("validation_split") or data.get("validation_files"):
        held_data = {**data, "files": data.get("validation_files")}
        if hub is not None:
            held_data["hub"] = {**hub, "split": hub.get("validation_split")}
        held = _take(_rows(held_data, task, format, columns)[0], format, skip)[:_HELD]
    else:
        cut = min(_HELD, max(1, len(taken) // 5))
        held, taken = taken[:cut], taken[cut:]
    if not held or not taken:
        raise UserError(f"data: {note} has {len(taken) + len(held)} row(s) with text, too few to train and validate on")
    return Sample(format, taken, held, f"{len(taken)} rows of {note}")


class _NotHere(Exception):
    """A hub data set that cannot be read without the network."""


def _rows(
    data: Mapping[str, Any], task: str, format: str | None, columns: Mapping[str, str] | None
) -> tuple[Iterator[Row], str, str]:
    if data.get("hub") is not None:
        raws, note = _hub(data["hub"]), f"data.hub {data['hub']['path']}"
    elif data.get("files") is not None:
        paths = find(data["files"], "data.files")
        kind = kind_of(paths, "data.files")
        note = f"data.files ({paths[0].name}{', …' if len(paths) > 1 else ''})"
        raws = [read_documents(paths[:_ROWS], note) if kind == "text" else read_files(paths, kind, note)]
    else:
        raws, note = [_library()], "the standard library"
    chosen = formats.choose_format(task, format, raws[0].names, columns)
    return iter(row_stream(raws[:1], chosen, columns)), chosen, note


@functools.cache
def _library() -> RawTable:
    return standard_library()[0]


def why(error: BaseException) -> str:
    """Why something pretrained or of the hub cannot be had, in a few words."""
    text = str(error).strip().splitlines()[0]
    offline = any(sign in text for sign in ("couldn't connect", "Couldn't reach", "OfflineMode", "offline mode"))
    return "is not on this machine" if offline else f"cannot be loaded ({text})"


def _hub(hub: Mapping[str, Any]) -> list[RawTable]:
    """Streamed, so that nothing is fetched whole; a copy on this machine can only be read as it is."""
    split = hub.get("split") or "train"
    try:
        return read_hub(hub, split, streaming=True)
    except UserError:
        try:
            return read_hub(hub, split)
        except UserError as error:
            raise _NotHere(str(error)) from None


def _take(rows: Iterator[Row], format: str, skip: bool) -> list[dict[str, Any]]:
    """The first good rows with text; of a classification more, until there is a second label."""
    taken: list[dict[str, Any]] = []
    size = 0
    for row in itertools.islice(rows, _SEARCHED):
        if row["problem"] is not None and skip:
            continue
        if row["problem"] is not None:
            raise UserError(f"{row['problem']}; {HINT}")
        values = {part: json.loads(row[part]) if part in formats.JSON else row[part] for part in formats.PARTS[format]}
        if format == "text":
            values["text"] = values["text"][:_DOCUMENT]
            if not values["text"].strip():
                continue
        if len(taken) < _ROWS or format == "classification" and values["label"] != taken[0]["label"]:
            taken.append(values)
            size += len(values.get("text", ""))
        enough = len(taken) >= _ROWS or format == "text" and size > _TEXT
        if enough and not _one_label(taken, format):
            break
    if format != "classification" or _one_label(taken, format):
        return taken
    labels = sorted({row["label"] for row in taken}, key=str)
    mixed = itertools.zip_longest(*([row for row in taken if row["label"] == label] for label in labels))
    return [row for rows in mixed for row in rows if row is not None]


def _one_label(rows: list[dict[str, Any]], format: str) -> bool:
    return format == "classification" and len({row["label"] for row in rows}) < 2


def made_up_rows(format: str, texts: Iterator[str], count: int) -> list[dict[str, Any]]:
    """Rows of a format from pieces of any texts: they show that a recipe runs, not that it learns."""
    rows: list[dict[str, Any]] = []
    for text in texts:
        lines = [line for line in text.splitlines() if line.strip()]
        for start in range(0, len(lines) - 3, 4):
            ask, answer = "\n".join(lines[start : start + 2]), "\n".join(lines[start + 2 : start + 4])
            rows.append(_made_up(format, ask, answer, len(rows)))
            if len(rows) == count:
                return rows
    return rows


def _made_up(format: str, ask: str, answer: str, number: int) -> dict[str, Any]:
    if format == "chat":
        return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
    if format == "prompt-completion":
        return {"prompt": ask, "completion": answer}
    if format == "classification":
        return {"text": f"{ask}\n{answer}", "label": ("even", "odd")[number % 2]}
    return {"text": f"{ask}\n{answer}"}
