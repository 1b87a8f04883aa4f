"""The command ``sophia``: fast help, one clear message for a mistake, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sophia_integrations import __version__
from sophia_integrations.cli import main

RECIPE = """\
framework: hf
task: pretrain
model: {config: {model_type: gpt2}}
tokenizer: {train: {vocab_size: 300}}
data: {source: python-stdlib, block_size: 64}
training: {optim: sophia}
"""


@pytest.fixture(autouse=True)
def empty_place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPHIA_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys; from sophia_integrations.cli import main\n"
        "assert main(['--help']) == 0 == main(['--version']) == main(['train', '--help'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml', 'jsonschema', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    for verb in ("ls", "show", "cp", "validate", "train", "prepare", "run", "plot", "schema"):
        assert f"  {verb}  " in done.stdout


def test_checking_a_recipe_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sophia_integrations.cli import main\n"
        "for name in ('hf/pretrain-gpt2-stdlib', 'lightning/pretrain-gpt2-stdlib'):\n"
        "    assert main(['validate', name]) == 0 == main(['show', name])\n"
        "assert main(['ls']) == 0 == main(['schema'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'lightning', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for name in ("hf/pretrain-gpt2-stdlib", "lightning/pretrain-gpt2-stdlib"):
        assert main(["validate", name]) == 0  # the first call after an upgrade learns the frameworks' words
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sophia-integrations {__version__}\n"


def test_no_verb_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "validate" in "".join(capsys.readouterr())


def test_validate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("r.yaml").write_text(RECIPE)
    assert main(["validate", "r.yaml", "training.max_steps=5"]) == 0
    assert capsys.readouterr().out == "r.yaml: valid\n"
    assert main(["validate", "r.yaml", "training.max_stps=5"]) == 2
    assert capsys.readouterr().err == (
        "argument 1 (training.max_stps=5): training.max_stps: unknown key, did you mean 'max_steps'?\n"
    )
    assert not (tmp_path / "runs").exists() and not (tmp_path / "unused").exists()


def test_a_missing_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe-one.yaml").write_text(RECIPE)
    assert main(["train", "recipe-on.yaml"]) == 2
    assert capsys.readouterr().err == (
        "recipe-on.yaml: there is no such recipe; the nearest one is recipe-one.yaml (sophia ls)\n"
    )


def test_a_missing_package_names_the_extra() -> None:
    Path("r.yaml").write_text(RECIPE)
    words = ["train", os.path.abspath("r.yaml"), f"run_dir={os.path.abspath('run')}"]
    code = "import sys; sys.modules['tensorboard'] = None\nfrom sophia_integrations.cli import main\n"
    done = run_python(code + f"sys.exit(main({words}))")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "this needs tensorboard, which is not installed: pip install 'sophia-integrations[recipes]'\n"
    )


@pytest.mark.parametrize("module", ["typer", "yaml", "pydantic", "jsonschema"])
def test_a_package_missing_at_import_names_the_extra(module: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None\nfrom sophia_integrations.cli import main\n"
    done = run_python(code + "sys.exit(main(['validate', 'r.yaml']))")
    assert done.returncode == 2
    assert done.stderr == (f"this needs {module}, which is not installed: pip install 'sophia-integrations[recipes]'\n")


def test_scripts_run_without_the_recipes_extra(tmp_path: Path) -> None:
    Path("script.py").write_text("import sys; print('ran', sys.argv[1:])")
    code = (
        "import sys\nfor name in ('typer', 'click', 'yaml', 'pydantic', 'jsonschema'): sys.modules[name] = None\n"
        "from sophia_integrations.cli import main\n"
        f"assert main(['--version']) == 0 == main(['run', {str(tmp_path / 'script.py')!r}, '--x'])"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ran ['--x']"


def test_plot_reads_a_run_folder_alone(capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("a run")
    run.mkdir()
    assert main(["plot", "a run"]) == 2
    assert "is no run folder: it has no metrics.jsonl" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text("")
    assert main(["plot", "a run"]) == 2
    assert "holds no logged loss" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": null}')
    assert main(["plot", "a run"]) == 2
    assert "holds no finite loss" in capsys.readouterr().err
    events = [{"step": step, "loss": 5 / step, "sophia/win_rate": 0.1 * step} for step in range(1, 6)]
    events += [{"step": 5, "eval_loss": None}, {"step": 5, "eval_loss": 1.2}]
    lines = [json.dumps(event) for event in events]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 6, "lo']))
    assert main(["plot", "a run"]) == 0
    assert capsys.readouterr().out == f"{run / 'loss.png'}\n"
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_outside_the_training_loop(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sophia_integrations.recipes.running.train.train", stop)
    assert main(["train", "r.yaml"]) == 130
    assert capsys.readouterr().err == ("Stopped; whatever was saved is kept. To go on, run the same command again.\n")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("trian r.yaml", ["trian", "Did you mean 'train'?"]),
        ("train r.yaml --frsh", ["--frsh", "--fresh"]),
        ("train", ["RECIPE"]),
        ("train r.yaml --nproc two", ["--nproc"]),
        ("train r.yaml --nproc 0", ["--nproc", "1"]),
        ("schema --framework jax", ["jax", "lightning"]),
    ],
)
def test_a_mistyped_command_names_the_word(words: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert all(part in last for part in parts), last


def test_processes_are_not_started_inside_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "r.yaml", "--nproc", "2"]) == 2
    assert "leave it out under torchrun" in capsys.readouterr().err


def test_options_stand_anywhere_among_the_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(RECIPE)
    overrides = ["training.max_stps=1", "--fresh", "training.seed=x"]
    assert main(["train", "r.yaml", *overrides]) == 2
    assert [line.split(" ", 2)[1] for line in capsys.readouterr().err.splitlines()] == ["1", "2"]


def complete(line: str) -> set[str]:
    """What bash is offered for the last word of a line."""
    words = line.split(" ")
    environment = {
        **os.environ,
        "_SOPHIA_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "import sys; from sophia_integrations.cli import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_a_shell_completes_verbs_recipes_and_options() -> None:
    Path("own.yaml").write_text(RECIPE)
    assert complete("sophia val") == {"validate"}
    assert {"--fresh", "--dry-run", "--nproc"} <= complete("sophia train --")
    assert complete("sophia train own") == {"own.yaml"}
    assert {"hf/pretrain-gpt2-stdlib", "hf/pretrain-gpt2-stdlib-adamw"} <= complete("sophia train hf/pre")


@pytest.mark.parametrize("module", ["lightning", "datasets"])
def test_a_package_missing_in_a_verb_names_its_extra(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError(f"No module named '{module}.x'", name=f"{module}.x")

    monkeypatch.setattr("sophia_integrations.recipes.running.train.train", missing)
    assert main(["train", "r.yaml"]) == 2
    extra = "lightning" if module == "lightning" else "recipes"
    assert capsys.readouterr().err == (
        f"this needs {module}, which is not installed: pip install 'sophia-integrations[{extra}]'\n"
    )


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "import sys; from sophia_integrations.cli import main; sys.exit(main(['schema']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()
