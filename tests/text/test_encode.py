"""Rows to tokens and labels: what carries loss in each format, what is cut, what is packed, what is counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sophia_integrations.errors import UserError
from sophia_integrations.text.prepare import Prepared, prepare
from sophia_integrations.text.source import load_source

PLAIN = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> \n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} <end>"
    "{% endgeneration %}{% else %}{{ m.content }} <end>{% endif %} \n{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content if loop.last or m.role == 'user' else '' }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture
def prepared(jsonl: Callable[..., str], words: Any) -> Callable[..., Prepared]:
    """Rows as both splits, tokenized."""

    def make(rows: list[dict[str, Any]], block_size: int = 16, task: str = "finetune", **options: Any) -> Prepared:
        files = {"files": [jsonl(rows, "train.jsonl")], "validation_files": [jsonl(rows, "held.jsonl")]}
        settings = {key: options.pop(key) for key in ("format", "columns", "streaming") if key in options}
        source = load_source(**files, task=task, **settings)
        return prepare(source, words, block_size=block_size, task=task, say=lambda line: None, **options)

    return make


def shown(words: Any, item: dict[str, torch.Tensor]) -> list[str]:
    """The tokens of an item; those with loss in brackets."""
    tokens = words.convert_ids_to_tokens(item["input_ids"])
    for token, label in zip(item["input_ids"].tolist(), item["labels"].tolist(), strict=True):
        assert label in (token, -100)
    return [f"[{t}]" if y != -100 else t for t, y in zip(tokens, item["labels"].tolist(), strict=True)]


def chat(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


def test_only_the_completion_carries_loss(prepared: Callable[..., Prepared], words: Any) -> None:
    data = prepared([{"prompt": "one two =", "completion": " three"}, {"prompt": "", "completion": "four five"}])
    assert shown(words, data.train[0]) == ["one", "two", "=", "[three]", "[<end>]"]
    assert shown(words, data.train[1]) == ["four", "[five]", "[<end>]"]  # nothing predicts the first token
    assert data.describe().splitlines()[0] == "train: 2 examples, 0.0 MB, 8 tokens (50% carry loss)"
    batch = data.collate([data.train[0], data.train[1]])
    assert batch["input_ids"][1, 3:].tolist() == [words.pad_token_id] * 2
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"][1, 3:].tolist() == [-100, -100]


def test_a_tokenizer_that_opens_every_text_opens_every_example(prepared: Callable[..., Prepared], words: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    words.bos_token = "!"
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="! $A", special_tokens=[("!", words.convert_tokens_to_ids("!"))]
    )
    data = prepared([{"prompt": "one", "completion": " two"}])
    assert shown(words, data.train[0]) == ["!", "one", "[two]", "[<end>]"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_assistant_carries_loss(template: str, prepared: Callable[..., Prepared], words: Any) -> None:
    words.chat_template = template
    data = prepared([chat("one two", "three", "four", "five six")])
    assert shown(words, data.train[0]) == [
        "<user>", "one", "two", "<end>", "<assistant>", "[three]", "[<end>]",
        "<user>", "four", "<end>", "<assistant>", "[five]", "[six]", "[<end>]",
    ]  # fmt: skip


def smol(end: str, marked: bool) -> str:
    """A chat template as SmolLM2's, whose turns end in `end`."""
    said = f"{{{{ message.content }}}}{end}"
    if marked:
        assistant = f"{{% generation %}}{said}{{% endgeneration %}}"
        said = f"{{% if message.role == 'assistant' %}}{assistant}{{% else %}}{said}{{% endif %}}"
    return (
        "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system\nHelp."
        "<|im_end|>\n{% endif %}<|im_start|>{{ message.role }}\n" + said + "{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.mark.parametrize(("end", "marked"), [("<|im_end|>", False), ("<|im_end|>", True), ("", False)])
def test_every_byte_that_the_assistant_wrote_carries_loss_and_no_other(end: str, marked: bool) -> None:
    from sophia_integrations.text.encode import Encoder
    from sophia_integrations.text.source import Source, Split
    from sophia_integrations.text.tokenizer import train_tokenizer
    from sophia_integrations.text.tokens import Counts

    row = {"messages": json.dumps(chat("Wer? ", "  Ich, Österreich!\n", "Why?", "So.")["messages"])}
    source = Source("chat", Split([row]), Split([row]), digest="chat")
    tokenizer = train_tokenizer(source, 260, 2, lambda line: None)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = smol(end, marked)
    (item,) = Encoder("chat", "finetune", tokenizer, 500).items([row], Counts(), pytest.fail)
    learned = [token for token, label in zip(item["input_ids"], item["labels"], strict=True) if label != -100]
    stop = end or "\n"  # where nothing else ends a turn, the line does
    assert tokenizer.decode(learned) == f"  Ich, Österreich!\n{stop}So.{stop}"
    assert tokenizer.decode(item["input_ids"]).startswith(
        "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\nWer? "
    )


def test_a_conversation_may_begin_with_the_assistant_or_a_system_message(
    prepared: Callable[..., Prepared], words: Any
) -> None:
    words.chat_template = PLAIN
    first = {"messages": [{"role": "assistant", "content": "one"}, {"role": "user", "content": "two"}]}
    data = prepared([first])
    assert shown(words, data.train[0]) == ["<assistant>", "[one]", "[<end>]", "<user>", "two", "<end>"]


def test_templates_that_cannot_serve_are_refused(prepared: Callable[..., Prepared], words: Any) -> None:
    rows = [chat("one", "two", "three", "four")]
    with pytest.raises(UserError, match=r"^data\.format: chat needs a tokenizer with a chat template, and this one"):
        prepared(rows)
    words.chat_template = FORGETFUL
    with pytest.raises(UserError, match=r"row 1: the tokenizer's chat template writes turn 2 differently once others"):
        prepared(rows)
    words.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="chat template refuses this conversation: roles must alternate"):
        prepared(rows)


def test_what_is_cut_is_counted(prepared: Callable[..., Prepared], words: Any) -> None:
    rows = [
        {"prompt": "one", "completion": "two"},
        {"prompt": "one two three", "completion": "four five"},
        {"prompt": "one two three four five", "completion": "six"},
    ]
    data = prepared(rows, block_size=4)
    assert [shown(words, item) for item in data.train] == [
        ["one", "[two]", "[<end>]"], ["one", "two", "three", "[four]"],
    ]  # fmt: skip
    counts = data.counts["train"]
    assert (counts.documents, counts.rows, counts.cut, counts.left_out) == (3, 2, 1, 1)
    assert data.describe().splitlines()[0].endswith("; 1 cut to 4 tokens; 1 left out, without loss within 4 tokens")
    with pytest.raises(UserError, match="no train example carries loss within 2 tokens; raise data.block_size"):
        prepared(rows[1:], block_size=2)


def test_examples_are_packed_whole(prepared: Callable[..., Prepared], words: Any) -> None:
    rows = [{"prompt": "one " * n, "completion": "two"} for n in (1, 3, 2, 4)]  # 3, 5, 4 and 6 tokens
    data = prepared(rows, block_size=8, packing=True)
    assert len(data.train) == 3
    assert shown(words, data.train[0]) == ["one", "[two]", "[<end>]", "one", "one", "one", "[two]", "[<end>]"]
    assert data.train[0]["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert data.train[1]["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert data.train[1]["labels"][4:].tolist() == [-100] * 4
    assert sum((item["labels"] != -100).sum() for item in data.train) == 8
    assert data.counts["train"].padding == 6
    assert "packed into 3 rows of 8 (25.0% padding)" in data.describe()
    assert set(data.collate([data.train[0], data.train[1]])) == {"input_ids", "labels", "position_ids"}


def test_sequence_to_sequence_has_two_texts(prepared: Callable[..., Prepared], words: Any) -> None:
    rows = [{"prompt": "one two", "completion": "three"}, {"prompt": "one " * 9, "completion": "two three"}]
    data = prepared(rows, block_size=4, task="seq2seq")
    ids, labels = (words.convert_ids_to_tokens(data.train[0][name]) for name in ("input_ids", "labels"))
    assert (ids, labels) == (["one", "two", "<end>"], ["three", "<end>"])
    assert words.convert_ids_to_tokens(data.train[1]["input_ids"]) == ["one", "one", "one", "<end>"]
    assert data.counts["train"].cut == 1 and data.counts["train"].tokens == 3 + 2 + 4 + 3
    batch = data.collate([data.train[0], data.train[1]])
    assert batch["labels"].shape == (2, 3) and batch["labels"][0, 2] == -100


def test_a_classification_has_one_label(prepared: Callable[..., Prepared], words: Any) -> None:
    rows = [{"text": "one two three", "label": "b"}, {"text": "four", "label": "a"}, {"text": "five", "label": "b"}]
    data = prepared(rows, block_size=2, task="classify")
    assert data.labels == ["a", "b"] and data.label_counts == [1, 2]
    assert words.convert_ids_to_tokens(data.train[0]["input_ids"]) == ["one", "two"]
    batch = data.collate([data.train[index] for index in range(3)])
    assert batch["labels"].tolist() == [1, 0, 1]
    assert data.describe().splitlines() == [
        "train: 3 examples, 0.0 MB, 4 tokens; 1 cut to 2 tokens",
        "validation: 3 examples, 0.0 MB, 4 tokens; 1 cut to 2 tokens",
        "labels: a 1, b 2",
    ]


def test_text_may_have_a_row_of_its_own(prepared: Callable[..., Prepared], words: Any) -> None:
    data = prepared([{"text": "one two"}, {"text": "three " * 9}], block_size=4, packing=False)
    assert [shown(words, item) for item in data.train] == [
        ["one", "[two]", "[<end>]"], ["three", "[three]", "[three]", "[three]"],
    ]  # fmt: skip


def test_masks_depend_on_the_batch_alone(prepared: Callable[..., Prepared], words: Any) -> None:
    rows = [{"text": f"one two {word} four five six seven"} for word in ("zero", "eight", "nine")]
    with pytest.raises(UserError, match="masked-lm needs a tokenizer with a mask token"):
        prepared(rows, task="masked-lm")
    words.add_special_tokens({"mask_token": "<mask>"})
    data = prepared(rows * 40, block_size=8, task="masked-lm", mask_probability=0.3)
    items = [data.train[index] for index in range(len(data.train))]
    first, again = data.collate(items), data.collate(items)
    assert all(torch.equal(first[name], again[name]) for name in first)
    seeded = prepared(rows * 40, block_size=8, task="masked-lm", mask_probability=0.3, seed=1).collate(items)
    assert not torch.equal(first["labels"], seeded["labels"])
    other = data.collate(items[::-1])
    assert not torch.equal(first["labels"], other["labels"].flip(0))
    chosen = first["labels"] != -100
    original = torch.stack([item["input_ids"] for item in items])
    assert torch.equal(first["labels"][chosen], original[chosen])
    assert torch.equal(first["input_ids"][~chosen], original[~chosen])
    ordinary = original != words.eos_token_id
    assert 0.25 < chosen[ordinary].float().mean() < 0.35 and not chosen[~ordinary].any()
    assert 0.7 < (first["input_ids"][chosen] == words.mask_token_id).float().mean() < 0.9
    alone = data.collate([{name: value[:2] for name, value in items[0].items()}])
    assert (alone["labels"] != -100).any()  # a loss without a masked token would not be a number


def test_an_encoder_frames_its_rows(prepared: Callable[..., Prepared], words: Any) -> None:
    words.add_special_tokens({"mask_token": "<mask>", "cls_token": "<cls>", "sep_token": "<sep>"})
    words.eos_token = None
    data = prepared([{"text": "one two three four five"}], block_size=4, task="masked-lm")
    assert [words.convert_ids_to_tokens(item["input_ids"]) for item in data.train] == [
        ["<cls>", "one", "two", "<sep>"], ["<cls>", "three", "four", "<sep>"], ["<cls>", "five", "<sep>", "<sep>"],
    ]  # fmt: skip


def test_a_second_time_comes_from_the_cache(
    prepared: Callable[..., Prepared], words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": "one", "completion": "two"}]

    def made(**options: Any) -> tuple[list[str], Prepared]:
        said: list[str] = []
        source = load_source(files=["train.jsonl"], validation_files=["held.jsonl"], task="finetune")
        return said, prepare(source, words, task="finetune", say=said.append, **{"block_size": 8, **options})

    prepared(rows)
    assert len(made(block_size=9)[0]) == 2 and made(block_size=9)[0] == []
    assert made(block_size=9, packing=True)[0] != []  # counted anew, for its own digest
    words.add_tokens(["more"])
    assert made(block_size=9)[0] != []
    for path in (tmp_path / "cache").glob("tokens-*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    said, data = made(block_size=9)
    assert sum("is damaged; making it again" in line for line in said) == 2 and len(data.train) == 1


def streamed(data: Prepared, count: int, workers: int = 0) -> Sequence[torch.Tensor]:
    loader = torch.utils.data.DataLoader(data.train, batch_size=1, collate_fn=data.collate, num_workers=workers)
    return [batch["input_ids"][0] for batch, _ in zip(loader, range(count), strict=False)]


def test_a_stream_is_endless_and_the_same_again(prepared: Callable[..., Prepared], words: Any) -> None:
    rows = [{"text": f"{a} {b}"} for a in ("one", "two", "three") for b in ("four", "five", "six", "seven")]
    data = prepared(rows, block_size=3, task="pretrain", streaming=True, seed=3)
    first = streamed(data, 36)
    assert all(map(torch.equal, first, streamed(data, 36)))
    passes = [[tuple(row.tolist()) for row in first[start : start + 12]] for start in (0, 12, 24)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2]) and len(set(passes[0])) == 12
    assert passes[0] != passes[1]  # another order in each pass
    other = streamed(prepared(rows, block_size=3, task="pretrain", streaming=True, seed=4), 12)
    assert [tuple(row.tolist()) for row in other] != passes[0]
    assert data.describe().startswith("train: a stream, read and tokenized while training\nvalidation: 12 documents")
    empty = prepared([*rows, {"text": ""}], block_size=3, task="pretrain", streaming=True, seed=3)
    assert len(set(map(tuple, (row.tolist() for row in streamed(empty, 12))))) == 12
    assert empty.counts["validation"].empty == 1


def test_a_stream_loses_no_token_between_blocks(prepared: Callable[..., Prepared], words: Any) -> None:
    texts = {f"{a} {b}" for a in ("one", "two", "three") for b in ("four", "five")}
    data = prepared([{"text": text} for text in sorted(texts)], block_size=11, task="pretrain", streaming=True)
    joined = " ".join(token for row in streamed(data, 30) for token in words.convert_ids_to_tokens(row))
    documents = [text.strip() for text in joined.split("<end>")]
    assert len(documents) == 111 and set(documents[:-1]) == texts


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_share_the_files_of_a_stream(prepared: Callable[..., Prepared], words: Any, jsonl: Any) -> None:
    for name, first in (("train.jsonl", "one"), ("train 2.jsonl", "two")):
        files = [jsonl([{"text": f"{first} {last}"} for last in ("four", "five", "six", "seven")], name)]
    files, held = ["train*.jsonl"], [jsonl([{"text": "three four"}], "held.jsonl")]
    source = load_source(files=files, validation_files=held, streaming=True)
    data = prepare(source, words, block_size=3, say=lambda line: None)
    assert data.train.files == 2
    found = [tuple(row.tolist()) for row in streamed(data, 16, workers=2)]
    assert sorted(found[:8]) == sorted(found[8:]) and len(set(found[:8])) == 8


def test_a_stream_packs_as_a_data_set_does(prepared: Callable[..., Prepared], words: Any) -> None:
    rows = [{"prompt": "one two", "completion": "three"}] * 7
    data = prepared(rows, block_size=9, packing=True, streaming=True)
    whole = prepared(rows, block_size=9, packing=True)
    for streaming, item in zip(data.train, whole.train, strict=False):
        assert all(torch.equal(streaming[name], item[name]) for name in item)
        break
    loose = prepared(rows, block_size=9, streaming=True)
    batch = loose.collate([next(iter(loose.train))])
    assert batch["input_ids"].shape == (1, 9)  # one length, so that processes can share a batch


def test_streams_without_anything_to_learn_end(prepared: Callable[..., Prepared], jsonl: Callable[..., str]) -> None:
    good = {"prompt": "one", "completion": "two"}
    data = prepared([good, {"prompt": "one", "completion": "  "}][:1], streaming=True)
    jsonl([good, {"prompt": "one", "completion": "  "}], "train.jsonl")
    with pytest.raises(UserError, match=r"train\.jsonl, row 2: the completion is empty"):
        for _ in zip(data.train, range(9), strict=False):
            pass
