"""Data sets by hub id or folder: files read as they stand, splits as `datasets` writes them, kept for use offline."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from text_rows import KINDS, UNIFORM, train_values, write

from sophia_integrations.errors import UserError
from sophia_integrations.text.source import load_source

DECLARED = """\
---
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': bad, '1': good}}}}
---
"""


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a data set's repository with one file for each split."""

    def make(kind: str, rows: list[dict[str, Any]], readme: str = "") -> Path:
        place = tmp_path / f"{kind} data"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for name in ("train", "test"):
            write(place / f"{name}.{kind}", rows)
        if readme:
            (place / "README.md").write_text(readme)
        return place

    return make


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_the_hub(kind: str, streaming: bool, folder: Callable[..., Path]) -> None:
    texts = [text for text in UNIFORM if not (kind == "csv" and "\0" in text)]
    for text in ("2024-01-01", "007", "true", "NA", "1.50"):
        hub = {"path": str(folder(kind, [{"text": text, "more": 1}] * 3)), "validation_split": "test"}
        assert train_values(load_source(hub=hub, streaming=streaming)) == [{"text": text}] * 3
    rows = [{"text": text} for text in texts]
    hub = {"path": str(folder(kind, rows)), "split": "train[:5]", "validation_split": "test[:2]"}
    source = load_source(hub=hub, streaming=streaming)
    assert train_values(source) == rows[:5] and len(source.validation.rows) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folder_of_compressed_files(kind: str, streaming: bool, folder: Callable[..., Path]) -> None:
    rows = [{"text": text} for text in ("007", "2024-01-01", "NA")]
    place = folder(kind, rows)
    for path in list(place.iterdir()):
        (place / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert train_values(load_source(hub={"path": str(place), "validation_split": "test"}, streaming=streaming)) == rows


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_folder_that_declares_its_columns(kind: str, folder: Callable[..., Path]) -> None:
    rows = [{"text": "2024-01-01", "label": label} for label in ("bad", "good", "1")]
    hub = {"path": str(folder(kind, rows, DECLARED)), "validation_split": "test"}
    source = load_source(hub=hub, task="classify")
    assert source.labels == ["bad", "good"] and source.label_counts == [1, 2]
    assert train_values(source) == [{"text": "2024-01-01", "label": number} for number in (0, 1, 1)]


def test_a_folder_names_its_files_and_fields(folder: Callable[..., Path]) -> None:
    place = folder("json", [])
    for name in ("train", "test"):
        (place / f"{name}.json").write_text('{"version": 1, "data": [{"text": "2024-01-01"}, {"text": "NA"}]}')
    configs = "---\nconfigs:\n- {config_name: default, field: data}\n---\n"
    (place / "README.md").write_text(configs)
    hub = {"path": str(place), "validation_split": "test"}
    for streaming in (False, True):
        assert train_values(load_source(hub=hub, streaming=streaming)) == [{"text": "2024-01-01"}, {"text": "NA"}]
    with pytest.raises(UserError, match=r"split 'dev' cannot be loaded: Unknown split \"dev\""):
        load_source(hub={**hub, "split": "dev"})
    (place / "README.md").write_text(configs.replace("field: data", "field: rows"))
    with pytest.raises(UserError, match=r"train\.json: cannot be read as json: there is no list of rows under 'rows'$"):
        load_source(hub=hub)


def fetched(place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `place` what the hub's own client has fetched of someone/rows, in the layout that it writes."""
    from huggingface_hub import constants

    snapshot = cache / "datasets--someone--rows" / "snapshots" / "0123456789012345678901234567890123456789"
    shutil.copytree(place, snapshot)
    (cache / "datasets--someone--rows" / "refs").mkdir()
    (cache / "datasets--someone--rows" / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_the_hub_are_kept_for_use_offline(
    kind: str, folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched(folder(kind, [{"text": "2024-01-01", "more": "007"}] * 2), tmp_path / "hub cache", monkeypatch)
    source = load_source(hub={"path": "someone/rows", "validation_split": "test"})
    assert train_values(source) == [{"text": "2024-01-01"}] * 2
    numbered = load_source(hub={"path": "someone/rows", "validation_split": "test"}, columns={"text": "more"})
    assert train_values(numbered) == [{"text": "007"}] * 2


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_what_datasets_kept_whole_comes_before_files_of_which_some_may_be_missing(
    kind: str, folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `datasets` guesses no type; JSON is read from its files."""
    import datasets

    place = folder(kind, [{"text": "whole"}] * 3).rename(tmp_path / "rows")
    datasets.load_dataset(str(place), cache_dir=str(tmp_path / "made"))
    (made,) = (path.parent for path in (tmp_path / "made").rglob("dataset_info.json"))
    shutil.copytree(made, tmp_path / "data sets" / "someone___rows" / "default" / "0.0.0" / made.name)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data sets")
    fetched(folder(kind, [{"text": "fetched"}]), tmp_path / "hub cache", monkeypatch)
    source = load_source(hub={"path": "someone/rows", "validation_split": "test"})
    expected = [{"text": "whole"}] * 3 if kind == "parquet" else [{"text": "fetched"}]
    assert train_values(source) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_text_files_has_a_row_a_line(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data sets")
    place = tmp_path / "lines"
    place.mkdir()
    for name in ("train", "test"):
        (place / f"{name}.txt").write_text("007\n2024-01-01\nNA\n")
    hub = {"path": str(place), "split": "train[:2]", "validation_split": "test"}
    source = load_source(hub=hub, streaming=streaming)
    assert train_values(source) == [{"text": "007"}, {"text": "2024-01-01"}]
    assert list(source.train.rows)[1]["place"] == f"data.hub {place} (train[:2]), row 2"


def test_splits_may_be_joined(folder: Callable[..., Path]) -> None:
    rows = [{"text": f"{number}"} for number in range(10)]
    hub = {"path": str(folder("csv", rows)), "split": "test[80%:] + train[:3]", "validation_split": "test[:1]"}
    assert train_values(load_source(hub=hub)) == [*rows[8:], *rows[:3]]
    with pytest.raises(UserError, match="a streamed split is cut as NAME"):
        load_source(hub=hub, streaming=True)
