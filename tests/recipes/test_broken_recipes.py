"""The table of broken recipes: each kind of mistake, in both dialects; every problem at once, each with its place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sophia_integrations.errors import RecipeError
from sophia_integrations.recipes.reading.loader import read

TABLES = {
    dialect: yaml.safe_load((Path(__file__).parent / f"broken_{dialect}.yaml").read_text(encoding="utf-8"))
    for dialect in ("hf", "lightning")
}
NINE_TIMES = [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9) if i else 'a'}]" for i in range(9)]
LONG = {"<bomb>": "\n".join(["task: pretrain", *NINE_TIMES]), "<nines>": "9" * 1001, "<brackets>": "[" * 2000}
LIGHT = """
import json, os, sys
from sophia_integrations.recipes.reading.loader import read
from sophia_integrations.errors import RecipeError
found = {}
for file in sorted(os.listdir()):
    if file.endswith(".case"):
        os.replace(file, "r.yaml")
        try:
            read("r.yaml")
        except RecipeError as error:
            found[file] = error.problems
heavy = {"torch", "transformers", "accelerate", "lightning", "jsonargparse", "datasets", "numpy", "peft"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
print(json.dumps(found))
"""


def cases(*dialects: str) -> list[Any]:
    return [
        pytest.param(TABLES[dialect]["good"], case["change"], case["says"], id=f"{dialect}: {name}")
        for dialect in dialects
        for name, case in TABLES[dialect]["broken"].items()
    ]


def broken(good: str, change: list[list[str]]) -> str:
    for old, new in change:
        assert old in good
        for short, text in LONG.items():
            new = new.replace(short, text)
        good = good.replace(old, new, 1)
    return good


def assert_said(problems: list[str], says: list[str]) -> None:
    assert len(problems) == len(says), problems
    for problem, wanted in zip(problems, says, strict=True):
        place, _, part = wanted.partition(" … ")
        assert problem.startswith(f"r.yaml:{place} ") and part in problem, problem


@pytest.mark.parametrize(("good", "change", "says"), cases("hf"))
def test_each_mistake_has_its_sentence(good: str, change: list[list[str]], says: list[str]) -> None:
    Path("r.yaml").write_text(broken(good, change), encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        read("r.yaml")
    assert str(error.value) == "\n".join(error.value.problems)
    assert_said(error.value.problems, says)


def test_mistakes_are_found_without_importing_anything_heavy_or_of_the_recipe(tmp_path: Path) -> None:
    for dialect in TABLES:  # the first call imports the frameworks, to learn their words
        Path("r.yaml").write_text(TABLES[dialect]["good"], encoding="utf-8")
        read("r.yaml")
    expected = {}
    for number, case in enumerate(cases(*TABLES)):
        good, change, says = case.values
        (tmp_path / f"{number:03}.case").write_text(broken(good, change), encoding="utf-8")
        expected[f"{number:03}.case"] = says
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == expected.keys()
    for name, says in expected.items():
        assert_said(found[name], says)


@pytest.mark.parametrize("dialect", TABLES)
def test_the_recipe_that_is_broken_is_a_good_one(dialect: str) -> None:
    Path("r.yaml").write_text(TABLES[dialect]["good"], encoding="utf-8")
    read("r.yaml")
