"""Reading recipes: places and order of problems, overrides, bases, scalars, the two dialects."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from sophia_integrations.errors import RecipeError, UserError
from sophia_integrations.recipes.reading.loader import read
from sophia_integrations.recipes.reading.schema import Recipe
from sophia_integrations.recipes.reading.yaml_text import parse

GOOD = """\
framework: hf
task: pretrain
model: {config: {model_type: gpt2, n_layer: 1}}
tokenizer: {train: {vocab_size: 300}}
data: {source: python-stdlib, block_size: 64}
training:
  optim: sophia
  learning_rate: 1e-3
"""


def problems(text: str, folder: Path, *overrides: str) -> list[str]:
    file = folder / "r.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        read(file, overrides)
    assert str(error.value) == "\n".join(error.value.problems)
    return [problem.replace(str(file), "r.yaml") for problem in error.value.problems]


def load(text: str, folder: Path, *overrides: str) -> Recipe:
    file = folder / "r.yaml"
    file.write_text(text, encoding="utf-8")
    return read(file, overrides).recipe


def test_all_problems_come_at_once_in_the_order_of_the_text(tmp_path: Path) -> None:
    text = GOOD.replace("task: pretrain", "task: sing").replace("n_layer", "n_layr").replace("1e-3", "x")
    found = problems(text, tmp_path, "training.max_stps=5", "sample.prompt=3", "oops")
    assert [line.split(" ", 1)[0] for line in found] == [
        "r.yaml:2:1:", "r.yaml:3:36:", "r.yaml:8:3:", "argument", "argument", "argument",
    ]  # fmt: skip
    assert found[3:] == [
        "argument 1 (training.max_stps=5): training.max_stps: unknown key, did you mean 'max_steps'?",
        "argument 2 (sample.prompt=3): sample.prompt: expected text, found 3",
        "argument 3 (oops): expected key=value with dots in the key, such as training.max_steps=50",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "training.optim.x=1",
            "argument 1 (training.optim.x=1): training.optim holds a value, it has no keys below it",
        ),
        (
            "training..x=1",
            "argument 1 (training..x=1): expected key=value with dots in the key, such as training.max_steps=50",
        ),
        (
            "run_dir=[",
            "argument 1 (run_dir=[): not valid YAML: expected the node content, but found '<stream end>'; "
            "if it is meant as text, write it as run_dir='\"…\"'",
        ),
        ("run_dir=''", "argument 1 (run_dir=''): run_dir: expected some text, found '' (text)"),
        ("framework=", "argument 1 (framework=): framework: expected 'hf' or 'lightning', found null"),
        ("sample.prompt.0=x", "argument 1 (sample.prompt.0=x): sample.prompt: expected text, found a mapping of keys"),
        ("base=other.yaml", "argument 1 (base=other.yaml): base: a base is named in the file, not in an argument"),
    ],
)  # fmt: skip
def test_wrong_overrides(override: str, expected: str, tmp_path: Path) -> None:
    assert problems(GOOD, tmp_path, override) == [expected]


def test_an_override_given_twice_is_refused(tmp_path: Path) -> None:
    assert problems(GOOD, tmp_path, "training.seed=1", "training.seed=2") == [
        "argument 2 (training.seed=2): training.seed is already set by argument 1; keep one"
    ]


def test_overrides_split_at_the_first_equals_sign_and_read_numbers(tmp_path: Path) -> None:
    recipe = load(
        GOOD, tmp_path, "training.optim_args=rho=0.1,hessian_interval=5", "training.learning_rate=3e-4",
        'sample.prompt="def f(x):"', "run_dir=a = b/c", "training.save_strategy=no", "model.config.n_layer=2",
    )  # fmt: skip
    assert recipe.training["optim_args"] == "rho=0.1,hessian_interval=5"
    assert recipe.training["learning_rate"] == 3e-4
    assert recipe.training["save_strategy"] == "no"
    assert recipe.sample is not None and recipe.sample.prompt == "def f(x):"
    assert recipe.run_dir == "a = b/c"
    assert recipe.model.config == {"model_type": "gpt2", "n_layer": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E3", 1000.0), ("-.5", -0.5), ("2.", 2.0), ("12", 12), ("0x1F", 31), ("0o17", 15),
        ("017", 17),
        (".inf", math.inf), ("-.inf", -math.inf), ("true", True), ("no", "no"), ("on", "on"), ("1:30", "1:30"),
        ("2026-11-22", "2026-11-22"), ("1_000", "1_000"), ("", None), ("~", None), ("null", None), ('"1"', "1"),
        ("!!str 5", "5"), ("[1, a]", [1, "a"]), ("{a: {b: 1e1}}", {"a": {"b": 10.0}}),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = parse(f"key: {text}", lambda line, column: f"{line}:{column}")
    assert not parsed.problems
    assert parsed.value == {"key": value} and type(parsed.value["key"]) is type(value)


def test_an_alias_that_contains_itself_is_refused() -> None:
    parsed = parse("a: &x [*x]", lambda line, column: f"{line}:{column}")
    assert parsed.value is None and str(parsed.problems[0]).startswith("1:1: not valid YAML: nested too deeply")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"r\.yaml:1:1: the recipe is empty; it needs framework, task, model, tokenizer, data and training$"),
        (b"- a\n", r"r\.yaml:1:1: a recipe is a mapping of keys, such as 'framework: hf'$"),
        (b"a: \xff\n", r"r\.yaml: not UTF-8 text \(byte 3\); a recipe is a YAML file$"),
        (b"a: 1\nb: \x07\n", r"r\.yaml:2:4: not valid YAML: the character U\+0007 is not allowed$"),
        (b"a: 1\n---\nb: 2\n", r"r\.yaml:2:1: not valid YAML: but found another document$"),
    ],
)
def test_files_that_are_no_recipe(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(file)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "pretrain.yaml").write_text(GOOD)
    with pytest.raises(UserError) as error:
        read(tmp_path / "pretain.yaml")
    assert f"there is no such recipe; the nearest one is {tmp_path / 'pretrain.yaml'}" in str(error.value)


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_has_no_light_problem(file: Path) -> None:
    read(file)


def test_the_twins_differ_in_optimizer_and_learning_rate_only() -> None:
    sophia, adamw = (
        read(ROOT / "recipes" / "hf" / f"pretrain-gpt2-stdlib{suffix}.yaml").settings for suffix in ("", "-adamw")
    )
    for recipe in (sophia, adamw):
        for key in ("optim", "optim_args", "learning_rate", "adam_beta1", "adam_beta2"):
            recipe["training"].pop(key, None)
    assert sophia == adamw


LISTS = GOOD.replace("source: python-stdlib", "files: [a.txt, b.txt]")


def test_a_number_in_an_override_counts_the_entries_of_a_list(tmp_path: Path) -> None:
    for name in ("a.txt", "c.txt"):
        (tmp_path / name).write_text("x")
    assert load(LISTS, tmp_path, "data.files.1=c.txt").data.files == ["a.txt", "c.txt"]
    assert load(LISTS, tmp_path, "data.files[1]=c.txt").data.files == ["a.txt", "c.txt"]
    assert problems(LISTS, tmp_path, "data.files.2=c.txt", "data.files.x=c.txt") == [
        "r.yaml:5:23: data.files[1]: no file matches 'b.txt' (looked from the current folder)",
        "argument 1 (data.files.2=c.txt): data.files is a list with 2 entries, counted from 0; it has no '2'",
        "argument 2 (data.files.x=c.txt): data.files is a list with 2 entries, counted from 0; it has no 'x'",
    ]


class TestBase:
    """``base: other.yaml``."""

    def write(self, folder: Path, text: str) -> None:
        (folder / "under").mkdir(exist_ok=True)
        (folder / "under" / "base.yaml").write_text(text, encoding="utf-8")

    def test_mappings_are_merged_and_everything_else_replaced(self, tmp_path: Path) -> None:
        self.write(tmp_path, GOOD + "  label_names: [a, b]\n  logging_steps: 7\n")
        own = "base: under/base.yaml\nmodel: {config: {n_layer: 2}}\ntraining: {label_names: [c], max_steps: 3}\n"
        recipe = load(own, tmp_path, "training.logging_steps=9")
        assert recipe.model.config == {"model_type": "gpt2", "n_layer": 2}
        assert recipe.training == {
            "optim": "sophia", "learning_rate": 1e-3, "label_names": ["c"], "logging_steps": 9, "max_steps": 3,
        }  # fmt: skip

    def test_each_problem_names_the_file_that_it_is_in(self, tmp_path: Path) -> None:
        self.write(tmp_path, GOOD.replace("1e-3", "fast").replace("n_layer", "n_layr"))
        own = "\n" * 9 + "base: under/base.yaml\ntraining:\n  max_stps: 3\n"
        found = problems(own, tmp_path, "training.seed=x")
        base = tmp_path / "under" / "base.yaml"
        assert found == [
            "r.yaml:12:3: training.max_stps: unknown key, did you mean 'max_steps'?",
            f"{base}:3:36: model.config.n_layr: unknown key, did you mean 'n_layer'?",
            f"{base}:8:3: training.learning_rate: expected a number, found 'fast' (text)",
            "argument 1 (training.seed=x): training.seed: expected a whole number, found 'x' (text)",
        ]

    def test_a_section_replaces_one_of_another_kind(self, tmp_path: Path) -> None:
        self.write(tmp_path, GOOD)
        found = problems("base: under/base.yaml\ndata: [1]\n", tmp_path)
        assert found == ["r.yaml:2:1: data: expected a mapping of keys, found a list of 1"]

    def test_a_base_of_a_base_is_refused(self, tmp_path: Path) -> None:
        self.write(tmp_path, "base: deeper.yaml\n" + GOOD)
        base = tmp_path / "under" / "base.yaml"
        assert problems("base: under/base.yaml\n", tmp_path) == [
            f"{base}:1:1: base: a base has no base of its own; write its keys here"
        ]

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("- a\n", "{base}:1:1: a recipe is a mapping of keys"),
            ("a: [\n", "{base}:2:1: not valid YAML: expected the node content, but found '<stream end>'"),
        ],
    )
    def test_a_base_that_is_no_recipe(self, text: str, says: str, tmp_path: Path) -> None:
        self.write(tmp_path, text)
        base = tmp_path / "under" / "base.yaml"
        assert says.format(base=base) in problems("base: under/base.yaml\n", tmp_path)

    def test_null_takes_a_section_away(self, tmp_path: Path) -> None:
        self.write(tmp_path, GOOD + "sample: {prompt: a}\n")
        assert load("base: under/base.yaml\nsample:\n", tmp_path).sample is None


LIGHTNING = """\
model:
  class_path: sophia_integrations.lightning.CausalLM
  init_args: {config: {model_type: gpt2, n_layer: 1}}
trainer: {max_steps: 4, callbacks: [{class_path: lightning.pytorch.callbacks.Timer}]}
"""


def test_a_lightning_config_is_known_by_its_shape_or_its_word(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    for text in (LIGHTNING, f"framework: lightning\n{LIGHTNING}"):
        file.write_text(text)
        checked = read(file, ["trainer.max_steps=5", "trainer.callbacks.0.init_args.interval=epoch"])
        assert checked.recipe is None and checked.settings.keys() == {"model", "trainer"}
        assert checked.settings["trainer"]["max_steps"] == 5
        assert checked.settings["trainer"]["callbacks"][0]["init_args"] == {"interval": "epoch"}


def test_settings_of_a_recipe_are_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    text = GOOD.replace("source: python-stdlib", "files: [a.txt], validation_files: [a.txt]")
    settings = load(text, tmp_path).settings()
    assert Recipe.model_validate(settings).settings() == settings
    assert load(yaml.safe_dump(settings), tmp_path).settings() == settings
