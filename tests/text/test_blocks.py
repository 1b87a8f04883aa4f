"""Text joined and cut into blocks, and the trained tokenizer: every token in order, counted, cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sophia_integrations.errors import UserError
from sophia_integrations.text.layouts import joined
from sophia_integrations.text.prepare import prepare
from sophia_integrations.text.source import Source, Split, load_source
from sophia_integrations.text.tokenizer import train_tokenizer


@pytest.fixture
def source(corpus: Path) -> Source:
    return load_source(files=[f"{corpus}/*.txt"], validation_fraction=0.3)


@pytest.fixture
def tokenizer(source: Source) -> Any:
    return train_tokenizer(source, 300, 2, lambda line: None)


def quiet(line: str) -> None:
    pass


def test_the_tokenizer_learns_from_training_documents_only() -> None:
    train, held = ([{"text": text}] for text in ("aaaa bbbb " * 50, "zzzz " * 500))
    tokenizer = train_tokenizer(Source("text", Split(train), Split(held), "a and z"), 300, 2, quiet)
    assert len(tokenizer) <= 300 and tokenizer.eos_token == "<|endoftext|>"
    text = "def f(x):\n\treturn 'é €'\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("bbbb").input_ids) < 4 and len(tokenizer("zzzz").input_ids) == 4


@pytest.mark.parametrize("task", ["pretrain", "seq2seq", "masked-lm", "classify"])
def test_a_trained_tokenizer_has_the_tokens_of_its_task(task: str, source: Source, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from sophia_integrations.text.tokenizer import identity

    tokenizer = train_tokenizer(source, 300, 2, quiet, task)
    ids, text = tokenizer("one").input_ids, tokenizer.convert_tokens_to_ids
    if task in ("masked-lm", "classify"):
        assert (
            (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) == (text("<|cls|>"), text("<|sep|>"))
        )
        assert None not in (tokenizer.mask_token_id, tokenizer.pad_token_id)
    else:
        assert tokenizer.decode(ids) == "one" and (tokenizer.pad_token is None) == (task == "pretrain")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("one").input_ids == ids and identity(again) == identity(tokenizer)


def test_blocks_hold_every_token_in_order_and_count_the_tail(source: Source, tokenizer: Any) -> None:
    data = prepare(source, tokenizer, block_size=32, say=quiet)
    expected: list[int] = []
    for row in source.train.rows:
        expected += [*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id]
    count = data.counts["train"]
    assert (count.documents, count.tokens) == (len(source.train.rows), len(expected))
    assert count.tokens == count.rows * 32 + count.dropped_tokens and 0 <= count.dropped_tokens < 32
    assert count.bytes == sum(len(row["text"].encode()) for row in source.train.rows)
    rows = torch.cat([data.train[index]["input_ids"] for index in range(len(data.train))])
    assert rows.tolist() == expected[: len(rows)]
    batch = data.collate([data.train[0], data.train[1]])
    assert torch.equal(batch["labels"], batch["input_ids"]) and batch["labels"].shape == (2, 32)
    assert data.train.features["input_ids"].feature.dtype == "uint16"  # while they fit
    documents, megabytes = len(source.train.rows), f"{count.bytes / 1e6:.1f} MB"
    assert data.describe().splitlines()[0] == (
        f"train: {documents} documents, {megabytes}, {count.tokens:,} tokens, {count.rows} blocks of 32 "
        f"({count.dropped_tokens} tokens dropped)"
    )


def test_blocks_drop_only_what_fills_none() -> None:
    assert list(joined([[1, 2, 3], [], [4, 5, 6, 7, 8]], 4)) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert list(joined([[1, 2, 3]], 4, [0], [9])) == [[0, 1, 2, 9]]


def test_text_shorter_than_a_block_is_refused(source: Source, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="less than one block of 100000; give more text or a smaller data.block_size"):
        prepare(source, tokenizer, block_size=100_000, say=quiet)


def test_a_second_time_comes_from_the_cache(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    first = prepare(source, train_tokenizer(source, 300, 2, said.append), block_size=32, say=said.append)
    assert len(said) == 3
    said.clear()
    second = prepare(source, train_tokenizer(source, 300, 2, said.append), block_size=32, say=said.append)
    assert said == []
    assert second.digest == first.digest and second.counts["train"].tokens == first.counts["train"].tokens
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_a_damaged_or_unwritable_cache_costs_time_only(
    source: Source, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    first = prepare(source, tokenizer, block_size=32, say=said.append)
    for path, rest in zip(sorted((tmp_path / "cache").glob("tokens-*.arrow")), (4, -2), strict=True):
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(whole[:rest])
    said.clear()
    assert prepare(source, tokenizer, block_size=32, say=said.append).counts == first.counts
    assert sum("is damaged; making it again" in line for line in said) == 2
    next((tmp_path / "cache").glob("tokens-*-train.json")).unlink()
    said.clear()
    assert prepare(source, tokenizer, block_size=32, say=said.append).counts == first.counts
    assert sum("is damaged; making it again" in line for line in said) == 1

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "file" / "cache"))
    said.clear()
    again = prepare(source, tokenizer, block_size=32, say=said.append)
    assert again.counts == first.counts and torch.equal(again.train[3]["input_ids"], first.train[3]["input_ids"])
    assert any("cannot be written (Not a directory); going on without it" in line for line in said)


def test_tokens_stay_on_disk(source: Source, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "cache"))
    data = prepare(source, tokenizer, block_size=32, say=quiet)
    for split in (data.train, data.validation):
        assert Path(split.cache_files[0]["filename"]).parent == tmp_path / "cache"


def test_a_tokenizer_without_an_end_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from sophia_integrations.text.tokenizer import load_tokenizer

    tokenizer.eos_token = tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(UserError, match=r"^tokenizer\.pretrained: .* has no end-of-text token"):
        load_tokenizer(str(tmp_path / "endless"))
    with pytest.raises(UserError, match=r"^model\.pretrained: 'nowhere' cannot be loaded: "):
        load_tokenizer("nowhere", key="model.pretrained")
