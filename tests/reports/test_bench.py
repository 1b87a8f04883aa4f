"""`bench` in miniature: every optimizer steps, the figures are there, and the JSON is what was printed."""

from __future__ import annotations

import json

import pytest
import torch

from sophia_integrations.errors import UserError
from sophia_integrations.reports.bench import KINDS, bench, models, step, timing

TINY = models.Shape(layers=1, width=8, heads=2, vocabulary=31, length=8, rows=4)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(step.SIZES, "tiny", (1, 8, 31, 8))
    monkeypatch.setitem(models.SHAPES, "tiny", TINY)


def run(what, **options):
    return bench(what, **{"size": "tiny", "device": "cpu", "cycles": 1, **options})


@pytest.mark.parametrize("what", KINDS)
def test_it_measures_prints_and_writes(what, tmp_path, capsys):
    threads = torch.get_num_threads()
    found = run(what, threads=1, json=tmp_path / "found.json")
    assert torch.get_num_threads() == threads and found["environment"]["threads"] == 1
    assert json.loads((tmp_path / "found.json").read_text()) == found
    printed = capsys.readouterr().out
    assert found["title"] in printed and f"torch {torch.__version__}" in printed
    figures = [value for row in found["rows"] for value in row.values() if isinstance(value, float)]
    assert figures and all(value > 0 for value in figures)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_compares_with_adamw(dtype):
    rows = {row["optimizer"]: row for row in run("step", dtype=dtype)["rows"]}
    assert {"AdamW fused", "AdamW foreach", "SophiaG", "SophiaG fused=False", "sophia-opt SophiaG"} <= rows.keys()
    assert rows["AdamW fused"]["ratio"] == rows["AdamW fused"]["ratio over 10 steps"] == 1


def test_train_shows_what_the_difference_is_made_of():
    parts = [row["part"].strip() for row in run("train")["rows"]]
    assert parts == ["AdamW fused", "SophiaG eigen", "pass", "products", "factors", "QR"]


def test_pairs_take_turns_and_are_compared_one_by_one():
    order = []
    seconds = timing.in_turns({name: lambda n=name: order.append(n) for name in "ab"}, 3, "cpu")
    assert order == list("ababab") and {len(own) for own in seconds.values()} == {3}
    assert timing.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0
    assert timing.sums([1.0, 2.0, 3.0, 4.0], 2) == [3.0, 7.0]


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="--size huge: bench step knows 10m"):
        bench("step", size="huge", device="cpu")
    with pytest.raises(UserError, match="--size huge: there are small"):
        bench("train", size="huge", device="cpu")
    with pytest.raises(UserError, match="--cycles must be at least 1, got 0"):
        bench("step", cycles=0, device="cpu")


def test_a_pass_over_micro_batches_is_timed_with_and_without_the_basis(monkeypatch):
    monkeypatch.setitem(models.SHAPES, "tiny-accumulated", TINY._replace(accumulation=8))
    found = run("pass", size="tiny-accumulated")
    assert "256 tokens a step" in found["title"]
    assert [row["basis"] for row in found["rows"]] == ["none", "eigen"] * 4
