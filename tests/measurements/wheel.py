"""Installs the built wheel with its extras into an empty virtual environment and trains a recipe from another folder.

`make wheel-check` runs it: minutes, and a package index within reach.
"""

import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHORT = ["training.max_steps=20", "training.eval_steps=10", "training.save_steps=10", "training.use_cpu=true"]


def run(*command: object, cwd: Path) -> str:
    started = time.monotonic()
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=1500)
    shown = " ".join(Path(str(word)).name if index == 0 else str(word) for index, word in enumerate(command))
    print(f"{time.monotonic() - started:6.1f} s  {shown[:110]}", flush=True)
    if done.returncode:
        sys.exit(f"{shown}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="sophia-wheel-") as name:
        place = Path(name)
        run(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            place,
            ROOT,
            cwd=place,
        )
        (wheel,) = place.glob("*.whl")
        venv.create(place / "venv", with_pip=True)
        python, sophia = place / "venv" / "bin" / "python", place / "venv" / "bin" / "sophia"
        constraints = ROOT / ".ci" / "constraints.txt"
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", constraints]
        run(*install, "torch==2.13.0", f"{wheel}[recipes]", cwd=place)
        elsewhere = place / "another folder"
        elsewhere.mkdir()
        assert "hf/pretrain-gpt2-stdlib" in run(sophia, "ls", cwd=elsewhere)
        run(sophia, "cp", "hf/pretrain-gpt2-stdlib", "own.yaml", cwd=elsewhere)
        run(sophia, "validate", "own.yaml", cwd=elsewhere)
        run(sophia, "train", "own.yaml", "--dry-run", cwd=elsewhere)
        run(sophia, "train", "own.yaml", *SHORT, cwd=elsewhere)
        for part in ("model", "loss.png", "summary.json", "metrics.jsonl"):
            assert (elsewhere / "runs" / "own" / part).exists(), part
        assert "is complete" in run(sophia, "train", "own.yaml", *SHORT, cwd=elsewhere)
        assert str(place / "venv") in run(
            python, "-c", "import sophia_integrations as s; print(s.__file__)", cwd=elsewhere
        )
    print("The wheel installs and trains.")


if __name__ == "__main__":
    main()
