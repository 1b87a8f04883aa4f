"""The command ``sophia``: fast help, one clear message for a mistake, never a traceback."""

from __future__ import annotations

import json
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
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys; from sophia_integrations.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml', 'pydantic', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in ("train", "validate", "plot"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"sophia-integrations {__version__}\n"


def test_no_verb_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2


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
        "recipe-on.yaml: there is no such recipe; the nearest one here is recipe-one.yaml\n"
    )


def test_a_missing_package_names_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    Path("r.yaml").write_text(RECIPE)
    assert main(["validate", "r.yaml"]) == 2
    assert capsys.readouterr().err == (
        "recipes need tensorboard, not installed here: pip install 'sophia-integrations[recipes]'\n"
    )


@pytest.mark.parametrize("module", ["yaml", "pydantic"])
def test_a_package_missing_at_import_names_the_extra(module: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None\nfrom sophia_integrations.cli import main\n"
    done = run_python(code + "sys.exit(main(['validate', 'r.yaml']))")
    assert done.returncode == 2
    assert done.stderr == (f"this needs {module}, which is not installed: pip install 'sophia-integrations[recipes]'\n")


def test_plot_reads_a_run_folder_alone(capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("a run")
    run.mkdir()
    assert main(["plot", "a run"]) == 2
    assert "is no run folder with metrics" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text("")
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
