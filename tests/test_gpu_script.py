"""The script for a machine with a GPU, in miniature without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "measurements" / "gpu.py"


def run(folder, *arguments):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--out", str(folder / "gpu.json"), *arguments]
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env={**os.environ, "PYTHONPATH": path})
    return done, json.loads((folder / "gpu.json").read_text()) if (folder / "gpu.json").exists() else None


def test_the_parts_about_the_step_run_in_miniature(tmp_path):
    done, results = run(tmp_path, "--only", "machine,step,graph")
    assert done.returncode == 0, json.dumps(results, indent=1) + done.stderr
    assert set(results) == {"machine", "step", "graph"}
    assert all(result["figures"] for result in results.values())
    for size in ("10M", "124M"):
        assert results["step"]["figures"][f"{size} bfloat16, SophiaG / AdamW"] > 0
        assert f"{size} float32, SophiaG, ms" in done.stdout


def test_the_parts_about_training_run_in_miniature(tmp_path):
    """In one process, which imports the frameworks once."""
    done, _ = run(tmp_path, "--part", "pass,trainer,lightning,compile,eigen")
    assert done.returncode == 0, done.stderr
    said = [json.loads(line.split(": ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("figures: ")]
    figures = {name: value for line in said for name, value in line.items()}
    assert {"adamw, median ms", "eigen, share of the pass", "largest difference of losses"} <= set(figures)
    for precision in ("bf16", "bf16-mixed", "bf16-true"):
        first, last = figures[f"{precision}, first and last loss"]
        assert last < first
    assert figures["eigen, highest, loss after 3 steps"] > 0


def test_a_part_that_fails_leaves_the_others_alone(tmp_path):
    done, results = run(tmp_path, "--only", "machine,graph", "--seconds", "15.5")
    assert done.returncode == 1
    assert results["machine"]["figures"]["torch"] and "failed" not in results["machine"]
    assert results["graph"] == {"seconds": 0.0, "figures": {}, "failed": "no time was left"}


def test_a_part_that_is_not_there(tmp_path):
    done, results = run(tmp_path, "--only", "machine,nothing")
    assert done.returncode == 1 and results is None
    assert done.stderr.startswith("no part nothing; there are machine, tests, step")
