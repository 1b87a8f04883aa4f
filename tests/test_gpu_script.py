"""The script for a machine with a GPU, in miniature without one."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "measurements" / "gpu.py"
PARTS = ("machine", "step", "graph", "pass", "trainer", "lightning", "compile", "eigen")


def run(folder, *arguments):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--out", str(folder / "gpu.json"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    return done, json.loads((folder / "gpu.json").read_text()) if (folder / "gpu.json").exists() else None


def test_every_part_runs_in_miniature(tmp_path):
    done, results = run(tmp_path, "--only", ",".join(PARTS))
    assert done.returncode == 0, json.dumps(results, indent=1) + done.stderr
    assert set(results) == set(PARTS)
    assert all(result["figures"] for result in results.values())
    for size in ("10M", "124M"):
        assert results["step"]["figures"][f"{size} bfloat16, SophiaG / AdamW"] > 0
    assert {"adamw, median ms", "eigen, share of the pass"} <= set(results["pass"]["figures"])
    assert {name.split(",")[0] for name in results["eigen"]["figures"]} == {"adamw", "eigen"}
    assert "10M float32, SophiaG, ms" in done.stdout


def test_a_part_that_fails_leaves_the_others_alone(tmp_path):
    done, results = run(tmp_path, "--only", "machine,graph", "--seconds", "15.5")
    assert done.returncode == 1
    assert results["machine"]["figures"]["torch"] and "failed" not in results["machine"]
    assert results["graph"] == {"seconds": 0.0, "figures": {}, "failed": "no time was left"}


def test_a_part_that_is_not_there(tmp_path):
    done, results = run(tmp_path, "--only", "machine,nothing")
    assert done.returncode == 1 and results is None
    assert done.stderr.startswith("no part nothing; there are machine, tests, step")
