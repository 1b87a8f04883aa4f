"""Mutated recipes of both dialects, mutated overrides: a sentence for each problem, or a recipe; never a traceback."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sophia_integrations.cli import main
from sophia_integrations.errors import RecipeError
from sophia_integrations.recipes.reading.loader import read
from sophia_integrations.recipes.reading.yaml_text import parse, to_yaml

HERE = Path(__file__).parent
GOOD = {
    dialect: yaml.safe_load((HERE / f"broken_{dialect}.yaml").read_text(encoding="utf-8"))["good"]
    for dialect in ("hf", "lightning")
}
PLACE = re.compile(r"(r\.yaml:\d+:\d+: |argument \d+ \()")
FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

symbols = st.sampled_from(
    list("{}[],:&*#?|-<>=!%@`'\"\\\t\n \0\x85\u2028\ufeff") + ["- ", ": ", "!!int ", "&a ", "*a", "<<: "]
)
words = st.sampled_from(
    "framework hf lightning task pretrain classify model config pretrained peft tokenizer data files hub training "
    "optim sophia base trainer class_path init_args callbacks seed_everything sample columns streaming a.b . ..".split()
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(min_value=10**30), st.floats(), st.text(max_size=8), words,
    st.sampled_from(["", "~", "/", "1e-3", "*", "**", "nowhere/**/*.txt", "~nobody/x", "x" * 300, "é\u202e", "a\nb"]),
)  # fmt: skip
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, item in items for place in places(item, (*path, key))]


@st.composite
def mutated_text(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from(list(GOOD.values())))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        text = text[:start] + draw(st.one_of(symbols, words, st.text(max_size=3))) + text[end:]
    return text


@st.composite
def mutated_tree(draw: st.DrawFn, dialect: str) -> str:
    tree = parse(GOOD[dialect], lambda line, column: "").value
    for _ in range(draw(st.integers(1, 3))):
        known = places(tree)
        if not known:
            break
        *path, last = draw(st.sampled_from(known))
        parent = tree
        for key in path:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "delete", "rename", "add"]))
        if action == "delete":
            del parent[last]
        elif action == "replace":
            parent[last] = draw(values)
        elif isinstance(parent, dict):
            value = parent.pop(last) if action == "rename" else draw(values)
            parent[draw(words | st.just(f"{last}s") | st.text(max_size=4))] = value
    return json.dumps(tree, indent=1)


overrides = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.builds(
            "{}={}".format,
            st.one_of(
                words,
                st.sampled_from(
                    ["training.max_steps", "data.files.0", "data.files[1]", "trainer.callbacks.0", "model.x"]
                ),
                st.lists(words, min_size=1, max_size=3).map(".".join),
            ),
            st.one_of(st.text(max_size=6), symbols, values.map(lambda value: json.dumps(value))),
        ),
    ),
    max_size=3,
)


def judged(text: str, *arguments: str) -> None:
    """The text is refused in sentences that begin with a place, or accepted and shown as a recipe again."""
    try:
        Path("r.yaml").write_bytes(text.encode("utf-8"))
    except UnicodeEncodeError:
        Path("r.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        assert main(["validate", "r.yaml"]) == 2
        return
    try:
        checked = read("r.yaml", arguments)
    except RecipeError as error:
        assert error.problems and all(PLACE.match(problem) for problem in error.problems), error.problems
    else:
        Path("again.yaml").write_text(to_yaml(checked.settings), encoding="utf-8")
        again = read("again.yaml")
        assert (again.recipe, again.settings) == (checked.recipe, checked.settings) or "nan" in repr(checked)


@FEW
@given(mutated_text())
def test_mutated_text(text: str) -> None:
    judged(text)


@FEW
@given(mutated_tree("hf"))
def test_mutated_recipes(text: str) -> None:
    judged(text)


@FEW
@given(mutated_tree("lightning"))
def test_mutated_lightning_configs(text: str) -> None:
    judged(text)


@FEW
@given(st.sampled_from(list(GOOD.values())), overrides)
def test_mutated_overrides(text: str, arguments: list[str]) -> None:
    judged(text, *arguments)


@settings(FEW, max_examples=30)
@given(st.lists(st.one_of(st.text(max_size=6), st.sampled_from(["validate", "show", "ls", "-h", "r.yaml", "a=1"]))))
def test_the_command_line_ends_with_a_code(words: list[str]) -> None:
    for verb in ("show", "validate"):
        assert main([verb, *words]) in (0, 2)
