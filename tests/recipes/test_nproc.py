"""``sophia train --nproc N``: one run in N processes of this machine, with one exit code and nothing said twice."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

FEW = ["training.max_steps=4", "training.eval_strategy=no", "sample=null"]


def test_several_processes_train_one_run(recipe: Path, sophia: Any, tmp_path: Path) -> None:
    process = sophia.start("train", recipe, *FEW, "--nproc", 2, cwd=tmp_path, warm=False)
    code, out, err = sophia.finish(process)
    assert (code, err) == (0, "")
    assert out.count("Everything is in ") == 1
    assert json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())["tokens"] == 4 * 2 * 4 * 32


def test_a_mistake_is_said_once(recipe: Path, sophia: Any, tmp_path: Path) -> None:
    code, _, err = sophia.finish(sophia.start("train", recipe, "training.max_stps=4", "--nproc", 2, cwd=tmp_path))
    assert code == 2
    assert err.count("did you mean 'max_steps'?") == 1 and len(err.splitlines()) == 1


def test_ctrl_c_stops_the_run_with_a_checkpoint(recipe: Path, sophia: Any, tmp_path: Path) -> None:
    process = sophia.start("train", recipe, "--nproc", 2, cwd=tmp_path)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    sophia.wait_for(lambda: metrics.is_file() and metrics.stat().st_size > 0, process)
    process.send_signal(signal.SIGINT)
    code, out, _ = sophia.finish(process)
    assert code == 130
    assert out.count("Stopped at step ") == 1 and "Everything is in" not in out
