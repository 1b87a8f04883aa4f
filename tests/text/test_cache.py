"""The cache: made once, also by several processes; a disk that is full costs time, never the run."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from text_rows import values

from sophia_integrations.text.cache import cached_table
from sophia_integrations.text.prepare import prepare
from sophia_integrations.text.source import load_source

spawn = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(log: Path, found: Any) -> None:
    from datasets import Features, Value

    def rows(notes: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with open(log, "a") as file:
            file.write("made\n")
        for number in range(3):
            time.sleep(0.1)
            yield {"number": number}
        notes["sum"] = 3

    table, notes = cached_table("numbers", Features({"number": Value("int64")}), rows, "Numbers …", lambda line: None)
    found.put((table["number"][:], notes))


def test_one_of_several_processes_makes_an_entry(tmp_path: Path) -> None:
    log, found = tmp_path / "log", spawn.Queue()
    processes = [spawn.Process(target=make, args=(log, found), daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    assert [found.get(timeout=60) for _ in processes] == [([0, 1, 2], {"sum": 3})] * 3
    for process in processes:
        process.join(60)
    assert log.read_text() == "made\n"


def prepare_rows(files: list[str], words: Any, limit: int, found: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    said: list[str] = []
    source = load_source(files=files, validation_fraction=0.3, say=said.append)
    data = prepare(source, words, block_size=4, say=said.append)
    found.put((values(source.train.rows), data.train[:]["input_ids"].tolist(), said))


def test_a_full_disk_costs_time_only(jsonl: Callable[..., str], words: Any, own_cache: Path) -> None:
    """Files are cut off at a size, as on a full disk."""
    files = [jsonl({"text": f"one two three {word}"} for word in ("four", "five", "six", "seven") * 9)]
    results = []
    for limit in (500, resource.RLIM_INFINITY):
        found = spawn.Queue()
        process = spawn.Process(target=prepare_rows, args=(files, words, limit, found), daemon=True)
        process.start()
        results.append(found.get(timeout=60))
        process.join(60)
        assert bool(list(own_cache.glob("*.arrow"))) == (limit != 500) and not list(own_cache.glob(".*"))
    (rows, items, said), (expected_rows, expected_items, _) = results
    assert (rows, items) == (expected_rows, expected_items)
    assert said.count(f"Cache: {own_cache} cannot be written (File too large); going on without it.") == 3
