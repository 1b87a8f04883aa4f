"""A run that was killed goes on bit for bit, in the middle of an epoch, of an interval and at an epoch's end."""

import random

import pytest
import torch
from support import VOCABULARY, run_worker
from workers.lightning_resume import run
from workers.lightning_support import FILTERS

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
