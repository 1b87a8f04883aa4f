"""One run in two processes: the same losses, one log, one stop, one sentence for a mistake, one exit code."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from support import run_worker
from torch.distributed import HashStore

from sophia_integrations.errors import UserError
from sophia_integrations.recipes.running import processes
from sophia_integrations.recipes.running.events import read_metrics
from sophia_integrations.recipes.running.train import train

STEPS = 20
SETTINGS = [
    f"training.max_steps={STEPS}",
    "training.logging_steps=1",
    "training.dataloader_drop_last=true",  # an incomplete last batch of an epoch is filled up when it is divided
    *(f"model.config.{name}=0.0" for name in ("resid_pdrop", "attn_pdrop", "embd_pdrop")),
]
ADAMW = [*SETTINGS, "training.optim=adamw_torch", "training.optim_args=null"]

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*"),
]


def losses(folder: Path) -> list[tuple[int, str, float]]:
    return [
        (event["step"], name, event[name])
        for event in read_metrics(folder / "metrics.jsonl")
        for name in ("loss", "eval_loss")
        if name in event
    ]


def last_step(folder: Path) -> int:
    return max((event["step"] for event in read_metrics(folder / "metrics.jsonl")), default=0)


def children_of(process: Any) -> list[int]:
    """The processes that torchrun has started, in the order of their ranks."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def assert_stopped(folder: Path, out: str) -> None:
    """One checkpoint, of the step that was said, with what both processes put into it."""
    stopped = re.search(r"^Stopped at step (\d+) of 120, checkpoint saved in ", out, re.M)
    assert stopped, out
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{stopped[1]}"]
    assert len(list(folder.glob("checkpoint-*/rng_state_*.pth"))) == 2


ACCELERATE = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
    "--dynamo_backend=no", "--main_process_port=0",
]  # fmt: skip


@pytest.fixture(scope="session")
def two(recipe: Path, sophia: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """An uninterrupted run in two processes: its folder and what it printed."""
    place = tmp_path_factory.mktemp("two processes")
    code, out, err = sophia.finish(sophia.start("train", recipe, *ADAMW, cwd=place, processes=2, warm=False))
    assert code == 0, err
    return place / "runs" / "tiny", out, err


def test_two_processes_have_the_losses_of_one_with_the_same_batch(two: tuple[Path, str, str], recipe: Path) -> None:
    one = train(recipe, [*ADAMW, "training.per_device_train_batch_size=8"], say=lambda line: None).folder
    assert [key for *key, _ in losses(one)] == [key for *key, _ in losses(two[0])]
    assert [loss for *_, loss in losses(two[0])] == pytest.approx([loss for *_, loss in losses(one)], abs=2e-5)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two[0])]
    assert summaries[0]["tokens"] == summaries[1]["tokens"] == STEPS * 8 * 32


def test_two_processes_print_and_write_once(two: tuple[Path, str, str]) -> None:
    folder, out, err = two
    lines = out.splitlines()
    for begin in ("train: ", "model: ", "training in ", "train loss ", "Everything is in ", f"step {STEPS}/{STEPS}  v"):
        assert sum(line.startswith(begin) for line in lines) == 1, begin
    assert err == ""
    assert len(losses(folder)) == len(set(losses(folder))) == STEPS + 1
    assert len(list((folder / "tensorboard").glob("events*"))) == 1
    newest = folder / f"checkpoint-{STEPS}"
    assert sorted(path.name for path in newest.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]


def test_ctrl_c_stops_both_at_one_step_and_the_run_goes_on_exactly(
    two: tuple[Path, str, str], recipe: Path, sophia: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "tiny"
    process = sophia.start("train", recipe, *ADAMW, cwd=tmp_path, processes=2)
    sophia.wait_for(lambda: last_step(folder) >= 3, process)
    for worker in children_of(process):  # Ctrl-C on a terminal reaches every process
        os.kill(worker, signal.SIGINT)
    _, out, err = sophia.finish(process)
    assert out.count("Stopped at step ") == 1 and err.count("Stopping after this step …") == 1
    assert "exitcode  : 130" in err
    said = "the run in .* trains with 2 processes, and this is 1: .* Go on with --nproc 2"
    with pytest.raises(UserError, match=said):
        train(recipe, ADAMW, say=lambda line: None)
    code, out, err = sophia.finish(sophia.start("train", recipe, *ADAMW, cwd=tmp_path, processes=2))
    assert code == 0, err
    assert out.count("resuming from ") == 1
    assert losses(folder) == losses(two[0])


def test_accelerate_launch_trains_with_sophia(recipe: Path, sophia: Any, tmp_path: Path) -> None:
    settings = [*SETTINGS, "training.max_steps=4"][1:]
    code, out, err = sophia.finish(sophia.start("train", recipe, *settings, cwd=tmp_path, launcher=ACCELERATE))
    assert code == 0, err
    one = train(recipe, [*settings, "training.per_device_train_batch_size=8", "run_dir=one"], say=lambda line: None)
    folder = tmp_path / "runs" / "tiny"
    # From the second step on the labels that the pass draws differ, and with them h.
    assert losses(folder)[0] == (1, "loss", pytest.approx(losses(one.folder)[0][2], abs=2e-6))
    assert [loss for *_, loss in losses(folder)] == pytest.approx([loss for *_, loss in losses(one.folder)], rel=5e-3)
    assert json.loads((folder / "summary.json").read_text())["hessian_updates"] == 1


def test_a_mistake_is_said_once(recipe: Path, sophia: Any, tmp_path: Path) -> None:
    """One that shows when the trainer is built; test_nproc.py has one that shows when the recipe is read."""
    overrides = ["training.optim_args=null", "training.optim=lion_8bit"]
    code, _, err = sophia.finish(sophia.start("train", recipe, *overrides, cwd=tmp_path, processes=2))
    assert code != 0
    assert err.count("training.optim, training.optim_args: ") == 1
    assert "exitcode  : 2" in err and "recipes/running" not in err  # torchrun's own report, no traceback of ours


def test_who_has_nothing_to_say_ends_after_who_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun ends all as soon as one has ended."""
    store, waited = HashStore(), []
    monkeypatch.setattr(processes, "_connect", lambda rank, count: store)
    monkeypatch.setattr(processes.time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="a mistake"), processes.Processes().speaking_once():
        raise UserError("a mistake")
    assert not waited
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), processes.Processes().speaking_once():
        raise UserError("a mistake")
    assert sum(waited) >= 2
    waited.clear()
    with pytest.raises(SystemExit):
        processes.Processes().first(lambda: None)
    assert sum(waited) >= 2


def test_a_killed_process_ends_the_run(recipe: Path, sophia: Any, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    process = sophia.start("train", recipe, cwd=tmp_path, processes=2)
    sophia.wait_for(lambda: last_step(folder) >= 5, process)
    children = children_of(process)
    os.kill(children[1], signal.SIGKILL)
    code, out, err = sophia.finish(process)
    assert code != 0
    assert "recipes/running" not in err
    assert "Everything is in" not in out
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_a_signal_to_one_process_stops_both_at_one_step(recipe: Path, sophia: Any, tmp_path: Path) -> None:
    """One checkpoint, of the step that was said, with what both processes put into it."""
    folder = tmp_path / "runs" / "tiny"
    process = sophia.start("train", recipe, "training.save_strategy=no", cwd=tmp_path, processes=2)
    sophia.wait_for(lambda: last_step(folder) >= 5, process)
    os.kill(children_of(process)[1], signal.SIGTERM)
    _, out, err = sophia.finish(process)
    assert "exitcode  : 143" in err
    stopped = re.search(r"^Stopped at step (\d+) of 120, checkpoint saved in ", out, re.M)
    assert stopped, out
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{stopped[1]}"]
    assert len(list(folder.glob("checkpoint-*/rng_state_*.pth"))) == 2


def test_processes_that_cannot_be_connected_are_a_sentence(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"^WORLD_SIZE is 2, but the 2 processes cannot be connected \(.*MASTER_ADDR"):
        train(recipe, say=lambda line: None)


def test_nothing_holds_the_process_group_when_a_run_has_ended(recipe: Path, tmp_path: Path, cache: Path) -> None:
    """Whatever does would end gloo's threads while the interpreter exits, which now and then aborts a complete run."""
    done = run_worker("recipe_leaves", recipe, *ADAMW[1:], "training.max_steps=2", processes=2)
    assert done.stdout.count("held by 0") == 2, done.stdout
