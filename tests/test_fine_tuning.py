"""The parts of `make finetune` that need no download: its data, and one comparison on a tiny model."""

import importlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from support import LENGTH, VOCABULARY, tiny_model

from sophia_integrations.text.source import Source, Split

MEASUREMENTS = str(Path(__file__).parent / "measurements")


@pytest.fixture
def finetune(monkeypatch, tmp_path):
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(MEASUREMENTS)
    yield importlib.import_module("finetune")
    for name in ("finetune", "real_weights"):
        sys.modules.pop(name, None)


def test_headlines_are_read_from_a_wheel_in_the_cache_each_once(finetune, tmp_path):
    samples = [("dog bites man", "0"), ("man bites dog", "1"), ("dog bites man", "0")]
    lines = [json.dumps({"input": [{"content": "?"}, {"content": text}], "ideal": label}) for text, label in samples]
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "evals-3.0.1.post1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("evals/registry/data/sarcasm/samples.jsonl", "\n".join(lines))
    assert finetune.real_weights.headlines() == [("dog bites man", 0), ("man bites dog", 1)]


def test_functions_are_shown_without_the_docstring_that_is_asked_for(finetune):
    twice = (
        'def twice(x):\n    """Double `x`.\n\n    In full: add it to itself.\n    """\n    return x + x  # quickly\n'
    )
    once = 'class A:\n    def once(self):\n        """Do\n        it."""\n        return 1\n'
    bare = 'def stub():\n    """Only documented."""\n\ndef silent():\n    return 1\n'
    a, b, c = ([{"text": text}] for text in (twice, bare + twice, twice + once))
    source = Source("text", Split(a + b), Split(c), digest="")
    train, validation = finetune.real_weights.documented_functions(source)
    assert train == [("def twice(x):\n    return x + x", "Double `x`.")]
    assert validation == [("def once(self):\n    return 1", "Do\nit.")]


def test_a_comparison_trains_every_learning_rate_and_no_curvature_at_the_best(finetune, monkeypatch, capsys):
    from transformers import default_data_collator

    rows = torch.randint(VOCABULARY, (24, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in rows]
    part = finetune.Part(tiny_model, default_data_collator, rows[:16], rows[16:], (1e-3, 1e-2), (1e-3, 1e-2), 4, 2)
    monkeypatch.setitem(finetune.PARTS, "tiny", lambda: part)
    finetune.compare("tiny", steps=None, only=finetune.RULES)
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[0] for line in table[1:]] == [
        "before",
        *["AdamW"] * 2,
        *["Sophia, eigenbasis"] * 2,
        *["Sophia-G"] * 2,
        "Sophia-G, ρ = 0",
    ]
    before, *trained = (float(line[2]) for line in table[1:])
    assert before not in trained
    sophia = {line[1]: line for line in table if line[0] == "Sophia-G"}
    assert [line[5] for line in sophia.values()] == ["2", "2"]
    assert table[-1][1] == min(sophia, key=lambda rate: float(sophia[rate][2]))
    assert float(table[-1][4]) < 0.1, "only coordinates without a gradient stay below ε"
