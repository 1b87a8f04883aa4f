"""A whole comparison with real runs: stopped, killed, finished by the same command, and never a run twice."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from sophia_integrations.errors import UserError
from sophia_integrations.recipes.running.events import read_metrics
from sophia_integrations.reports.compare import comparison, price
from sophia_integrations.reports.compare.comparison import compare
from sophia_integrations.reports.compare.dials import dials_of
from sophia_integrations.reports.compare.progress import Progress, in_words
from sophia_integrations.reports.compare.rivals import Side, sides_of
from sophia_integrations.reports.compare.runs import Runs, digest

ROOT = Path(__file__).parents[2]
TIME_LIMIT = 120  # seconds, on a busy machine
RUNS = Path("runs/compare-tiny/runs")
# A test run in the background inherits an ignored SIGINT.
CALL = """\
import signal, sys
from sophia_integrations.reports.compare.comparison import compare
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(compare(**{}))
"""


def start(**arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CALL.format(arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + TIME_LIMIT
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"ended before the condition held: {process.communicate()}")
        time.sleep(0.005)


def reached() -> int:
    """The step of the newest checkpoint of the run that counts."""
    return max((int(path.name.rpartition("-")[2]) for path in RUNS.glob("*seed-1*/checkpoint-*")), default=0)


def log(what: str) -> str:
    (file,) = RUNS.glob(f"*{what}*.log")
    return file.read_text()


def is_locked(folder: Path) -> bool:
    with open(folder / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@pytest.mark.timeout(500)
def test_stopped_killed_and_finished_by_the_same_command(hf_recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = dict(recipe=hf_recipe, against=[hf_recipe], budget=0, seeds="1")

    process = start(**arguments)
    wait_for(reached, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 130, err
    assert "No run has ended yet. The one that was stopped, tiny seed 1 T=120, goes on from its checkpoint." in out
    assert "run the same command again: sophia compare tiny.yaml --against tiny.yaml --budget 0 --seeds 1" in out
    assert "Traceback" not in err
    assert "Stopped at step" in log("seed-1")
    (measured,) = RUNS.glob("*.json")
    assert measured.name.startswith("measured-") and not (RUNS / "measured").exists()
    taken = measured.stat().st_mtime_ns
    stopped = reached()

    process = start(**arguments)
    wait_for(lambda: reached() > stopped, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=TIME_LIMIT)
    (folder,) = (path for path in RUNS.glob("*seed-1*") if path.is_dir())
    until = time.monotonic() + 20
    while is_locked(folder):  # nothing trains on
        assert time.monotonic() < until
        time.sleep(0.05)
    assert list(RUNS.glob("*.json")) == [measured] and read_metrics(folder / "metrics.jsonl")[-1]["step"] < 120

    said: list[str] = []
    assert compare(**arguments, say=said.append) == 0
    out = "\n".join(said)
    assert measured.stat().st_mtime_ns == taken and log("seed-1").count("training in") == 1
    assert log("seed-1").count("resuming from") == 2
    assert not reached() and not list(RUNS.glob("*/model"))
    found = json.loads(Path("runs/compare-tiny/same/compare.json").read_text())
    (verdict,) = found["verdicts"]
    assert verdict["difference"]["value"] == 0.0 and verdict["headline"] == ""
    assert "no headline: one seed" in out and Path("runs/compare-tiny/same/compare.png").is_file()
    tiny = found["sides"]["tiny"]
    assert tiny["flops_per_step"] > tiny["pass_flops_per_step"] > 0
    assert len(tiny["seconds_per_step_of_turns"]) == price.TURNS and tiny["state_bytes_per_parameter"] > 8
    assert found["machine"].keys() == {"device", "cores", "threads", "load"} and found["machine"]["threads"] == 1
    assert f"Timed on {found['machine']['device']}, {os.cpu_count()} core" in out
    assert 0.5 < verdict["seconds"]["value"] < 2.0 and 0 <= tiny["clipped_share"] <= 1

    # Nothing is left to run: the plan and the table come from what is there.
    records = {file: file.stat().st_mtime_ns for file in RUNS.glob("*.json")}
    said.clear()
    assert compare(**arguments, dry_run=True, say=said.append) == 0
    assert len(said) == 1 and "2 runs, which have all ended before: nothing is left to train" in said[0]
    assert "1 run, 1 of them ended before" in said[0] and "ms a step" in said[0]
    assert compare(**arguments, say=said.append) == 0
    assert {file: file.stat().st_mtime_ns for file in RUNS.glob("*.json")} == records


def test_a_lightning_recipe_is_timed_in_turns(lightning_recipe: str) -> None:
    said: list[str] = []
    assert compare(lightning_recipe, budget=0, seeds="1", dry_run=True, say=said.append) == 0
    first, plan = said
    assert first == "A step of each optimizer is measured first."
    assert "2 runs in about" in plan and "adamw (torch's AdamW, fused): 1 run, " in plan
    (measured,) = Path("runs/compare-tiny-lightning/runs").glob("measured-*.json")
    own, adamw = json.loads(measured.read_text())["prices"]
    for one in (own, adamw):
        assert one["together"] and len(one["turns"]) == price.TURNS and min(one["turns"]) > 0
        assert one["evaluation"] > 0 and one["steps_per_epoch"] == 99 and one["machine"]["cores"] == os.cpu_count()
    assert own["flops"] > adamw["flops"] > 0 and own["flops"] > own["pass_flops"] > 0 == adamw["pass_flops"]
    assert own["state_bytes"] > adamw["state_bytes"] >= 8.0


@pytest.mark.slow
def test_a_lightning_recipe_is_trained_and_judged(lightning_recipe: str) -> None:
    text = Path(lightning_recipe).read_text()
    Path(lightning_recipe).write_text(text.replace("max_steps: 120", "max_steps: 40\n  gradient_clip_val: 1.0"))
    assert compare(lightning_recipe, ["adamw"], "half", budget=0, seeds="1") == 0
    found = json.loads(Path("runs/compare-tiny-lightning/half/compare.json").read_text())
    for name, share, steps in (("tiny", "0.5", 20), ("adamw", "1", 40)):
        side = found["sides"][name]
        (run,) = side["finals"][share]
        assert 1.0 < run["loss"] < 6.0 and (run["steps"], run["tokens"]) == (steps, steps * 4 * 16)
        assert 0 <= side["clipped_share"] <= 1 and side["seconds_per_step"] > 0
    (verdict,) = found["verdicts"]
    assert 0.2 < verdict["seconds"]["value"] < 5.0 and verdict["tokens"]["value"] == 0.5


def test_a_run_that_takes_too_long_and_one_that_cannot_begin(tmp_path: Path) -> None:
    said: list[str] = []
    settings = {"framework": "hf", "task": "pretrain"}
    runs = Runs(tmp_path / "limited", said.append, Progress(said.append, show=False), time_limit=0.3)
    assert runs.get(settings, "slow").why == "it took more than 0.3 s"
    assert runs.find(settings).diverged and runs.get(settings, "slow").diverged and runs.executed == 1
    with pytest.raises(UserError, match="(?s)a run of the comparison failed: .*data.* missing.*whole log"):
        Runs(tmp_path / "broken", said.append, Progress(said.append, show=False)).get(settings, "broken")


class _Short:
    """Stands for a short run of which only one at a time has room."""

    running = 0
    period, steps, beginning, ending = 10, 70, 3.0, 1.0

    def __init__(self, side: Side, place: Path, turns: int) -> None:
        self.place, self.costs = place, Path(f"{place}.costs")
        place.mkdir(parents=True, exist_ok=True)
        events = [{"step": 70, "epoch": 0.5, "seconds": 4.0}, {"step": 70, "epoch": 0.5, "seconds": 4.5}]
        (place / "metrics.jsonl").write_text("\n".join(map(json.dumps, events)))
        self.costs.write_text('{"flops": 7.0, "pass_flops": 1.0, "state_bytes": 8.0}')
        _Short.running += 1

    def begin(self) -> None:
        if self.running > 1:
            raise UserError("out of memory")

    def turn(self) -> None:
        time.sleep(0.01)

    def end(self) -> None:
        pass

    def close(self) -> None:
        _Short.running -= 1


def test_what_does_not_fit_together_is_measured_apart_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(price, "ShortRun", _Short)
    settings = {"framework": "hf", "training": {"num_train_epochs": 2}}
    sides, said = [Side("a", settings), Side("b", settings)], []
    prices = price.measure(sides, tmp_path, said.append)
    assert _Short.running == 0 and len(said) == 2 and "each is measured by itself" in said[1]
    for one in prices.values():
        assert not one.together and len(one.turns) == price.TURNS and 0.001 <= one.step < 0.1
        assert (one.evaluation, one.state_bytes, one.steps(settings)) == (0.5, 8.0, 280)
        assert one.seconds(settings) == pytest.approx(4 - 20 * one.step + 280 * one.step)
    assert price.measure(sides, tmp_path, said.append) == prices and len(said) == 2
    assert price.measure(sides[:1], tmp_path, said.append)["a"].together


def test_a_comparison_that_cannot_be_is_refused_before_anything_runs(hf_recipe: str) -> None:
    for arguments, sentence in (
        (dict(against=["adam"]), "--against adam: did you mean adamw"),
        (dict(budget=3), "a budget of 3 runs is too small"),
        (dict(seeds="one"), "--seeds one: expected whole numbers"),
        (dict(seeds="1000"), "1000 is also among the seeds that confirm"),
    ):
        with pytest.raises(UserError, match=sentence):
            compare(hf_recipe, **arguments)
    with pytest.raises(UserError, match="there is no such recipe"):
        compare("nothing.yaml")
    assert not Path("runs").exists()


def test_what_another_command_left_is_kept(hf_recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison._Comparison, "measure", lambda self: None)
    monkeypatch.setattr(comparison._Comparison, "plan", lambda self: "")
    stopped = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(comparison._Comparison, "result", stopped)
    left = Path("runs") / f"compare-{Path(hf_recipe).stem}" / "same"
    left.mkdir(parents=True)
    ours = shlex.join(["sophia", "compare", hf_recipe, "--against", "adamw"])
    for command, kept in ((ours, False), ("sophia compare other.yaml --against lion", True)):
        (left / "compare.json").write_text(json.dumps({"command": command}))
        said: list[str] = []
        assert compare(hf_recipe, dry_run=True, say=said.append) == 0 and (left / "compare.json").exists()
        assert compare(hf_recipe, say=said.append) == 130
        assert (left.with_name("same-2") / "compare.json").exists() == kept
        assert any(f"({command}) is now in {left}-2." in line for line in said) == kept
    assert (left / "protocol.yaml").exists() and not (left / "compare.json").exists()


def test_a_run_is_known_by_all_that_its_recipe_says() -> None:
    one = {"training": {"seed": 1, "learning_rate": 1e-3}, "framework": "hf"}
    assert digest(one) == digest({"framework": "hf", "training": {"learning_rate": 0.001, "seed": 1}})
    assert digest(one) != digest({"framework": "hf", "training": {"learning_rate": 0.001, "seed": 2}})


def test_the_time_left_is_that_of_all_runs(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    progress = Progress(said.append, show=True)
    progress.expect(300.0)
    progress.begin("adamw", 200, 100.0)
    assert (progress.total, progress.left) == (300.0, 200.0)
    progress.at(100)
    progress.say("a line")
    progress.end()
    progress.expect(-100.0)  # one that had ended before
    progress.begin("sophia", 10, 100.0)
    assert (progress.total, progress.left) == (200.0, 0.0)
    progress.close()
    shown = capsys.readouterr().err
    assert "17%" in shown and "50%" in shown and "run 1: adamw, " in shown and "run 2: sophia, " in shown
    assert " left" in shown and said == ["a line"]


@pytest.mark.slow
def test_a_run_that_diverges_is_ended_and_counts(hf_recipe: str, tmp_path: Path) -> None:
    own, adamw = sides_of(hf_recipe, ["adamw"])
    settings = dials_of(adamw.settings).set(adamw.settings, "rate", 1e30)
    runs = Runs(tmp_path, print, Progress(print, show=False))
    run = runs.get(settings, "too fast")
    assert run.diverged and run.why and runs.executed == 1
    assert runs.get(settings, "too fast").why == run.why and runs.executed == 1


def test_durations_in_words() -> None:
    assert [in_words(s) for s in (4.4, 600, 3 * 3600, float("nan"))] == [
        "4 s", "10 min", "3.0 h", "a time that is not known",
    ]  # fmt: skip
