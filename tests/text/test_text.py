"""Documents, their split, the tokenizer and the blocks: deterministic, disjoint, counted, cached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sophia_integrations.errors import UserError
from sophia_integrations.text.blocks import Blocks, build_blocks
from sophia_integrations.text.documents import Document, absolute_globs, held_out, load_corpus, split
from sophia_integrations.text.tokenizer import END_OF_TEXT, train_tokenizer


def files(corpus: Path, **settings: object) -> dict[str, object]:
    return {"files": [f"{corpus}/*.txt"], "validation_fraction": 0.3, **settings}


def test_the_standard_library_is_split_by_file() -> None:
    data = dict(source="python-stdlib")
    corpus, again = load_corpus(**data), load_corpus(**data)
    train, validation = ([document.name for document in part] for part in (corpus.train, corpus.validation))
    assert corpus.digest() == again.digest()
    assert not set(train) & set(validation)
    assert train == sorted(train) and "json/decoder.py" in train
    assert 0.02 < len(validation) / len(train + validation) < 0.08
    assert sum(len(document.text) for document in corpus.train) > 5e6
    unwanted = {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "encodings",
        "pydoc_data",
    }
    assert not any(unwanted & set(name.split("/")) for name in train + validation)
    assert not any("_sysconfigdata" in name for name in train + validation)


def test_a_document_keeps_its_side_when_others_come_or_go() -> None:
    documents = [Document(f"{number}.py", "x") for number in range(1000)]
    few, many = split(documents[:100], 0.1), split(documents, 0.1)
    assert {d.name for d in few.validation} <= {d.name for d in many.validation}
    assert 60 < len(many.validation) < 140
    assert [held_out(name, 0.05) for name in ("copyreg.py", "json/decoder.py")] == [True, False]


def test_line_ends_do_not_change_the_text(tmp_path: Path) -> None:
    for number, end in enumerate((b"\n", b"\r\n", b"\r")):
        (tmp_path / f"{number}.txt").write_bytes(b"a" + end + b"b" + end)
    data = dict(files=[str(tmp_path / "*.txt")], validation_files=[str(tmp_path / "0.txt")])
    with pytest.raises(UserError, match=r"data\.validation_files: .*0\.txt is also in data\.files"):
        load_corpus(**data)
    data = dict(files=[str(tmp_path / "[12].txt")], validation_files=[str(tmp_path / "0.txt")])
    corpus = load_corpus(**data)
    assert {document.text for document in corpus.train + corpus.validation} == {"a\nb\n"}


def test_one_file_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("text")
    with pytest.raises(UserError, match="name some in data.validation_files, give more files, or raise the fraction"):
        load_corpus(**dict(files=[str(tmp_path / "all.txt")]))


def test_bytes_that_are_no_text_are_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match=r"picture\.txt: not UTF-8 text \(byte 0\); convert it or leave it out"):
        load_corpus(**files(corpus, files=[str(tmp_path / "*.txt")]))


def test_globs_become_absolute_from_a_folder_with_odd_letters(tmp_path: Path) -> None:
    folder = tmp_path / "a [b] c"
    folder.mkdir()
    (folder / "x.txt").write_text("x")
    (pattern,) = absolute_globs(["*.txt"], folder)
    from sophia_integrations.text.documents import matches

    assert matches(pattern) == [folder / "x.txt"]


def test_the_tokenizer_learns_from_training_documents_only() -> None:
    train = [Document("a", "aaaa bbbb " * 50)]
    tokenizer = train_tokenizer(train, 300, 2, lambda line: None)
    assert len(tokenizer) <= 300 and tokenizer.eos_token == END_OF_TEXT
    text = "def f(x):\n\treturn 'é €'\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("bbbb").input_ids) < 4 and len(tokenizer("zzzz").input_ids) == 4


def test_blocks_hold_every_token_in_order_and_count_the_tail(corpus: Path) -> None:
    said: list[str] = []
    loaded = load_corpus(**files(corpus))
    tokenizer = train_tokenizer(loaded.train, 300, 2, said.append)
    splits = build_blocks(loaded, tokenizer, 32, said.append)
    expected: list[int] = []
    for document in loaded.train:
        expected += [*tokenizer(document.text).input_ids, tokenizer.eos_token_id]
    count = splits.counts["train"]
    assert (count.documents, count.tokens) == (len(loaded.train), len(expected))
    assert count.tokens == count.blocks * 32 + count.dropped_tokens and 0 <= count.dropped_tokens < 32
    assert count.bytes == sum(len(document.text.encode()) for document in loaded.train)
    rows = torch.cat([splits.train[index]["input_ids"] for index in range(len(splits.train))])
    assert rows.tolist() == expected[: len(rows)]
    assert torch.equal(splits.train[0]["labels"], splits.train[0]["input_ids"])


def test_blocks_drop_nothing_when_the_stream_fits() -> None:
    blocks = Blocks(np.arange(12, dtype=np.uint16), 4)
    assert len(blocks) == 3 and blocks.dropped_tokens == 0


def test_text_shorter_than_a_block_is_refused(corpus: Path) -> None:
    loaded = load_corpus(**files(corpus))
    tokenizer = train_tokenizer(loaded.train, 300, 2, lambda line: None)
    with pytest.raises(UserError, match="less than one block of 100000; give more text or a smaller data.block_size"):
        build_blocks(loaded, tokenizer, 100_000, lambda line: None)


def test_a_second_time_comes_from_the_cache(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "cache"))
    loaded, said = load_corpus(**files(corpus)), list[str]()
    first = build_blocks(loaded, train_tokenizer(loaded.train, 300, 2, said.append), 32, said.append)
    assert len(said) == 3
    said.clear()
    second = build_blocks(loaded, train_tokenizer(loaded.train, 300, 2, said.append), 16, said.append)
    assert said == []
    assert second.digest == first.digest and second.counts["train"].tokens == first.counts["train"].tokens
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_a_damaged_or_unwritable_cache_costs_time_only(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "cache"))
    loaded, said = load_corpus(**files(corpus)), list[str]()
    tokenizer = train_tokenizer(loaded.train, 300, 2, said.append)
    first = build_blocks(loaded, tokenizer, 32, said.append)
    for path in (tmp_path / "cache").glob("*.npy"):
        path.unlink()
        path.write_bytes(b"torn")
    said.clear()
    assert build_blocks(loaded, tokenizer, 32, said.append).counts == first.counts
    assert sum("is damaged; making it again" in line for line in said) == 2

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "file" / "cache"))
    said.clear()
    assert build_blocks(loaded, tokenizer, 32, said.append).counts == first.counts
    assert any("cannot be written (Not a directory); going on without it" in line for line in said)


def test_token_ids_are_stored_in_two_bytes_while_they_fit(corpus: Path) -> None:
    loaded = load_corpus(**files(corpus))
    tokenizer = train_tokenizer(loaded.train, 300, 2, lambda line: None)
    assert build_blocks(loaded, tokenizer, 32, lambda line: None).train.rows.dtype == np.uint16
