"""Runs that are killed, stopped or starved of disk: never a lost checkpoint, always a way on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import run_worker

from sophia_integrations.errors import UserError
from sophia_integrations.recipes.running.checkpoints import newest_whole, saved_checkpoints
from sophia_integrations.recipes.running.events import read_metrics
from sophia_integrations.recipes.running.train import train

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*"),
]

# Half a megabyte of weights, saved at every step: most of the time goes into checkpoints.
SAVING = [
    "model.config.n_embd=96", "training.max_steps=60", "training.save_steps=1", "training.save_total_limit=2",
    "training.eval_strategy=no",
]  # fmt: skip


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(event["step"], event["loss"]) for event in read_metrics(folder / "metrics.jsonl") if "loss" in event]


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint under its own name."""
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*"))
    return sorted(int(match[1]) for match in found if match)


def test_checkpoints_are_told_by_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "run-7"
    for name in (
        "checkpoint-10",
        "checkpoint-9",
        "checkpoint-best",
        "broken-checkpoint-3",
        "checkpoint-",
        "x-checkpoint-4",
    ):
        (folder / name).mkdir(parents=True)
    assert saved_checkpoints(folder) == [(9, folder / "checkpoint-9"), (10, folder / "checkpoint-10")]
    assert saved_checkpoints(tmp_path / "nothing here") == []


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_while_saving(kills: int, recipe: Path, sophia: Any, tmp_path: Path) -> None:
    undisturbed = train(
        recipe, [*SAVING, "training.save_strategy=no", "run_dir=undisturbed"], say=lambda line: None
    ).folder
    folder, moments, newest = tmp_path / "runs" / "tiny", random.Random(kills), 0
    for _ in range(kills):
        process = sophia.start("train", recipe, *SAVING, cwd=tmp_path)
        sophia.wait_for(lambda newest=newest: (steps(folder) or [0])[-1] > newest, process)
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        _, out, _ = sophia.finish(process)
        assert "Skipping" not in out
        said: list[str] = []
        found = newest_whole(folder, said.append)
        assert not said and found is not None and found.step > newest
        newest = found.step
    process = sophia.start("train", recipe, *SAVING, cwd=tmp_path)
    code, out, err = sophia.finish(process)
    assert code == 0, err
    assert "Skipping" not in out
    assert losses(folder) == losses(undisturbed)
    assert steps(folder) == [59, 60]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [".lock"]


@pytest.mark.parametrize(("start", "stride"), [(20, 8), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_killed_at_each_change_of_the_folder(start: int, stride: int, tmp_path: Path) -> None:
    run_worker("crash_points", tmp_path, start, stride, timeout=400)
    deaths = json.loads((tmp_path / "found.json").read_text())
    assert len(deaths) > (50 if stride == 1 else 5)
    for death in deaths:
        ended = max(death["saved"], default=0)
        assert death["newest"] in (ended, ended + 1), death
        assert not death["said"], death
        assert all(re.fullmatch(r"checkpoint-\d+", name) for name in death["left"]), death
    assert deaths[-1] == {"saved": [1, 2, 3], "newest": 3, "said": [], "left": ["checkpoint-3"]}


def test_the_best_checkpoint_is_named_where_it_stands_and_kept(recipe: Path) -> None:
    settings = [
        "training.max_steps=6", "training.save_steps=1", "training.eval_steps=1", "training.save_total_limit=1",
        "training.load_best_model_at_end=true", "training.metric_for_best_model=loss",
        "training.greater_is_better=true",  # the best is the first
    ]  # fmt: skip
    folder = train(recipe, settings, say=lambda line: None).folder
    newest = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    best = Path(newest["best_model_checkpoint"])
    assert best.parent == folder and best.is_dir() and best == folder / "checkpoint-1"
    saved = [path / "model.safetensors" for path in (best, folder / "model")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
def test_sigterm_saves_then_ctrl_c_with_data_workers_saves_and_all_goes_on_exactly(
    recipe: Path, sophia: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "tiny"
    whole = train(recipe, ["training.eval_strategy=no", "run_dir=whole"], say=lambda line: None).folder
    settings = ["training.eval_strategy=no", "training.dataloader_num_workers=0"]

    def stop(at: int, send: Callable[[Any], None], number: int, **options: Any) -> None:
        process = sophia.start("train", recipe, *settings, cwd=tmp_path, **options)
        sophia.wait_for(lambda: (losses(folder) or [(0, 0.0)])[-1][0] >= at, process)
        send(process)
        code, out, err = sophia.finish(process)
        assert code == 128 + number, err
        assert re.search(r"^Stopped at step (\d+) of 120, checkpoint saved in ", out, re.M)
        assert err.strip().endswith("Stopping after this step …") and "Traceback" not in err

    stop(5, lambda process: process.send_signal(signal.SIGTERM), signal.SIGTERM)
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text(recipe_file.read_text().replace("num_workers: 0", "num_workers: 2"))
    settings[1] = "training.dataloader_num_workers=2"
    # Ctrl-C on a terminal reaches the whole process group.
    stop(40, lambda process: os.killpg(process.pid, signal.SIGINT), signal.SIGINT, start_new_session=True)
    train(recipe, settings, say=lambda line: None)
    assert losses(folder) == losses(whole)


def test_a_second_signal_ends_at_once(recipe: Path, sophia: Any, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("one two three four five six seven eight nine zero\n" * 20_000)
    held = tmp_path / "held.txt"
    held.write_text("one two three four five six seven eight nine zero\n" * 40)
    settings = [
        f"data={{files: ['{text}'], validation_files: ['{held}'], block_size: 32}}",
        "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=100000",  # a step takes long
    ]  # fmt: skip
    process = sophia.start("train", recipe, *settings, cwd=tmp_path)
    events = tmp_path / "runs" / "tiny" / "tensorboard"
    sophia.wait_for(lambda: any(events.glob("events*")), process)  # training has begun
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    code, _, err = sophia.finish(process)
    assert time.monotonic() - began < 5
    assert code == 128 + signal.SIGTERM
    assert err.split() == "Stopping after this step … Stopped at once; the last whole checkpoint is kept.".split()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, bool]]:
    """A disk of 24 MB, and whether it is one: mounting takes rights."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    mounted = bool(shutil.which("mount")) and subprocess.run(mount, capture_output=True, timeout=20).returncode == 0
    yield disk, mounted
    if mounted:
        subprocess.run(["umount", str(disk)], check=True, timeout=20)


def test_a_disk_that_fills_up(recipe: Path, sophia: Any, small_disk: tuple[Path, bool], tmp_path: Path) -> None:
    disk, mounted = small_disk
    folder = disk / "run"
    settings = [*SAVING, f"run_dir={folder}"]
    if mounted:  # something else fills it in the middle of training
        process = sophia.start("train", recipe, *settings, cwd=tmp_path)
        sophia.wait_for(lambda: (steps(folder) or [0])[-1] >= 3, process)
        with contextlib.suppress(OSError), open(disk / "full", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
    else:  # files are cut off at a size, as on a full disk
        process = sophia.start("train", recipe, *settings, cwd=tmp_path, limits=[(resource.RLIMIT_FSIZE, 700_000)])
    code, _, err = sophia.finish(process)
    assert code == 2, err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].endswith("it goes on from the last whole checkpoint")
    said: list[str] = []
    found = newest_whole(folder, said.append)
    assert not said and not (folder / ".saving").exists()
    (disk / "full").unlink(missing_ok=True)
    code, out, err = sophia.finish(sophia.start("train", recipe, *settings, cwd=tmp_path))
    assert code == 0, err
    assert found is None or f"resuming from {found.path}" in out
    assert mounted == (found is not None)


def test_a_disk_that_cannot_be_written(recipe: Path, tmp_path: Path) -> None:
    disk = tmp_path / "read only"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True, timeout=20).returncode == 0
    if not mounted:
        disk.chmod(0o500)
    try:
        with pytest.raises(UserError, match=r"^run folder .*read only/run cannot be written \((Read-only|Permission)"):
            train(recipe, [f"run_dir={disk / 'run'}"], say=lambda line: None)
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True, timeout=20)
