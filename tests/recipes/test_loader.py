"""Recipes that are wrong: every problem at once, each with its place, in words that say what to do."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sophia_integrations.errors import RecipeError, UserError
from sophia_integrations.recipes.reading.loader import check, read
from sophia_integrations.recipes.reading.schema import Recipe
from sophia_integrations.recipes.reading.yaml_places import parse

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

BROKEN = {
    "misspelt key": ("learning_rate: 1e-3", "learning_rat: 1e-3", [
        "r.yaml:8:3: training.learning_rat: unknown key, did you mean 'learning_rate'?",
    ]),
    "misspelt section": ("training:", "trainning:", [
        "r.yaml:1:1: the key 'training' is missing",
        "r.yaml:6:1: trainning: unknown key, did you mean 'training'?",
    ]),
    "wrong type": ("learning_rate: 1e-3", "learning_rate: fast", [
        "r.yaml:8:18: training.learning_rate: expected a number, found 'fast' (text)",
    ]),
    "whole number": ("learning_rate: 1e-3", "max_steps: 2.5", [
        "r.yaml:8:14: training.max_steps: expected a whole number, found 2.5",
    ]),
    "yaml 1.1 word": ("learning_rate: 1e-3", "bf16: yes", [
        "r.yaml:8:9: training.bf16: expected true or false, found 'yes' (text)",
    ]),
    "out of range": ("learning_rate: 1e-3", "max_steps: 0", [
        "r.yaml:8:14: training.max_steps: expected at least 1, found 0",
    ]),
    "not finite": ("1e-3", ".nan", ["r.yaml:8:18: training.learning_rate: expected a finite number, found nan"]),
    "unknown word": ("learning_rate: 1e-3", "eval_strategy: stepss", [
        "r.yaml:8:18: training.eval_strategy: 'stepss' is not known, did you mean 'steps'?",
    ]),
    "unknown optimizer": ("optim: sophia", "optim: sofia", [
        "r.yaml:7:10: training.optim: 'sofia' is not known, did you mean 'sophia'?",
    ]),
    "sophia argument": ("learning_rate: 1e-3", "optim_args: roh=0.1", [
        "r.yaml:8:15: training.optim_args: unknown argument 'roh' of Sophia, did you mean 'rho'? Known: rho, eps, "
        "beta1, beta2, hessian_interval, hessian_fraction, hessian_units, hessian_seed, "
        "hessian_probes.",
    ]),
    "adam argument": ("learning_rate: 1e-3", "adam_beta1: 0.9", [
        "r.yaml:8:3: training.adam_beta1: has no effect with optim: sophia; use beta1, beta2, eps in optim_args",
    ]),
    "ours to set": ("learning_rate: 1e-3", "output_dir: x", [
        "r.yaml:8:3: training.output_dir: the run folder is set by run_dir, at the top level",
    ]),
    "combination": ("learning_rate: 1e-3", "dataloader_prefetch_factor: 2", [
        "r.yaml:8:3: training.dataloader_prefetch_factor: --dataloader_prefetch_factor can only be set when data is "
        "loaded in a different process, i.e. when --dataloader_num_workers > 0.",
    ]),
    "given twice": ("learning_rate: 1e-3", "optim: adamw_torch", [
        "r.yaml:8:3: training.optim: this key is given twice (first at r.yaml:7:3); keep one",
    ]),
    "framework": ("framework: hf", "framework: jax", ["r.yaml:1:12: framework: expected 'hf', found 'jax' (text)"]),
    "model key": ("n_layer: 1", "n_layers: 1", [
        "r.yaml:3:36: model.config.n_layers: unknown key, did you mean 'n_layer'?",
    ]),
    "model type": ("model_type: gpt2", "model_type: gtp2", [
        "r.yaml:3:30: model.config.model_type: 'gtp2' is no causal language model of transformers, "
        "did you mean 'gpt2'?",
    ]),
    "long block": ("block_size: 64", "block_size: 2000", [
        "r.yaml:5:43: data.block_size: 2000 is longer than the model's context of 1024 tokens",
    ]),
    "small vocabulary": ("vocab_size: 300", "vocab_size: 200", [
        "r.yaml:4:33: tokenizer.train.vocab_size: expected at least 257, found 200",
    ]),
    "two sources": ("source: python-stdlib", "source: python-stdlib, files: ['*']", [
        "r.yaml:5:1: data: give either 'source' or 'files', both are given",
    ]),
    "no source": ("source: python-stdlib, ", "", [
        "r.yaml:5:1: data: give either 'source' or 'files', neither is given",
    ]),
    "no such file": ("source: python-stdlib", "files: ['no such *']", [
        "r.yaml:5:16: data.files[0]: no file matches 'no such *' (looked from the current folder)",
    ]),
    "section is no mapping": ("{source: python-stdlib, block_size: 64}", "python-stdlib", [
        "r.yaml:5:7: data: expected a mapping of keys, found 'python-stdlib' (text)",
    ]),
    "yaml syntax": ("task: pretrain", "task: pretrain: x", [
        "r.yaml:2:15: not valid YAML: mapping values are not allowed here",
    ]),
    "bare star": ("source: python-stdlib", "files: [*.txt]", [
        "r.yaml:5:17: not valid YAML: expected alphabetic or numeric character, but found '.'; put quotes around text "
        "that begins with '*' or '&'",
    ]),
    "python object": ("task: pretrain", "task: !!python/object/apply:os.getcwd []", [
        "r.yaml:2:7: task: the tag tag:yaml.org,2002:python/object/apply:os.getcwd is not allowed here",
        "r.yaml:2:7: task: expected 'pretrain', found null",
    ]),
}  # fmt: skip


def problems(text: str, folder: Path, *overrides: str) -> list[str]:
    file = folder / "r.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        check(read(file, overrides))
    assert str(error.value) == "\n".join(error.value.problems)
    return [problem.replace(str(file), "r.yaml") for problem in error.value.problems]


def load(text: str, folder: Path, *overrides: str) -> Recipe:
    file = folder / "r.yaml"
    file.write_text(text, encoding="utf-8")
    return check(read(file, overrides))


@pytest.mark.parametrize("name", BROKEN)
def test_each_mistake_has_its_sentence(name: str, tmp_path: Path) -> None:
    good, bad, expected = BROKEN[name]
    assert good in GOOD
    assert problems(GOOD.replace(good, bad), tmp_path) == expected


def test_all_problems_come_at_once_in_the_order_of_the_text(tmp_path: Path) -> None:
    text = GOOD.replace("task: pretrain", "task: sing").replace("n_layer", "n_layr").replace("1e-3", "x")
    found = problems(text, tmp_path, "training.max_stps=5", "sample.prompt=3", "oops")
    assert [line.split(" ", 1)[0] for line in found] == [
        "r.yaml:2:7:", "r.yaml:3:36:", "r.yaml:8:18:", "argument", "argument", "argument",
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
        ("framework=", "argument 1 (framework=): framework: expected 'hf', found null"),
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
    assert parsed.problems == ["1:4: a[0]: an alias may not contain itself"]


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
        check(read(file))


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "pretrain.yaml").write_text(GOOD)
    with pytest.raises(UserError) as error:
        read(tmp_path / "pretain.yaml")
    assert str(error.value) == (
        f"{tmp_path / 'pretain.yaml'}: there is no such recipe; the nearest one here is {tmp_path / 'pretrain.yaml'}"
    )


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "hf").glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_names_its_command(file: Path) -> None:
    check(read(file))
    assert f"#   sophia train recipes/hf/{file.name}" in file.read_text(encoding="utf-8").splitlines()


def test_the_twins_differ_in_optimizer_and_learning_rate_only() -> None:
    sophia, adamw = (
        check(read(ROOT / "recipes" / "hf" / f"pretrain-gpt2-stdlib{suffix}.yaml")).model_dump()
        for suffix in ("", "-adamw")
    )
    for recipe in (sophia, adamw):
        for key in ("optim", "optim_args", "learning_rate", "adam_beta1", "adam_beta2"):
            recipe["training"].pop(key, None)
    assert sophia == adamw
