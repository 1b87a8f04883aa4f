"""Each test has its own folder, a cache of the test run, and no hub; a tokenizer of words is shared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

WORDS = "zero one two three four five six seven eight nine".split()


@pytest.fixture(autouse=True)
def quiet_place(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPHIA_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def words() -> Any:
    """A tokenizer whose every token is a word, with tokens for the end and for padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<end>", "<pad>", "<user>", "<assistant>", "<unk>"]
    known = {word: number for number, word in enumerate([*special, *WORDS, "=", "!"])}
    backend = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<user>", "<assistant>"]})
    return tokenizer


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as a .jsonl file and returns its path."""

    def write(rows: Iterable[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
