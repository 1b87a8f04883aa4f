"""A tiny recipe over the tiny corpus, shared by all tests of recipes, and the command line in a subprocess."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from warm import Process as WarmProcess
from warm import start

ROOT = Path(__file__).parents[2]
Process = subprocess.Popen[str] | WarmProcess
TIME_LIMIT = 120  # seconds for one subprocess, on a busy machine

RECIPE = """\
# dropout stays at its default of 0.1, so that exactness covers the random state
framework: hf
task: pretrain
model: {{config: {{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 32, n_positions: 32}}}}
tokenizer: {{train: {{vocab_size: 300}}}}
data:
  files: ["{corpus}/*.txt"]
  block_size: 32
  validation_fraction: 0.3
training:
  optim: sophia
  optim_args: rho=0.05,hessian_interval=4,beta1=0.9
  learning_rate: 5e-3
  max_steps: 120
  per_device_train_batch_size: 4
  logging_steps: 5
  eval_strategy: steps
  eval_steps: 20
  save_steps: 10
  save_total_limit: 3
  use_cpu: true
  seed: 1
sample: {{prompt: "one", max_new_tokens: 8}}
"""


@pytest.fixture(autouse=True)
def quiet_place(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPHIA_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def recipe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe folder") / "tiny.yaml"
    path.write_text(RECIPE.format(corpus=corpus), encoding="utf-8")
    return path


class Sophia:
    """The command ``sophia`` as a process of its own, outside the checkout."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def start(
        self,
        *arguments: object,
        cwd: Path,
        processes: int = 1,
        launcher: list[str] | None = None,
        warm: bool = True,
        **options: Any,
    ) -> Process:
        """Starts ``sophia arguments…`` in the folder `cwd`, under torchrun when there are several processes.

        Without `warm` it is a new interpreter; else a fork of one that has imported already.
        """
        if launcher is None and processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {
            **os.environ,
            "SOPHIA_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        words = [*(launcher or []), "-m", "sophia_integrations", *arguments]
        return start(words, cwd=cwd, env=environment, warm=warm, **options)

    def finish(self, process: Process) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a process that must end in time."""
        try:
            out, err = process.communicate(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        return process.returncode, out, err

    def wait_for(self, condition: Callable[[], bool], process: Process) -> None:
        """Waits until `condition` holds; fails when the process ends before."""
        until = time.monotonic() + TIME_LIMIT
        while not condition():
            if process.poll() is not None or time.monotonic() > until:
                process.kill()
                pytest.fail(f"ended before the condition held: {process.communicate()}")
            time.sleep(0.005)


@pytest.fixture(scope="session")
def sophia(cache: Path) -> Sophia:
    return Sophia(cache)
