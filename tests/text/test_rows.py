"""Rows of files and of data set repositories: read, checked, named in messages, split by content."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from text_rows import values

from sophia_integrations.errors import UserError
from sophia_integrations.text.source import Source, load_source

ROWS = [{"text": f"text {number}", "label": number % 3} for number in range(60)]


def contents(source: Source, split: str) -> list[dict[str, Any]]:
    return values(getattr(source, split).rows)


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    import datasets

    path = folder / f"rows.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "csv":
        lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    source = load_source(files=[write(tmp_path, kind, ROWS)], task="classify", validation_fraction=0.2)
    found = contents(source, "train") + contents(source, "validation")
    assert sorted(row["text"] for row in found) == sorted(row["text"] for row in ROWS)
    assert source.labels == ["0", "1", "2"] and sum(source.label_counts) == len(source.train.rows)
    assert all(source.label_numbers[json.dumps(row["label"])] == int(row["text"].split()[1]) % 3 for row in found)
    assert 3 < len(source.validation.rows) < 25


def test_cells_of_a_csv_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\nNA,007\n"3, or so",none\n3,NA\n')
    source = load_source(files=[f"{tmp_path}/a.csv"], task="classify", validation_files=[_held(tmp_path)])
    assert contents(source, "train") == [
        {"text": "NA", "label": "007"}, {"text": "3, or so", "label": "none"}, {"text": "3", "label": "NA"},
    ]  # fmt: skip


def _held(folder: Path) -> str:
    (folder / "held.csv").write_text("text,label\nheld,none\n")
    return str(folder / "held.csv")


def test_rows_are_split_by_content(jsonl: Callable[..., str]) -> None:
    rows = [{"text": f"text {number % 100}"} for number in range(300)]
    source = load_source(files=[jsonl(rows)], validation_fraction=0.2)
    train, held = ({row["text"] for row in contents(source, split)} for split in ("train", "validation"))
    assert not train & held and len(train | held) == 100 and 8 < len(held) < 35
    assert len(source.train.rows) == 3 * len(train)
    more = load_source(files=[jsonl([*rows[:50], {"text": "new"}, *rows[50:]])], validation_fraction=0.2)
    assert {row["text"] for row in contents(more, "validation")} - {"new"} == held
    assert more.digest != source.digest


def test_empty_rows_are_left_out_and_counted(jsonl: Callable[..., str]) -> None:
    source = load_source(files=[jsonl([{"text": ""}, *ROWS, {"text": ""}])], validation_fraction=0.2)
    assert source.train.empty + source.validation.empty == 2
    assert len(source.train.rows) + len(source.validation.rows) == 60


def test_columns_may_have_other_names(jsonl: Callable[..., str]) -> None:
    file = jsonl([{"question": f"q {n}", "answer": f"a {n}", "more": 1} for n in range(40)])
    columns = {"prompt": "question", "completion": "answer"}
    source = load_source(files=[file], task="finetune", columns=columns, validation_fraction=0.2)
    assert source.format == "prompt-completion"
    assert set(contents(source, "train")[0]) == {"prompt", "completion"}
    with pytest.raises(UserError) as error:
        load_source(files=[file], task="finetune", columns={"prompt": "question", "completion": "reply"})
    assert str(error.value) == (
        f"data.columns.completion: data.files ({file}) has no column 'reply'; its columns are question, answer, more"
    )


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        ({"text": 3}, "pretrain", "the text is 3, expected text"),
        ({"text": None}, "pretrain", "the text is missing, expected text"),
        ({"prompt": "a", "completion": " "}, "seq2seq", "the completion is empty"),
        ({"prompt": ["a"], "completion": "b"}, "seq2seq",
         "the prompt is ['a'], expected text (format chat reads messages)"),
        ({"text": "a", "label": 0.5}, "classify", "the label is 0.5, expected text or a whole number"),
        ({"text": "a", "label": None}, "classify", "the label is missing, expected text or a whole number"),
        ({"text": "", "label": 1}, "classify", "the text is empty"),
        ({"messages": []}, "finetune", "messages is [], expected a list of {role, content}"),
        ({"messages": [{"role": "user", "content": "a"}]}, "finetune",
         "no message is the assistant's, so there is nothing to learn"),
        ({"messages": [{"role": "user", "content": None}]}, "finetune",
         "message 1 is {'role': 'user', 'content': None}, expected a role and a content of text"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(row: dict[str, Any], task: str, message: str, jsonl: Callable[..., str]) -> None:
    good = {
        "text": "a", "label": 1, "prompt": "a", "completion": "b",
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    }  # fmt: skip
    good = {part: good[part] for part in row}
    file = jsonl([good, row, good])
    with pytest.raises(UserError) as error:
        load_source(files=[file], task=task)
    hint = "data.bad_rows: skip leaves such rows out"
    assert str(error.value) == f"1 of 3 rows is bad: {file}, row 2: {message}; {hint}"
    other = {**good, "label": 2} if "label" in good else good
    source = load_source(files=[file], validation_files=[jsonl([other], "held.jsonl")], task=task, bad_rows="skip")
    assert contents(source, "train") == [good, good] and source.bad.first == [f"{file}, row 2: {message}"]


def test_a_bad_row_is_counted_in_its_own_file(jsonl: Callable[..., str], tmp_path: Path) -> None:
    good, bad = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}
    for number in range(3):
        jsonl([good] * 3 if number < 2 else [good, bad], f"{number}.jsonl")
    with pytest.raises(UserError, match=r"2\.jsonl, row 2: the completion is empty"):
        load_source(files=["*.jsonl"], task="seq2seq")
    (tmp_path / "held").mkdir()
    held = jsonl([good], "held/held.jsonl")
    source = load_source(files=["*.jsonl"], validation_files=[held], task="seq2seq", streaming=True)
    places = [row["place"] for row in source.train.rows]
    assert places[-1].endswith("2.jsonl, row 2") and places[3].endswith("1.jsonl, row 1")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', r"^1 of 2 rows is bad: .*a\.jsonl, row 2: the line is not JSON: "),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', r"a\.jsonl, row 2: a row is an object, such as \{\"text\": \"…\"\}"),
        ("a.jsonl", "", r"^data\.files \(.*a\.jsonl\): there are no rows$"),
        ("a.json", "[1", r"a\.json: cannot be read as json: "),
        ("a.csv", "text\na\nb,c\n", r"a\.csv: cannot be read as csv: .*line 3"),
        ("a.parquet", "nothing", r"a\.parquet: cannot be read as parquet: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    name: str, text: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_source(files=[str(tmp_path / name)], say=lambda line: None)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_columns_are_found_by_name_in_every_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,1\n")
    (tmp_path / "b.csv").write_text("label,text\n2,b\n")
    (tmp_path / "c.csv").write_text("other,label\nc,1\n")
    options = {"task": "classify", "validation_files": [_held(tmp_path)], "bad_rows": "skip"}
    source = load_source(files=[f"{tmp_path}/?.csv"], **options)
    assert contents(source, "train") == [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]
    assert source.bad.first == [f"{tmp_path}/c.csv, row 1: the text is missing, expected text"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [([1, 1], "every row has the label 1; a classification needs at least two"),
     (["a", 1], "some labels are text and some are numbers; make them all the same")],
)  # fmt: skip
def test_labels_must_be_classes(labels: list[Any], message: str, jsonl: Callable[..., str]) -> None:
    file = jsonl([{"text": f"{n} {label}", "label": label} for n in range(20) for label in labels])
    with pytest.raises(UserError, match=re.escape(message)):
        load_source(files=[file], task="classify", validation_fraction=0.3)


def test_labels_are_sorted_as_what_they_are(jsonl: Callable[..., str]) -> None:
    def labels(values: list[Any]) -> Any:
        rows = [{"text": f"{n} {value}", "label": value} for n in range(20) for value in values]
        return load_source(files=[jsonl(rows)], task="classify", validation_fraction=0.3).labels

    assert labels(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert labels(["10", "9", "b"]) == ["10", "9", "b"]
    assert labels([7, 2]) == ["2", "7"] and labels([True, False]) == ["False", "True"]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A data set repository: Parquet files with named labels, and a README that names two configurations."""
    import datasets

    folder = tmp_path / "some data"
    folder.mkdir()
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    for split, count in (("train", 40), ("test", 10), ("big", 30)):
        rows = [{"text": f"{split} {number}", "label": number % 2} for number in range(count)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - {split: train, path: train.parquet}\n"
        "  - {split: test, path: test.parquet}\n- config_name: big\n  data_files: big.parquet\n---\n# Some data\n"
    )
    return folder


def test_a_data_set_repository_is_read(repository: Path) -> None:
    hub = {"path": str(repository), "name": "small", "validation_split": "test"}
    source = load_source(hub=hub, task="classify")
    assert (len(source.train.rows), len(source.validation.rows)) == (40, 10)
    assert source.labels == ["no", "yes"] and source.label_counts == [20, 20]
    part = load_source(hub={**hub, "split": "train[:25%]"}, task="classify")
    assert len(part.train.rows) == 10
    big = load_source(hub={"path": str(repository), "name": "big"}, validation_fraction=0.2)
    assert len(big.train.rows) + len(big.validation.rows) == 30
    assert source.train.rows[0]["place"] == f"{repository}/train.parquet, row 1"


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        ({"name": "medium"}, r"'medium', split 'train' cannot be loaded: BuilderConfig 'medium' not found"),
        ({"name": "small", "split": "dev"}, r"'small', split 'dev' cannot be loaded: Unknown split \"dev\""),
        ({"path": "nobody/nothing"}, "data.hub: 'nobody/nothing', split 'train' cannot be loaded: "),
        ({}, r"cannot be loaded: .*(Config name is missing|small)"),
    ],
)
def test_what_a_repository_lacks_is_named(hub: dict[str, str], message: str, repository: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_source(hub={"path": str(repository), **hub})
    assert "\n" not in str(error.value)


def test_streams_need_what_they_cannot_find_out(jsonl: Callable[..., str], repository: Path) -> None:
    with pytest.raises(UserError, match="cannot be split while it streams; name the held-out rows in data"):
        load_source(files=[jsonl(ROWS)], streaming=True)
    hub = {"path": str(repository), "name": "small", "validation_split": "test"}
    with pytest.raises(UserError, match=r"a streamed split is cut as NAME\[:ROWS\], found 'test\[:1%\]'"):
        load_source(hub={**hub, "validation_split": "test[:1%]"}, streaming=True)
    source = load_source(hub={**hub, "validation_split": "test[:3]"}, streaming=True)
    assert [row["text"] for row in contents(source, "validation")] == ["test 0", "test 1", "test 2"]
    assert sorted(row["text"] for row in contents(source, "train")) == sorted(f"train {n}" for n in range(40))


def test_a_cache_that_cannot_be_written_costs_time_only(
    jsonl: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "file" / "cache"))
    assert len(load_source(files=[jsonl(ROWS)], validation_fraction=0.2).train.rows) > 30


def test_a_table_is_read_and_checked_once(
    jsonl: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sophia_integrations.text import formats

    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "cache"))
    file, said, problem, checked = jsonl(ROWS), list[str](), formats.problem, list[Any]()
    monkeypatch.setattr(formats, "problem", lambda *row: checked.append(row) or problem(*row))

    def load(**settings: Any) -> Source:
        return load_source(files=[file], task="classify", say=said.append, **{"validation_fraction": 0.2, **settings})

    first, again = load(), load()
    assert said == [f"Rows: reading data.files ({file}) …"] and len(checked) == 60
    assert again.digest == first.digest and again.label_counts == first.label_counts
    assert [contents(again, split) for split in ("train", "validation")] == [
        contents(first, split) for split in ("train", "validation")
    ]
    assert load(validation_fraction=0.3).digest != first.digest and len(checked) == 60
    jsonl([*ROWS[1:], {"text": "another", "label": 0}])
    assert load().digest != first.digest and len(checked) == 120


def test_the_library_that_reads_rows_may_be_missing(jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="this needs datasets, which is not installed: pip install 'sophia-"):
        load_source(files=[jsonl(ROWS)])
