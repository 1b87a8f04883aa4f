"""Text files as blocks of tokens for a LightningModule: read, split, tokenized once, kept in a cache folder."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule

from .loader import BlockLoader

END_OF_TEXT = "<|endoftext|>"
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class TextDataModule(LightningDataModule):
    """Blocks of `block_size` tokens out of text files, which are joined by an end-of-text token.

    Without `files`, the text is the running Python's standard library: about 12 MB on every machine, nothing is
    downloaded, but losses compare only within one Python version. A file is held out for validation by a hash of
    its name. The training loader's position is part of Lightning's checkpoints, so mid-epoch resume is exact.

    Args:
        files: glob patterns of UTF-8 text files; `**` crosses folders.
        tokenizer: path or hub id of a transformers tokenizer; by default a byte-level BPE is trained on the text.
        vocab_size: of the tokenizer that is trained.
        block_size: tokens in a row.
        batch_size: rows of a batch on one device.
        validation_fraction: share of the files held out, in (0, 1).
        seed: key of the order of the rows.
        cache_dir: where tokens are kept; `$SOPHIA_CACHE`, else `sophia-integrations` in the user's cache folder.

    Raises:
        ValueError: an option out of range. On preparing: a pattern without files, or too little text for a block.
    """

    def __init__(
        self,
        files: list[str] | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        block_size: int = 128,
        batch_size: int = 8,
        validation_fraction: float = 0.05,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {validation_fraction!r}.")
        if min(block_size, batch_size) < 1:
            raise ValueError("block_size and batch_size must be at least 1.")
        self.files, self.tokenizer, self.vocab_size = files, tokenizer, vocab_size
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.validation_fraction = validation_fraction
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.cache_dir = Path(cache_dir or os.environ.get("SOPHIA_CACHE") or caches / "sophia-integrations")
        self.train_blocks: np.ndarray | None = None
        self.validation_blocks: np.ndarray | None = None

    def prepare_data(self) -> None:
        """Tokenize, unless the cache has it; Lightning calls this on one process of a machine."""
        documents = self._documents()
        target = self._cached(documents)
        if target.is_file():
            return
        train = [text for name, text in documents if not self._held_out(name)]
        encode, end = _trained(train, self.vocab_size) if self.tokenizer is None else _loaded(self.tokenizer)
        streams = {}
        for split, wanted in (("train", False), ("validation", True)):
            texts = [text for name, text in documents if self._held_out(name) is wanted]
            streams[split] = np.array([i for text in texts for i in [*encode(text), end]], dtype=np.uint32)
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.cache_dir, suffix=".npz", delete=False) as aside:
            np.savez(aside, **streams)
        os.replace(aside.name, target)

    def setup(self, stage: str) -> None:
        with np.load(self._cached(self._documents())) as streams:
            self.train_blocks, self.validation_blocks = (self._cut(streams, s) for s in ("train", "validation"))
        model = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        known = getattr(getattr(model, "config", None), "vocab_size", None)
        largest = int(self.train_blocks.max())
        if known is not None and largest >= known:
            raise ValueError(f"the text has the token {largest}, and the model's vocab_size is only {known}.")

    def train_dataloader(self) -> BlockLoader:
        loader = self._loader(self.train_blocks, shuffle=True)
        if not len(loader):
            raise ValueError(f"{len(self.train_blocks)} training blocks do not fill one batch: give more text.")
        return loader

    def val_dataloader(self) -> BlockLoader:
        return self._loader(self.validation_blocks, shuffle=False)

    def _loader(self, blocks: np.ndarray, shuffle: bool) -> BlockLoader:
        ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return BlockLoader(blocks, self.batch_size, shuffle, self.seed, *ranks)

    def _cut(self, streams: Any, split: str) -> np.ndarray:
        stream = streams[split]
        rows = len(stream) // self.block_size
        if not rows:
            raise ValueError(
                f"the {split} text has {len(stream)} tokens, less than one block of {self.block_size}: give more files"
                ", or change validation_fraction or block_size."
            )
        return stream[: rows * self.block_size].reshape(rows, self.block_size)

    def _documents(self) -> list[tuple[str, str]]:
        """(name, text) of every file that is UTF-8, in the order of the names."""
        if self.files is None:
            root = Path(sysconfig.get_path("stdlib"))
            paths = [p for p in root.rglob("*.py") if not _SKIPPED_FOLDERS & set(p.relative_to(root).parts)]
        else:
            paths = sorted({path for pattern in self.files for path in _matches(pattern)})
            root = Path(os.path.commonpath([path.parent for path in paths]))
        return sorted((p.relative_to(root).as_posix(), text) for p in paths for text in _texts(p))

    def _held_out(self, name: str) -> bool:
        number = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")
        return number < self.validation_fraction * 2**64

    def _cached(self, documents: list[tuple[str, str]]) -> Path:
        key = hashlib.sha256(repr((self.tokenizer, self.vocab_size, self.validation_fraction)).encode())
        for document in documents:
            key.update(repr(document).encode("utf-8", "surrogatepass"))
        return self.cache_dir / f"lightning-{key.hexdigest()[:32]}.npz"


def _matches(pattern: str) -> list[Path]:
    found = [Path(hit).resolve() for hit in glob.glob(os.path.expanduser(pattern), recursive=True)]
    found = [path for path in found if path.is_file()]
    if not found:
        raise ValueError(f"no file matches {pattern!r}.")
    return found


def _texts(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return


def _trained(texts: list[str], vocab_size: int) -> tuple[Any, int]:
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    return lambda text: bpe.encode(text).ids, bpe.token_to_id(END_OF_TEXT)


def _loaded(place: str) -> tuple[Any, int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {place!r} has no end-of-text token, which documents are joined by.")
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id
