"""Packed examples do not see each other: losses and Hessian estimates are those of separate, padded rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import support
import torch

from sophia_integrations.text.prepare import prepare
from sophia_integrations.text.source import load_source

WORDS = "zero one two three four five six seven eight nine".split()


@pytest.fixture
def both(tmp_path: Path, words: Any) -> list[Any]:
    """The same examples, one a row and packed."""
    draw = random.Random(0)
    rows = [
        {part: " ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for part in ("prompt", "completion")}
        for _ in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.jsonl").write_text(json.dumps(rows[0]) + "\n")
    source = load_source(files=["rows.jsonl"], validation_files=["held.jsonl"], task="finetune")
    options = dict(block_size=32, task="finetune", say=lambda line: None)
    return [prepare(source, words, packing=packing, **options) for packing in (False, True)]


def batch(data: Any) -> dict[str, torch.Tensor]:
    return data.collate([data.train[index] for index in range(len(data.train))])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_losses_are_those_of_separate_rows(kind: str, attention: str, both: list[Any]) -> None:
    model = support.tiny_model(kind, attn_implementation=attention, initializer_range=0.3).eval()
    apart, packed = (model(**batch(data), use_cache=False) for data in both)
    torch.testing.assert_close(packed.loss, apart.loss, rtol=1e-5, atol=1e-5)
    seeing = {name: tensor for name, tensor in batch(both[1]).items() if name != "position_ids"}
    assert abs(model(**seeing, use_cache=False).loss - apart.loss) > 1e-4


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_hessian_pass_sees_packed_rows_as_training_does(kind: str, both: list[Any], tmp_path: Path) -> None:
    def estimate(data: Any) -> dict[str, torch.Tensor]:
        trainer = support.make_trainer(
            tmp_path / "out",
            support.tiny_model(kind, initializer_range=0.3),
            data.train,
            fixed_labels=True,
            max_steps=1,
            per_device_train_batch_size=len(data.train),
            optim_args="hessian_interval=1,hessian_fraction=1.0,hessian_units=1",
        )
        trainer.data_collator = data.collate
        trainer.train()
        return support.first_hessian(trainer)

    apart, packed = (estimate(data) for data in both)
    assert apart.keys() == packed.keys() and len(apart) > 10
    for name, value in apart.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-3, atol=1e-7 + 1e-5 * float(value.max()))
