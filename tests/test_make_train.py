"""The README's first command, as a user types it, with fewer steps."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEPS = 12


def test_make_train(tmp_path):
    run = tmp_path / "run"
    arguments = f"training.max_steps={STEPS} training.warmup_steps=2 training.logging_steps=2 run_dir={run}"
    arguments += " data.validation_fraction=0.01"
    command = ["make", "train", f"VENV={os.path.relpath(sys.prefix, ROOT)}", f"ARGS={arguments}"]
    environment = {**os.environ, "SOPHIA_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(
        ["timeout", "-k", "5", "240", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [e for e in events if "loss" in e]
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    assert all(0 <= e["sophia/win_rate"] <= 1 for e in training)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["hessian_updates"] == math.ceil(STEPS / 10)
    assert (run / "loss.png").stat().st_size > 10_000
    assert f"Everything is in {run}" in result.stdout
