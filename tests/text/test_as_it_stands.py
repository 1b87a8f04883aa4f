"""What a user wrote is what is read: no reader turns text into dates, numbers or nothing."""

from __future__ import annotations

import datetime
import gzip
import json
import re
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import text_rows

from sophia_integrations.errors import UserError
from sophia_integrations.text.source import Source, load_source

LOOK_ALIKES = [
    "2024-01-01T00:00:00", "2024-01-01", "2024-01-01T00:00:00Z", "2024-01-01 00:00:00.123456", "12:30:00", "P1DT2H",
    "007", "1.50", "-0", "+1", "1e400", "0x10", "1_000", "12345678901234567890", "3/4",
    "true", "False", "null", "None", "NA", "N/A", "NaN", "nan", "", " ", "  both ends  ", "\ta", "#", "'", "\\n",
    "a\nb", "Zürich 👍", "\u2028", "\u0085", "\x0b", "\x00", "[1, 2]", '{"a": 1}', '"',
]  # fmt: skip
KINDS = ["jsonl", "json", "csv", "parquet", "arrow"]
UNIFORM = [text for text in LOOK_ALIKES if text.strip()]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = path.suffix[1:]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as target:
            target.write_table(table)
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            target = csv.DictWriter(file, rows[0], quoting=csv.QUOTE_ALL)
            target.writeheader()
            target.writerows(rows)
    elif kind == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def values(source: Source) -> list[dict[str, Any]]:
    return text_rows.values(source.train.rows)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Source]:
    """Reads rows as the training rows of a file of some kind, with a validation file of the same kind."""

    def load(rows: list[dict[str, Any]], kind: str, held: list[dict[str, Any]] | None = None, **options: Any) -> Source:
        files = [write(tmp_path / f"rows.{kind}", rows)]
        validation = [write(tmp_path / f"held.{kind}", held or rows)]
        return load_source(files=files, validation_files=validation, **options)

    return load


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_one_look(kind: str, streaming: bool, load: Callable[..., Source]) -> None:
    """Every row looks alike, so that a reader could take the whole column for something else."""
    texts = [text for text in UNIFORM if not (kind == "csv" and "\0" in text)]  # csv itself has no NUL
    for text in texts:
        source = load([{"text": text, "more": 1}] * 2, kind, streaming=streaming)
        assert values(source) == [{"text": text}] * 2 and source.validation.rows
    mixed = [{"text": text} for text in texts]
    assert values(load(mixed, kind, streaming=streaming)) == mixed


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_messages_of_one_look(kind: str, streaming: bool, load: Callable[..., Source]) -> None:
    for text in UNIFORM:
        rows = [{"messages": [{"role": role, "content": text} for role in ("user", "assistant")]}] * 2
        assert values(load(rows, kind, task="finetune", streaming=streaming)) == rows


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_labels_of_one_look(kind: str, load: Callable[..., Source]) -> None:
    rows = [{"prompt": "2024-01-01", "completion": text} for text in ("007", "008")]
    assert values(load(rows, kind, task="seq2seq")) == rows
    for labels in (["2024-01-01", "2024-01-02"], ["007", "08"], ["true", "false"], ["NA", "null"], ["1.0", "2.50"]):
        rows = [{"text": "2024-01-01", "label": label} for label in labels]
        source = load(rows, kind, task="classify")
        assert values(source) == rows and sorted(source.labels or []) == sorted(labels)


def test_a_late_date_in_a_long_file_stays_text(load: Callable[..., Source]) -> None:
    """The reader's second piece of a file holds dates only: they were rewritten as '2024-01-01 00:00:00'."""
    rows = [{"text": "words", "more": "a" * 1000}, *([{"text": "2024-01-01T00:00:00", "more": "a" * 1000}] * 11_000)]
    source = load(rows, "jsonl", held=rows[:1])
    assert {row["text"] for row in values(source)} == {"words", "2024-01-01T00:00:00"}


def test_numbers_are_no_text(load: Callable[..., Source]) -> None:
    """A number among texts is a mistake to name, and no text of the reader's making."""
    for value in (7, 1.5, True, None, [1]):
        with pytest.raises(UserError, match=r"1 of 2 rows is bad: .*row 2: the text is "):
            load([{"text": "a"}, {"text": value}], "jsonl")


def test_other_columns_may_be_anything(load: Callable[..., Source]) -> None:
    others = [None, 3, "a", [1, "b"], {"deep": None}, {"deep": [1]}, 1.5, True]
    rows = [{"text": "007", "more": other} for other in others] + [{"text": "008"}]
    for kind in ("jsonl", "json"):
        assert [row["text"] for row in values(load(rows, kind))] == ["007"] * len(others) + ["008"]


def test_messages_keep_their_own_keys(load: Callable[..., Source]) -> None:
    """A key of one message is none of another's: a chat template asks whether it is there."""
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": "2024-01-01"}, {"role": "assistant", "content": "b"}]}
    ]
    assert values(load(rows, "jsonl", task="finetune")) == rows


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("streaming", [False, True])
def test_marks_at_the_beginning_and_ends_of_lines(kind: str, streaming: bool, tmp_path: Path) -> None:
    for name in ("rows", "held"):
        path = Path(write(tmp_path / f"{name}.{kind}", [{"text": "a"}, {"text": "Zürich"}]))
        content = path.read_text(encoding="utf-8").replace("\r\n", "\n").replace("\n", "\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    files, held = [f"{tmp_path}/rows.{kind}"], [f"{tmp_path}/held.{kind}"]
    assert values(load_source(files=files, validation_files=held, streaming=streaming)) == [
        {"text": "a"}, {"text": "Zürich"},
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_bytes_of_another_encoding_are_refused(kind: str, tmp_path: Path) -> None:
    text = {"csv": "text\nZürich\n", "json": '[{"text": "Zürich"}]', "txt": "Zürich"}.get(
        kind, '\n{"text": "Zürich"}\n'
    )
    (tmp_path / f"rows.{kind}").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"rows\.{kind}.*(not UTF-8|utf-8' codec can't decode)") as error:
        load_source(files=[f"{tmp_path}/rows.{kind}"])
    assert "\n" not in str(error.value)


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('\n{"text": "a"}\n  \n{"text": "b"}\n{"text": 3}\n\n')
    held = [write(tmp_path / "held.jsonl", [{"text": "c"}])]
    for streaming in (False, True):
        options: dict[str, Any] = {"validation_files": held, "streaming": streaming, "bad_rows": "skip"}
        source = load_source(files=[f"{tmp_path}/rows.jsonl"], **options)
        rows = [row for row in source.train.rows if row["problem"] is None]
        assert [row["place"].rpartition(", ")[2] for row in rows] == ["row 1", "row 2"]


@pytest.mark.parametrize(
    "document",
    [
        '[{"text": "007"}, {"text": "2024-01-01"}]',
        '{"text": "007"}\n{"text": "2024-01-01"}\n',
        '{"text": "007", "date": 1}\n\n{"text": "2024-01-01"}',
        '\n[\n {"text": "007"},\n {"text": "2024-01-01"}\n]',
    ],
)
def test_the_ways_to_write_a_json_file(document: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(document)
    held = [write(tmp_path / "held.json", [{"text": "a"}])]
    for streaming in (False, True):
        source = load_source(files=[f"{tmp_path}/rows.json"], validation_files=held, streaming=streaming)
        assert values(source) == [{"text": "007"}, {"text": "2024-01-01"}]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{\n "text": "007",\n "label": 3}', r"row 1: the line is not JSON: "),
        ("7", r'row 1: a row is an object, such as \{"text": "…"\}'),
        ('["007", "2024-01-01"]', r'row 1: a row is an object, such as \{"text": "…"\}'),
        ('[{"text": "007"}', r"cannot be read as json: "),
    ],
)
def test_other_json_files_are_refused(document: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(document)
    with pytest.raises(UserError, match=rf"rows\.json(, |: ){message}"):
        load_source(files=[f"{tmp_path}/rows.json"])


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("streaming", [False, True])
def test_types_of_a_table_are_its_own(kind: str, streaming: bool, load: Callable[..., Source], tmp_path: Path) -> None:
    for value in (datetime.datetime(2024, 1, 1), Decimal("1.50"), datetime.timedelta(1), b"a"):
        with pytest.raises(UserError, match=r"2 of 2 rows are bad: .*held.*, row 1: the text is .*, expected text"):
            load([{"text": "a"}], kind, held=[{"text": value}] * 2, streaming=streaming)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_of_several_types(kind: str, tmp_path: Path) -> None:
    def load(*columns: list[Any], other: Any = 1) -> Source:
        for number, column in enumerate(columns):
            rows = [{"text": value, "more": "2" if number else other} for value in column]
            write(tmp_path / f"rows {number}.{kind}", rows)
        held = [write(tmp_path / f"held.{kind}", [{"text": "a", "more": "a"}])]
        return load_source(files=[f"{tmp_path}/rows *.{kind}"], validation_files=held, bad_rows="skip")

    time = datetime.datetime(2024, 1, 1)
    mixed = load(["a"], [time])
    assert values(mixed) == [{"text": "a"}] and mixed.bad.count == 1
    assert re.search(rf"1\.{kind}, row 1: the text is datetime\.datetime\(2024, .*, expected text", mixed.bad.first[0])
    assert values(load(["2024-01-01"], [None], ["b"], other="b")) == [{"text": "2024-01-01"}, {"text": "b"}]
    assert values(load(["2024-01-01"], ["b"], ["c"])) == [{"text": text} for text in ("2024-01-01", "b", "c")]


def test_words_of_a_dictionary_and_long_words(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    array = pa.array(["2024-01-01", "NA"])
    held = [write(tmp_path / "held.parquet", [{"text": "a"}])]
    for column in (array.dictionary_encode(), array.cast(pa.large_string()), array.cast(pa.string_view())):
        pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
        source = load_source(files=[f"{tmp_path}/rows.parquet"], validation_files=held)
        assert values(source) == [{"text": "2024-01-01"}, {"text": "NA"}]


DECLARED = """\
---
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': bad, '1': good}}}}
---
"""


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a data set's repository with one file for each split."""

    def make(kind: str, rows: list[dict[str, Any]], readme: str = "") -> Path:
        place = tmp_path / f"{kind} data"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for name in ("train", "test"):
            write(place / f"{name}.{kind}", rows)
        if readme:
            (place / "README.md").write_text(readme)
        return place

    return make


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_the_hub(kind: str, streaming: bool, folder: Callable[..., Path]) -> None:
    texts = [text for text in UNIFORM if not (kind == "csv" and "\0" in text)]
    for text in ("2024-01-01", "007", "true", "NA", "1.50"):
        hub = {"path": str(folder(kind, [{"text": text, "more": 1}] * 3)), "validation_split": "test"}
        assert values(load_source(hub=hub, streaming=streaming)) == [{"text": text}] * 3
    rows = [{"text": text} for text in texts]
    hub = {"path": str(folder(kind, rows)), "split": "train[:5]", "validation_split": "test[:2]"}
    source = load_source(hub=hub, streaming=streaming)
    assert values(source) == rows[:5] and len(source.validation.rows) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folder_of_compressed_files(kind: str, streaming: bool, folder: Callable[..., Path]) -> None:
    rows = [{"text": text} for text in ("007", "2024-01-01", "NA")]
    place = folder(kind, rows)
    for path in list(place.iterdir()):
        (place / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert values(load_source(hub={"path": str(place), "validation_split": "test"}, streaming=streaming)) == rows


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_folder_that_declares_its_columns(kind: str, folder: Callable[..., Path]) -> None:
    rows = [{"text": "2024-01-01", "label": label} for label in ("bad", "good", "1")]
    hub = {"path": str(folder(kind, rows, DECLARED)), "validation_split": "test"}
    source = load_source(hub=hub, task="classify")
    assert source.labels == ["bad", "good"] and source.label_counts == [1, 2]
    assert values(source) == [{"text": "2024-01-01", "label": number} for number in (0, 1, 1)]


def test_a_folder_names_its_files_and_fields(folder: Callable[..., Path]) -> None:
    place = folder("json", [])
    for name in ("train", "test"):
        (place / f"{name}.json").write_text('{"version": 1, "data": [{"text": "2024-01-01"}, {"text": "NA"}]}')
    configs = "---\nconfigs:\n- {config_name: default, field: data}\n---\n"
    (place / "README.md").write_text(configs)
    hub = {"path": str(place), "validation_split": "test"}
    for streaming in (False, True):
        assert values(load_source(hub=hub, streaming=streaming)) == [{"text": "2024-01-01"}, {"text": "NA"}]
    with pytest.raises(UserError, match=r"split 'dev' cannot be loaded: Unknown split \"dev\""):
        load_source(hub={**hub, "split": "dev"})
    (place / "README.md").write_text(configs.replace("field: data", "field: rows"))
    with pytest.raises(UserError, match=r"train\.json: cannot be read as json: there is no list of rows under 'rows'$"):
        load_source(hub=hub)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_the_hub_are_kept_for_use_offline(
    kind: str, folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout that the hub's own client writes, read back by it."""
    from huggingface_hub import constants

    cache = tmp_path / "hub cache"
    snapshot = cache / "datasets--someone--rows" / "snapshots" / "0123456789012345678901234567890123456789"
    shutil.copytree(folder(kind, [{"text": "2024-01-01", "more": "007"}] * 2), snapshot)
    (cache / "datasets--someone--rows" / "refs").mkdir()
    (cache / "datasets--someone--rows" / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    source = load_source(hub={"path": "someone/rows", "validation_split": "test"})
    assert values(source) == [{"text": "2024-01-01"}] * 2
    numbered = load_source(hub={"path": "someone/rows", "validation_split": "test"}, columns={"text": "more"})
    assert values(numbered) == [{"text": "007"}] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_text_files_has_a_row_a_line(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data sets")
    place = tmp_path / "lines"
    place.mkdir()
    for name in ("train", "test"):
        (place / f"{name}.txt").write_text("007\n2024-01-01\nNA\n")
    hub = {"path": str(place), "split": "train[:2]", "validation_split": "test"}
    source = load_source(hub=hub, streaming=streaming)
    assert values(source) == [{"text": "007"}, {"text": "2024-01-01"}]
    assert list(source.train.rows)[1]["place"] == f"data.hub {place} (train[:2]), row 2"


def test_splits_may_be_joined(folder: Callable[..., Path]) -> None:
    rows = [{"text": f"{number}"} for number in range(10)]
    hub = {"path": str(folder("csv", rows)), "split": "test[80%:] + train[:3]", "validation_split": "test[:1]"}
    assert values(load_source(hub=hub)) == [*rows[8:], *rows[:3]]
    with pytest.raises(UserError, match="a streamed split is cut as NAME"):
        load_source(hub=hub, streaming=True)
