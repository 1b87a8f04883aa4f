"""Bad rows: counted, the first named, refused or left out; a good row is never lost with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from text_rows import values

from sophia_integrations.errors import UserError
from sophia_integrations.text.prepare import Prepared, prepare
from sophia_integrations.text.source import load_source

STRICT = (
    "{% for message in messages %}{% if message.content == 'nine' %}{{ raise_exception('no nine') }}{% endif %}"
    "<{{ message.role }}> {{ message.content }} <end> {% endfor %}"
)
GOOD = [{"text": text} for text in ("one", "two", "three", "four", "five", "six")]
BAD = [{"text": None}, {"other": 1}, {"text": 3}, {"text": ["one"]}, {"text": "\ud83d"}]
HINT = "data.bad_rows: skip leaves such rows out"


def chat(*contents: str) -> dict[str, Any]:
    roles = itertools.cycle(["user", "assistant"])
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]}


@pytest.fixture
def held(jsonl: Callable[..., str]) -> list[str]:
    return [jsonl(GOOD, "held.jsonl")]


@pytest.fixture
def file(jsonl: Callable[..., str]) -> str:
    """Good rows, bad ones among them, and a line that is no JSON at the end."""
    path = jsonl([GOOD[0], *BAD, *GOOD[1:]])
    with open(path, "a") as target:
        target.write('{"text": "cut o')
    return path


def test_the_error_counts_all_and_names_the_first(file: str, held: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_source(files=[file], validation_files=held)
    first = [f"{file}, row {row}: the text is {what}, expected text" for row, what in
             ((2, "missing"), (3, "missing"), (4, "3"))]  # fmt: skip
    assert str(error.value) == f"6 of 12 rows are bad: {'; '.join(first)}; …; {HINT}"


def test_they_are_left_out_and_counted(file: str, held: list[str], words: Any) -> None:
    source = load_source(files=[file], validation_files=held, bad_rows="skip")
    assert values(source.train.rows) == GOOD
    clean = load_source(files=held, validation_fraction=0.5, bad_rows="skip")
    assert (source.bad.count, source.bad.total, clean.bad.count) == (6, 18, 0)
    data = prepare(source, words, block_size=4)
    assert data.skipped_rows == 6 and '"skipped_rows": 6' in data.to_json()
    line = data.describe().splitlines()[-1]
    assert line.startswith(f"bad rows: 6 of 18 skipped: {file}, row 2: the text is missing, expected text; ")
    assert "bad rows: 0 of 6 skipped" in prepare(clean, words, block_size=2).describe()


def test_the_rows_that_are_left_are_those_of_a_clean_file(file: str, held: list[str]) -> None:
    bad = load_source(files=[file], validation_fraction=0.4, bad_rows="skip")
    clean = load_source(files=held, validation_fraction=0.4)
    for split in ("train", "validation"):
        assert values(getattr(bad, split).rows) == values(getattr(clean, split).rows)
    assert bad.digest == clean.digest


@pytest.mark.parametrize("action", ["error", "skip"])
def test_nothing_but_bad_rows_is_an_error(action: str, jsonl: Callable[..., str], held: list[str]) -> None:
    file = jsonl(BAD[:2])
    message = r"^2 of 2 rows are bad: .*rows\.jsonl, row 1: .*; .*row 2: [^;]*$"
    for files, validation in (([file], held), (held, [file])):
        for streaming in (False, True):
            if streaming and files == [file]:
                continue
            with pytest.raises(UserError, match=message):
                load_source(files=files, validation_files=validation, bad_rows=action, streaming=streaming)


def test_a_file_without_any_row_is_an_error(held: list[str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("nothing\n[1]\n")
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"rows\.jsonl, row 1: the line is not JSON: "):
            load_source(files=[f"{tmp_path}/rows.jsonl"], validation_files=held, bad_rows="skip", streaming=streaming)


def test_documents_that_are_no_text(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    (tmp_path / "picture.txt").write_bytes(b"\xff")
    options: dict[str, Any] = {"files": [f"{tmp_path}/*.txt"], "validation_fraction": 0.3}
    with pytest.raises(UserError, match=rf"^1 of 21 rows is bad: .*/picture\.txt: not UTF-8 text .*; {HINT}$"):
        load_source(**options)
    source = load_source(**options, bad_rows="skip")
    assert len(source.train.rows) + len(source.validation.rows) == 20 and source.bad.count == 1  # type: ignore[arg-type]


def test_the_table_remembers_them(file: str, held: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sophia_integrations.text import formats

    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "cache"))
    found = [load_source(files=[file], validation_files=held, bad_rows="skip").bad]
    monkeypatch.setattr(formats, "problem", lambda *row: None)
    found.append(load_source(files=[file], validation_files=held, bad_rows="skip").bad)
    assert found[0] == found[1] and found[1].count == 6
    with pytest.raises(UserError, match=r"^6 of 12 rows are bad: .*, row 2: "):
        load_source(files=[file], validation_files=held)


@pytest.fixture
def chats(jsonl: Callable[..., str], words: Any) -> Callable[..., Prepared]:
    """Conversations of which the chat template takes some only."""
    words.chat_template = STRICT
    rows = [chat("one", "two"), chat("nine", "two"), chat("three", "four"), chat("one", "nine"), chat("five", "six")]

    def make(rows: list[dict[str, Any]] = rows, held: list[dict[str, Any]] = rows[:1], **options: Any) -> Prepared:
        files = {"files": [jsonl(rows, "chats.jsonl")], "validation_files": [jsonl(held, "held.jsonl")]}
        source = load_source(**files, task="finetune", **options)
        return prepare(source, words, block_size=16, task="finetune", say=lambda line: None)

    return make


def test_conversations_that_the_template_refuses(chats: Callable[..., Prepared]) -> None:
    message = r"^2 of 5 rows are bad: .*chats\.jsonl, row 2: the tokenizer's chat template refuses .*no nine; .*row 4: "
    for _ in range(2):  # made, and from the cache
        with pytest.raises(UserError, match=message):
            chats()
        data = chats(bad_rows="skip")
        assert len(data.train) == 3 and data.counts["train"].documents == 3  # type: ignore[arg-type]
        assert data.skipped_rows == 2 and "bad rows: 2 of 6 skipped: " in data.describe()
    with pytest.raises(UserError, match=r"^2 of 2 rows are bad: "):
        chats([chat("nine", "two"), chat("one", "nine")], bad_rows="skip")


def test_a_stream_refuses_the_first(file: str, held: list[str], words: Any) -> None:
    source = load_source(files=[file], validation_files=held, streaming=True)
    data = prepare(source, words, block_size=2, say=lambda line: None)
    with pytest.raises(UserError, match=rf"^{file}, row \d+: .*; {HINT}$"):
        list(itertools.islice(data.train, 20))
    assert data.skipped_rows is None


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_counts_as_it_goes(workers: int, file: str, held: list[str], words: Any, jsonl: Any) -> None:
    files = [file, jsonl([*GOOD, *BAD, *BAD], "more.jsonl")]
    source = load_source(files=files, validation_files=held, streaming=True, bad_rows="skip")
    data = prepare(source, words, block_size=2, say=lambda line: None)
    assert data.skipped_rows == 0
    assert data.describe().splitlines()[-1] == "bad rows: 0 of 6 of validation skipped"
    loader = torch.utils.data.DataLoader(data.train, batch_size=None, num_workers=workers)
    items = [item["input_ids"].tolist() for item in itertools.islice(iter(loader), 12)]
    known = {word: number for number, word in enumerate(words.convert_ids_to_tokens(range(len(words))))}
    assert {item[0] for item in items} == {known[row["text"]] for row in GOOD}
    assert data.skipped_rows and data.skipped_rows >= 16


def test_a_stream_of_conversations(chats: Callable[..., Prepared]) -> None:
    data = chats(streaming=True, bad_rows="skip")
    assert len(list(itertools.islice(data.train, 4))) == 4 and data.skipped_rows and data.skipped_rows >= 2
    with pytest.raises(UserError, match=r"chats\.jsonl, row (2|4): the tokenizer's chat template refuses"):
        list(itertools.islice(chats(streaming=True).train, 3))


def test_a_stream_of_bad_rows_ends(chats: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    from sophia_integrations.text import stream

    monkeypatch.setattr(stream, "_PATIENCE", 100)
    good = [chat("one", "two")]
    with pytest.raises(UserError, match=r"the stream has no text; all of its rows are bad \(.*row 1: no message is"):
        next(iter(chats([chat("one")], good, streaming=True, bad_rows="skip").train))
    with pytest.raises(UserError, match="rows one after another carry no loss within 16 tokens, or are bad"):
        next(iter(chats([chat("nine", "two")], good, streaming=True, bad_rows="skip").train))
