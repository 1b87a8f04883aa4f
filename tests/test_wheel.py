"""The built wheel: it carries the recipes inside the package, and they work from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "sophia_integrations/recipes/library/"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_it_holds_one_package_with_every_recipe(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"sophia_integrations"}
    recipes = {path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}
    assert recipes and {f"{LIBRARY}{name}" for name in recipes} <= set(names)
    assert f"{LIBRARY}schema-hf.json" in names
    assert "sophia_integrations/optim/native_step.c" in names
    assert not [name for name in names if name.startswith(LIBRARY) and name.endswith(".py")]


def test_its_recipes_work_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(place)
    elsewhere = tmp_path / "some where"
    elsewhere.mkdir()

    def sophia(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "sophia_integrations", *words],
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": str(place), "SOPHIA_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = [line.split()[0] for line in sophia("ls").splitlines()[1:]]
    assert listed == sorted(
        path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in (ROOT / "recipes").rglob("*.yaml")
    )
    assert "task: pretrain\n" in sophia("show", "hf/pretrain-gpt2-stdlib")
    assert sophia("cp", "hf/pretrain-gpt2-stdlib", "own.yaml") == "own.yaml\n"
    own = (elsewhere / "own.yaml").read_text(encoding="utf-8")
    assert f"$schema={place / LIBRARY / 'schema-hf.json'}\n" in own
    assert sophia("validate", "own.yaml") == "own.yaml: valid\n"
