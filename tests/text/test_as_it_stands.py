"""What a user wrote is what is read: no reader turns text into dates, numbers or nothing."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from text_rows import KINDS, UNIFORM, train_values, write

from sophia_integrations.errors import UserError
from sophia_integrations.text.source import Source, load_source


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
        assert train_values(source) == [{"text": text}] * 2 and source.validation.rows
    mixed = [{"text": text} for text in texts]
    assert train_values(load(mixed, kind, streaming=streaming)) == mixed


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_messages_of_one_look(kind: str, streaming: bool, load: Callable[..., Source]) -> None:
    for text in UNIFORM:
        rows = [{"messages": [{"role": role, "content": text} for role in ("user", "assistant")]}] * 2
        assert train_values(load(rows, kind, task="finetune", streaming=streaming)) == rows


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_labels_of_one_look(kind: str, load: Callable[..., Source]) -> None:
    rows = [{"prompt": "2024-01-01", "completion": text} for text in ("007", "008")]
    assert train_values(load(rows, kind, task="seq2seq")) == rows
    for labels in (["2024-01-01", "2024-01-02"], ["007", "08"], ["true", "false"], ["NA", "null"], ["1.0", "2.50"]):
        rows = [{"text": "2024-01-01", "label": label} for label in labels]
        source = load(rows, kind, task="classify")
        assert train_values(source) == rows and sorted(source.labels or []) == sorted(labels)


def test_a_late_date_in_a_long_file_stays_text(load: Callable[..., Source]) -> None:
    """The reader's second piece of a file holds dates only: they were rewritten as '2024-01-01 00:00:00'."""
    rows = [{"text": "words", "more": "a" * 1000}, *([{"text": "2024-01-01T00:00:00", "more": "a" * 1000}] * 11_000)]
    source = load(rows, "jsonl", held=rows[:1])
    assert {row["text"] for row in train_values(source)} == {"words", "2024-01-01T00:00:00"}


def test_numbers_are_no_text(load: Callable[..., Source]) -> None:
    """A number among texts is a mistake to name, and no text of the reader's making."""
    for value in (7, 1.5, True, None, [1]):
        with pytest.raises(UserError, match=r"1 of 2 rows is bad: .*row 2: the text is "):
            load([{"text": "a"}, {"text": value}], "jsonl")


def test_other_columns_may_be_anything(load: Callable[..., Source]) -> None:
    others = [None, 3, "a", [1, "b"], {"deep": None}, {"deep": [1]}, 1.5, True]
    rows = [{"text": "007", "more": other} for other in others] + [{"text": "008"}]
    for kind in ("jsonl", "json"):
        assert [row["text"] for row in train_values(load(rows, kind))] == ["007"] * len(others) + ["008"]


def test_messages_keep_their_own_keys(load: Callable[..., Source]) -> None:
    """A key of one message is none of another's: a chat template asks whether it is there."""
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": "2024-01-01"}, {"role": "assistant", "content": "b"}]}
    ]
    assert train_values(load(rows, "jsonl", task="finetune")) == rows


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("streaming", [False, True])
def test_marks_at_the_beginning_and_ends_of_lines(kind: str, streaming: bool, tmp_path: Path) -> None:
    for name in ("rows", "held"):
        path = Path(write(tmp_path / f"{name}.{kind}", [{"text": "a"}, {"text": "Zürich"}]))
        content = path.read_text(encoding="utf-8").replace("\r\n", "\n").replace("\n", "\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    files, held = [f"{tmp_path}/rows.{kind}"], [f"{tmp_path}/held.{kind}"]
    assert train_values(load_source(files=files, validation_files=held, streaming=streaming)) == [
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
        assert train_values(source) == [{"text": "007"}, {"text": "2024-01-01"}]


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
    assert train_values(mixed) == [{"text": "a"}] and mixed.bad.count == 1
    assert re.search(rf"1\.{kind}, row 1: the text is datetime\.datetime\(2024, .*, expected text", mixed.bad.first[0])
    assert train_values(load(["2024-01-01"], [None], ["b"], other="b")) == [{"text": "2024-01-01"}, {"text": "b"}]
    assert train_values(load(["2024-01-01"], ["b"], ["c"])) == [{"text": text} for text in ("2024-01-01", "b", "c")]


def test_words_of_a_dictionary_and_long_words(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    array = pa.array(["2024-01-01", "NA"])
    held = [write(tmp_path / "held.parquet", [{"text": "a"}])]
    for column in (array.dictionary_encode(), array.cast(pa.large_string()), array.cast(pa.string_view())):
        pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
        source = load_source(files=[f"{tmp_path}/rows.parquet"], validation_files=held)
        assert train_values(source) == [{"text": "2024-01-01"}, {"text": "NA"}]
