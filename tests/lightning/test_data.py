"""TextDataModule and its loader: what is in a block, who gets which row, and where it goes on."""

import numpy as np
import pytest
from workers.lightning_support import FILTERS, causal_lm, make_trainer

from sophia_integrations.lightning import TextDataModule
from sophia_integrations.lightning.loader import BlockLoader

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]
BLOCKS = np.arange(44, dtype=np.uint32).reshape(22, 2)


def rows(batches):
    return [int(ids[0]) // 2 for batch in batches for ids in batch["input_ids"]]


def test_an_epoch_is_a_permutation_of_its_own():
    loader = BlockLoader(BLOCKS, 4, shuffle=True, seed=1)
    first, second = rows(loader), rows(loader)
    assert len(first) == len(set(first)) == 20 and first != second
    assert first == rows(BlockLoader(BLOCKS, 4, shuffle=True, seed=1))
    assert first != rows(BlockLoader(BLOCKS, 4, shuffle=True, seed=2))


def test_ranks_share_an_epoch_without_overlap():
    seen = [rows(BlockLoader(BLOCKS, 3, True, 0, rank, 2)) for rank in range(2)]
    assert [len(s) for s in seen] == [9, 9] and not set(seen[0]) & set(seen[1])


def test_validation_takes_every_row_in_order_each_time():
    loader = BlockLoader(BLOCKS, 4, shuffle=False)
    assert rows(loader) == rows(loader) == list(range(22)) and len(loader) == 6


@pytest.mark.parametrize("taken", [1, 3, 5])
def test_state_goes_on_with_the_next_batch(taken):
    loader = BlockLoader(BLOCKS, 4, shuffle=True)
    iterator = iter(loader)
    for _ in range(taken):
        next(iterator)
    other = BlockLoader(BLOCKS, 4, shuffle=True)
    other.load_state_dict(loader.state_dict())
    expected = rows(iterator) + rows(loader) if taken < 5 else rows(loader)
    assert rows(other) + (rows(other) if taken < 5 else []) == expected


def test_files_become_blocks_and_the_cache_is_used(tmp_path):
    (tmp_path / "deep").mkdir()
    for number in range(12):
        (tmp_path / "deep" / f"{number}.txt").write_text(f"document {number} says hello world " * 20)
    (tmp_path / "deep" / "binary.txt").write_bytes(b"\xff\xfe\x00\xff")
    options = dict(vocab_size=300, block_size=16, validation_fraction=0.3, cache_dir=str(tmp_path / "cache"))
    data = TextDataModule([str(tmp_path / "**" / "*.txt")], **options)
    data.prepare_data()
    written = list((tmp_path / "cache").iterdir())
    assert len(written) == 1 and written[0].suffix == ".npz"
    before = written[0].stat().st_mtime_ns
    data.prepare_data()
    data.setup("fit")
    assert written[0].stat().st_mtime_ns == before
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (8, 16) and (batch["input_ids"] == batch["labels"]).all()
    assert data.train_blocks.max() < 300 and 0 < len(data.validation_blocks) < len(data.train_blocks)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ("nothing-*.txt", {}, "no file matches"),
        ("*.txt", {"block_size": 10_000}, "less than one block of 10000"),
        ("*.txt", {"validation_fraction": 1.5}, "must be between 0 and 1"),
        ("*.txt", {"batch_size": 0}, "at least 1"),
    ],
)
def test_errors(tmp_path, files, options, message):
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text("hello world " * 40)
    options = {"vocab_size": 300, "validation_fraction": 0.3, "cache_dir": str(tmp_path), **options}
    with pytest.raises(ValueError, match=message):
        data = TextDataModule([str(tmp_path / files)], **options)
        data.prepare_data()
        data.setup("fit")


def test_a_model_with_too_small_a_vocabulary_is_refused(tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text("hello world " * 40)
    data = TextDataModule(
        [str(tmp_path / "*.txt")], vocab_size=300, block_size=8, validation_fraction=0.3, cache_dir=str(tmp_path)
    )
    with pytest.raises(ValueError, match="the model's vocab_size is only 61"):
        make_trainer(max_steps=1).fit(causal_lm(), data)
