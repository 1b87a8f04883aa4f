"""The shipped recipes: found by name or path, listed, copied, shown, and described by a schema for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sophia_integrations.cli import main
from sophia_integrations.errors import UserError
from sophia_integrations.recipes import catalog
from sophia_integrations.recipes.reading.loader import read
from sophia_integrations.recipes.reading.schema_cache import document

ROOT = Path(__file__).parents[2]
STDLIB = ROOT / "recipes" / "hf" / "pretrain-gpt2-stdlib.yaml"


@pytest.mark.parametrize(
    "wanted",
    ["hf/pretrain-gpt2-stdlib", "hf/pretrain-gpt2-stdlib.yaml", "recipes/hf/pretrain-gpt2-stdlib.yaml", str(STDLIB)],
)
def test_a_recipe_has_a_name_and_a_path(wanted: str) -> None:
    assert catalog.find(wanted) == STDLIB


def test_a_file_of_the_users_comes_first() -> None:
    own = Path("recipes/hf/pretrain-gpt2-stdlib.yaml")
    own.parent.mkdir(parents=True)
    own.write_text("framework: hf\n")
    assert catalog.find(str(own)) == own
    assert catalog.find("hf/pretrain-gpt2-stdlib") == STDLIB


def test_the_last_part_of_a_name_is_enough_where_no_other_ends_so(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"hf/one": Path("1"), "hf/two": Path("2"), "lightning/two": Path("3")}
    monkeypatch.setattr(catalog, "names", lambda: known)
    assert catalog.find("one") == Path("1")
    with pytest.raises(UserError, match=r"^two: several recipes have this name: hf/two, lightning/two; give the whole"):
        catalog.find("two")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("hf/pretrain-gpt2-stdlb", r"there is no such recipe; the nearest one is hf/pretrain-gpt2-stdlib \(sophia ls"),
        ("a\0b", "there is no such recipe"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_is_no_recipe(wanted: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        catalog.find(wanted)


def test_a_folder_is_no_recipe() -> None:
    with pytest.raises(UserError, match=r"^\.: cannot be read: Is a directory$"):
        read(".")


def test_ls_says_what_each_recipe_is_and_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "TASK", "FRAMEWORK", "SIZE", "TIME", "NEEDS"]
    assert [row.split()[0] for row in rows] == list(catalog.names())
    row = next(row for row in rows if row.startswith("hf/pretrain-gpt2-stdlib "))
    assert "pretrain" in row and "CPU" in row and "offline" in row


@pytest.mark.parametrize("entry", catalog.entries(), ids=lambda entry: entry.name)
def test_every_header_says_what_the_recipe_is_and_how_to_run_it(entry: catalog.Entry) -> None:
    assert entry.title.endswith(".") and entry.size and entry.time and entry.needs
    assert entry.task == (read(entry.file).settings.get("task") or entry.task)
    text = entry.file.read_text(encoding="utf-8")
    assert any(line.startswith(f"#   sophia train recipes/{entry.name}.yaml") for line in text.splitlines())


def test_cp_copies_a_recipe_with_its_base_and_never_overwrites(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cp", "hf/pretrain-gpt2-stdlib", "mine/own.yaml"]) == 0
    assert capsys.readouterr().out == "mine/own.yaml\n"
    text = Path("mine/own.yaml").read_text(encoding="utf-8")
    assert f"# yaml-language-server: $schema={STDLIB.parents[1]}/schema-hf.json\n" in text
    read("mine/own.yaml")
    assert main(["cp", "hf/pretrain-gpt2-stdlib", "mine/own.yaml"]) == 2
    assert capsys.readouterr().err == (
        "mine/own.yaml is already there; choose another place: sophia cp hf/pretrain-gpt2-stdlib DEST\n"
    )
    assert main(["cp", "hf/pretrain-gpt2-stdlib"]) == 0
    assert Path("pretrain-gpt2-stdlib.yaml").is_file()


def test_cp_lays_the_base_beside_the_recipe() -> None:
    Path("from/under").mkdir(parents=True)
    Path("from/under/base.yaml").write_text(STDLIB.read_text(encoding="utf-8"))
    Path("from/own.yaml").write_text("base: under/base.yaml  # what it is laid over\nsample: null\n")
    Path("to").mkdir()
    assert catalog.copy("from/own.yaml", "to") == [Path("to/own.yaml"), Path("to/base.yaml")]
    copied = read("to/own.yaml").settings
    assert copied["task"] == "pretrain" and "sample" not in copied
    assert catalog.copy("from/own.yaml", "to/other.yaml") == [Path("to/other.yaml")]


def test_a_recipe_does_not_take_the_name_of_its_base() -> None:
    Path("to").mkdir()
    written = catalog.copy("compare/gpt2-5m", "to/mine.yaml")
    assert written == [Path("to/mine.yaml"), Path("to/pretrain-gpt2-stdlib.yaml")]
    assert read("to/mine.yaml").settings["model"]["config"]["n_embd"] == 256
    with pytest.raises(UserError, match=r"^to/pretrain-gpt2-stdlib\.yaml is the name of the recipe's base"):
        catalog.copy("compare/gpt2-5m", "to/pretrain-gpt2-stdlib.yaml")


def test_a_base_of_the_same_name_is_not_overwritten() -> None:
    Path("from/under").mkdir(parents=True)
    Path("from/under/base.yaml").write_text("framework: hf\n")
    Path("from/own.yaml").write_text("base: under/base.yaml\n")
    Path("base.yaml").write_text("something else\n")
    with pytest.raises(UserError, match=r"^base\.yaml is already there"):
        catalog.copy("from/own.yaml")
    assert not Path("own.yaml").exists()


def test_an_adamw_twin_is_copied_with_its_base() -> None:
    assert main(["cp", "hf/pretrain-gpt2-stdlib-adamw", "here.yaml"]) == 0
    assert Path("pretrain-gpt2-stdlib.yaml").is_file()
    assert read("here.yaml").settings["training"]["optim"] == "adamw_torch_fused"


def test_show_prints_a_recipe_with_its_base_arguments_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    Path("base.yaml").write_text(STDLIB.read_text(encoding="utf-8"))
    Path("own.yaml").write_text("base: base.yaml\ntraining:\n  max_steps: 7\n")
    assert main(["show", "own.yaml", "training.seed=3"]) == 0
    shown = capsys.readouterr().out
    assert {"  max_steps: 7", "  seed: 3", "task: pretrain", "    min_frequency: 2"} <= set(shown.splitlines())
    Path("again.yaml").write_text(shown)
    assert read("again.yaml").recipe == read("own.yaml", ["training.seed=3"]).recipe


def test_show_refuses_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "hf/pretrain-gpt2-stdlib", "training.max_stps=7"]) == 2
    assert "did you mean 'max_steps'?" in capsys.readouterr().err


class TestSchema:
    """recipes/schema-hf.json and schema-lightning.json, which the recipes point editors to."""

    @pytest.mark.parametrize("framework", ["hf", "lightning"])
    def test_it_is_up_to_date(self, framework: str) -> None:
        made, held = document(framework), shipped(framework)
        if made["$comment"] != held["$comment"]:  # made with other versions: only our own keys are compared
            made, held = (own(schema) for schema in (made, held))
        assert made == held, f"run: sophia schema --framework {framework} recipes/schema-{framework}.json"

    @pytest.mark.parametrize("entry", catalog.entries(), ids=lambda entry: entry.name)
    def test_recipes_fit_it_and_point_to_it(self, entry: catalog.Entry) -> None:
        jsonschema.validate(read(entry.file).settings, shipped(entry.framework))
        line = f"# yaml-language-server: $schema=../schema-{entry.framework}.json"
        assert line in entry.file.read_text(encoding="utf-8").splitlines()

    @pytest.mark.parametrize(("key", "value"), [("optim", "sofia"), ("max_steps", "x"), ("max_stps", 3)])
    def test_it_knows_typos(self, key: str, value: Any) -> None:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"framework": "hf", "training": {key: value}}, shipped("hf"))

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("trainer", "max_stps"), 3),
            (("trainer", "max_steps"), "x"),
            (("trainr",), {}),
            (("model", "init_arg"), {}),
            (("model", "init_args", "warmup"), 3),
            (("model", "init_args", "schedule"), "cosin"),
            (("model", "init_args", "optimizer", "init_args", "roh"), 0.1),
            (("data", "init_args", "blocksize"), 128),
            (("trainer", "callbacks", 0, "init_args"), {"fractoin": 0.5}),
        ],
        ids=str,
    )
    def test_it_knows_typos_in_lightning(self, path: tuple[str | int, ...], value: Any) -> None:
        recipe = read("lightning/pretrain-gpt2-stdlib").settings
        jsonschema.validate(recipe, shipped("lightning"))
        place = recipe
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(recipe, shipped("lightning"))

    def test_a_class_of_the_users_own_may_have_any_argument(self) -> None:
        own = {"model": {"class_path": "mine.Model", "init_args": {"width": 3}}}
        jsonschema.validate(own, shipped("lightning"))

    def test_it_is_written_to_a_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["schema"]) == 0
        assert json.loads(capsys.readouterr().out)["properties"]["training"]["properties"]["optim"]
        assert main(["schema", "--framework", "lightning", "s.json"]) == 0
        assert json.loads(Path("s.json").read_text())["properties"]["trainer"]["properties"]["max_steps"]


def own(schema: Any) -> Any:
    """What a schema says of our own keys."""
    definitions = {name: part for name, part in schema["$defs"].items() if name in ("Data", "Tokenizer", "Sample")}
    return schema["properties"].keys(), definitions


def shipped(framework: str) -> Any:
    return json.loads((ROOT / "recipes" / f"schema-{framework}.json").read_text(encoding="utf-8"))
