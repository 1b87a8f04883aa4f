"""Documents of plain text: found, read, split by their names, deterministic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sophia_integrations.errors import UserError
from sophia_integrations.text.files import absolute_globs, kind_of, matches
from sophia_integrations.text.source import Source, load_source


def places(source: Source, split: str) -> list[str]:
    return [row["place"] for row in getattr(source, split).rows]


def texts(source: Source) -> set[str]:
    return {row["text"] for split in (source.train, source.validation) for row in split.rows}


def test_the_standard_library_is_split_by_file() -> None:
    source, again = (load_source(source="python-stdlib") for _ in range(2))
    train, validation = places(source, "train"), places(source, "validation")
    assert source.digest == again.digest and source.format == "text"
    assert not set(train) & set(validation)
    assert train == sorted(train) and "json/decoder.py" in train and "copyreg.py" in validation
    assert 0.02 < len(validation) / len(train + validation) < 0.08
    assert source.train.bytes > 5e6
    unwanted = "test tests idle_test site-packages dist-packages __pycache__ encodings pydoc_data".split()
    assert not any(set(unwanted) & set(name.split("/")) for name in train + validation)
    assert not any("_sysconfigdata" in name for name in train + validation)


def test_a_document_keeps_its_side_when_others_come_or_go(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"{number}.txt").write_text("x")
    few = load_source(files=[f"{tmp_path}/1*.txt"], validation_fraction=0.1)
    many = load_source(files=[f"{tmp_path}/*.txt"], validation_fraction=0.1)
    assert set(places(few, "validation")) < set(places(many, "validation"))
    assert 10 < len(many.validation.rows) < 30


def test_line_ends_do_not_change_the_text(tmp_path: Path) -> None:
    for number, end in enumerate((b"\n", b"\r\n", b"\r")):
        (tmp_path / f"{number}.txt").write_bytes(b"a" + end + b"b" + end)
    held: dict[str, Any] = {"validation_files": [f"{tmp_path}/0.txt"]}
    with pytest.raises(UserError, match=r"data\.validation_files: .*0\.txt is also in data\.files"):
        load_source(files=[f"{tmp_path}/*.txt"], **held)
    assert texts(load_source(files=[f"{tmp_path}/[12].txt"], **held)) == {"a\nb\n"}


def test_one_file_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("text")
    with pytest.raises(UserError, match="none of its 1 document.* give held-out ones, more documents, or raise the"):
        load_source(files=[f"{tmp_path}/all.txt"])


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match=r"^1 of 1 rows is bad: .*picture\.txt: not UTF-8 text \(byte 0\), convert it$"):
        load_source(files=[f"{tmp_path}/*.txt"])


def test_files_of_several_kinds_are_refused(tmp_path: Path) -> None:
    for name in ("a.md", "b.py", "c.txt", "d.jsonl", "e.JSON"):
        (tmp_path / name).write_text("x")
    assert kind_of([tmp_path / "a.md", tmp_path / "b.py", tmp_path / "c.txt"], "data.files") == "text"
    with pytest.raises(UserError) as error:
        load_source(files=[f"{tmp_path}/*"])
    assert str(error.value) == "data.files: the files are json (d.jsonl) and text (a.md); give files of one kind"


def test_globs_become_absolute_from_a_folder_with_odd_letters(tmp_path: Path) -> None:
    folder = tmp_path / "a [b] c"
    folder.mkdir()
    (folder / "x.txt").write_text("x")
    (pattern,) = absolute_globs(["*.txt"], folder)
    assert matches(pattern) == [folder / "x.txt"]
    with pytest.raises(UserError, match=r"^data\.files: no file matches nothing\.txt$"):
        load_source(files=["nothing.txt"])


def test_text_has_no_other_parts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"data\.columns\.messages: .* has no column 'messages'; its columns are text$"):
        load_source(files=[f"{tmp_path}/a.txt"], format="chat")
    with pytest.raises(UserError, match=r"^data\.streaming: .* are text files, which are read whole"):
        load_source(files=[f"{tmp_path}/a.txt"], streaming=True)
