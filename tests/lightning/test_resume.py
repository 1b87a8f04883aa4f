"""A run that was killed goes on bit for bit, in the middle of an epoch, of an interval and at an epoch's end."""

import random

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import VOCABULARY, run_worker
from torch import nn
from torch.utils.data import default_collate
from workers.lightning_resume import run
from workers.lightning_support import FILTERS, Classifier, Record, Rows, make_trainer, row_loader

from sophia_integrations.lightning import ExactResume
from sophia_integrations.lightning.loader import RowLoader

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of words, and a tokenizer of `VOCABULARY` tokens for them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("corpus")
    words, draw = [f"w{i}" for i in range(VOCABULARY - 1)], random.Random(0)
    for number in range(8):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=170)))
    backend = Tokenizer(models.WordLevel({"<end>": 0, **{w: i + 1 for i, w in enumerate(words)}}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(("precision", "every", "left"), [("32-true", 10, 19), ("bf16-true", 9, 21)])
def test_killed_and_resumed_run_is_bit_equal(tmp_path, corpus, monkeypatch, precision, every, left):
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "cache"))
    arguments = (precision, every, corpus / "*.txt", corpus / "tokenizer")
    straight = run(tmp_path / "straight", "straight", *arguments)
    killed = run_worker("lightning_resume", tmp_path / "broken", "killed", *arguments, expect=None)
    assert killed.returncode in (-9, 137)
    resumed = run(tmp_path / "broken", "resumed", *arguments)
    assert straight["counters"] == resumed["counters"] == {"step": 20, "hessian_updates": 5, "hessian_skipped": 0}
    assert straight["batches_in_an_epoch"] == 17
    assert len(resumed["losses"]) == left
    assert resumed["losses"] == straight["losses"][-len(resumed["losses"]) :]
    for a, b in zip(straight["weights"], resumed["weights"], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(straight["state"], resumed["state"], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Dropped(Classifier):
    """A module that knows nothing of resuming."""

    def __init__(self):
        super().__init__(hessian_interval=3)
        self.net.net.insert(1, nn.Dropout(0.5))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("saved", [{"every_n_train_steps": 4}, {"every_n_epochs": 1}], ids=["in the step", "after it"])
def test_any_module_goes_on_exactly_from_the_end_of_an_epoch(tmp_path, saved):
    """With a plain, shuffling `DataLoader`, which draws its order from the global random state."""

    def fit(record, checkpoint=None):
        saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **saved)
        options = dict(max_steps=-1, max_epochs=2, enable_checkpointing=True)
        make_trainer(record, saver, ExactResume(), **options).fit(
            Dropped(), row_loader(8, shuffle=True), ckpt_path=checkpoint
        )

    straight, resumed = Record(), Record()
    fit(straight)
    torch.manual_seed(99)
    fit(resumed, tmp_path / "step=4.ckpt")
    assert len(straight.losses) == 8 and resumed.losses == straight.losses[4:]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_beginning_to_iterate_in_the_middle_of_an_epoch_draws_nothing_more(tmp_path):
    """A loader that knows its position, and draws a random number when it is opened, as a `DataLoader` does."""

    class Drawing(RowLoader):
        def __iter__(self):
            torch.rand(1)
            return super().__iter__()

    def fit(record, checkpoint=None):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = make_trainer(record, saver, ExactResume(), max_steps=8, enable_checkpointing=True)
        trainer.fit(Dropped(), Drawing(Rows(32), 8, default_collate, shuffle=True), ckpt_path=checkpoint)

    straight, resumed = Record(), Record()
    fit(straight)
    torch.manual_seed(99)
    fit(resumed, tmp_path / "step=6.ckpt")
    assert len(straight.losses) == 8 and resumed.losses == straight.losses[6:]


def test_each_rank_goes_on_with_its_own_random_numbers(tmp_path):
    run_worker("lightning_dropout", tmp_path, processes=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for rank in ranks:
        assert len(rank["straight"]) == 8 and rank["resumed"] == rank["straight"][4:]
    assert ranks[0]["masks"] != ranks[1]["masks"]


def test_random_states_of_other_ranks_are_left_alone():
    """A checkpoint of two ranks, opened by one."""
    callback = ExactResume()
    states = callback.state_dict()["ranks"] * 2
    torch.manual_seed(5)
    before = torch.get_rng_state()
    callback.load_state_dict({"ranks": states})
    assert torch.equal(torch.get_rng_state(), before)
