"""TextDataModule and its loader: what is in a block, who gets which row, and where it goes on."""

import json
import sysconfig

import pytest
import torch
from torch.utils.data import default_collate
from workers.lightning_support import FILTERS, causal_lm, make_trainer

from sophia_integrations.errors import UserError
from sophia_integrations.lightning import TextDataModule
from sophia_integrations.lightning.loader import RowLoader
from sophia_integrations.text.prepare import prepare
from sophia_integrations.text.source import load_source
from sophia_integrations.text.tokenizer import train_tokenizer

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]


def loader_of(batch_size, shuffle, *rest, **options):
    rows = [{"input_ids": torch.tensor([number])} for number in range(22)]
    return RowLoader(rows, batch_size, default_collate, shuffle, *rest, **options)


def rows(batches):
    return [int(ids[0]) for batch in batches for ids in batch["input_ids"]]


def test_an_epoch_is_a_permutation_of_its_own():
    loader = loader_of(4, True, seed=1)
    first, second = rows(loader), rows(loader)
    assert len(first) == len(set(first)) == 20 and first != second
    assert first == rows(loader_of(4, True, seed=1))
    assert first != rows(loader_of(4, True, seed=2))


def test_ranks_share_an_epoch_without_overlap():
    seen = [rows(loader_of(3, True, 0, rank, 2)) for rank in range(2)]
    assert [len(s) for s in seen] == [9, 9] and not set(seen[0]) & set(seen[1])


def test_validation_takes_every_row_in_order_each_time():
    loader = loader_of(4, False)
    assert rows(loader) == rows(loader) == list(range(22)) and len(loader) == 6


@pytest.mark.parametrize("taken", [1, 3, 5])
def test_state_goes_on_with_the_next_batch(taken):
    loader = loader_of(4, True)
    iterator = iter(loader)
    for _ in range(taken):
        next(iterator)
    other = loader_of(4, True)
    other.load_state_dict(loader.state_dict())
    expected = rows(iterator) + rows(loader) if taken < 5 else rows(loader)
    assert rows(other) + (rows(other) if taken < 5 else []) == expected


@pytest.fixture
def files(tmp_path):
    (tmp_path / "deep").mkdir()
    for number in range(12):
        (tmp_path / "deep" / f"{number}.txt").write_text(f"document {number} says hello world " * 20)
    return [str(tmp_path / "**" / "*.txt")]


@pytest.fixture
def options(tmp_path):
    return dict(vocab_size=300, block_size=16, validation_fraction=0.3, cache_dir=str(tmp_path / "cache"))


def test_files_become_blocks_and_the_cache_is_used(files, options, tmp_path):
    for _ in range(2):
        data, said = TextDataModule(files, **options), []
        data.say = said.append
        data.prepare_data()
        data.setup("fit")
    names = sorted(path.name.partition("-")[0] for path in (tmp_path / "cache").glob("*.arrow"))
    assert names == ["rows", "tokens", "tokens"] and list((tmp_path / "cache").glob("tokenizer-*.json"))
    assert len(said) == 1 and said[0].startswith("train: 10 documents")
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (8, 16) and (batch["input_ids"] == batch["labels"]).all()
    assert batch["input_ids"].max() < 300 and 0 < len(data.prepared.validation) < len(data.prepared.train)


def test_rows_are_those_of_a_recipe_for_the_trainer(files, options, tmp_path, monkeypatch):
    """Contract 7 begins with the data: the same documents, split and tokens for the same settings."""
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "another cache"))
    source = load_source(files=files, validation_fraction=0.3)
    expected = prepare(source, train_tokenizer(source, 300, 2, list), block_size=16, say=list)
    data = TextDataModule(files, **options)
    data.prepare_data()
    assert data.prepared.digest == expected.digest
    for rows, wanted in ((data.prepared.train, expected.train), (data.prepared.validation, expected.validation)):
        assert len(rows) == len(wanted) and torch.equal(rows[:]["input_ids"], wanted[:]["input_ids"])


def test_without_a_source_the_text_is_the_standard_library(options, tmp_path, monkeypatch):
    library = tmp_path / "library"
    (library / "test").mkdir(parents=True)
    for number in range(12):
        (library / f"module{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 40)
        (library / "test" / f"test{number}.py").write_text("assert True")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    data = TextDataModule(**options)
    data.prepare_data()
    counts = data.prepared.counts
    assert counts["train"].documents + counts["validation"].documents == 12


def test_bad_rows_are_an_error_or_left_out(options, tmp_path):
    texts = [json.dumps({"text": f"document {number} says hello world " * 20}) for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*texts, '{"text": 3}', "{"]))
    rows = [str(tmp_path / "rows.jsonl")]
    with pytest.raises(
        UserError, match="^2 of 14 rows are bad: .*, row 13: the text is 3, expected text; .*, row 14: "
    ):
        TextDataModule(rows, **options).prepare_data()
    data, said = TextDataModule(rows, bad_rows="skip", **options), []
    data.say = said.append
    data.prepare_data()
    assert data.prepared.skipped_rows == 2 and "\nbad rows: 2 of 14 skipped: " in said[-1]
    with pytest.raises(ValueError, match='bad_rows must be "error" or "skip"'):
        TextDataModule(rows, bad_rows="leave")


def test_files_held_out_by_name(files, options, tmp_path):
    (tmp_path / "held.md").write_text("entirely different text " * 30)
    data = TextDataModule(files, validation_files=[str(tmp_path / "*.md")], **options)
    data.prepare_data()
    assert data.prepared.counts["train"].documents == 12 and data.prepared.counts["validation"].documents == 1


@pytest.mark.parametrize(
    ("pattern", "changed", "error", "message"),
    [
        ("nothing-*.txt", {}, UserError, "no file matches"),
        ("**/*.txt", {"block_size": 10_000}, UserError, "less than one block of 10000"),
        ("**/*.txt", {"batch_size": 1000}, ValueError, "do not fill one batch"),
        ("**/*.txt", {"validation_fraction": 1.5}, ValueError, "must be between 0 and 1"),
        ("**/*.txt", {"batch_size": 0}, ValueError, "at least 1"),
    ],
)
def test_errors(files, options, tmp_path, pattern, changed, error, message):
    with pytest.raises(error, match=message):
        data = TextDataModule([str(tmp_path / pattern)], **{**options, **changed})
        data.prepare_data()
        data.setup("fit")
        data.train_dataloader()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocab_size": 300}, "the tokenizer has 290 tokens, and the model's vocab_size is only 61"),
        ({"block_size": 64}, "block_size 64 is longer than the model's context of 32 tokens"),
    ],
)
def test_a_model_too_small_for_the_text_is_refused(files, options, changed, message):
    module = causal_lm()
    if "block_size" in changed:
        module.model.config.vocab_size = 300
    with pytest.raises(ValueError, match=message):
        make_trainer(max_steps=1).fit(module, TextDataModule(files, **{**options, **changed}))
