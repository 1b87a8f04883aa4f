"""Processes that begin with what is slow to import already there, for the tests whose point is not the start itself.

One server per test process imports `IMPORTS` once; each process is a fork of it (`multiprocessing`'s forkserver) that
takes on a folder, an environment, files for its output and a command line of its own, and runs as ``python`` would.
What torchrun's agent starts there (also under ``accelerate launch`` and ``sophia --nproc``) is forked from the agent.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).parent
IMPORTS = [
    "datasets",
    "peft",
    "lightning.pytorch.loggers",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.launcher.api",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "sophia_integrations.cli.commands",
    "sophia_integrations.lightning",
    "sophia_integrations.recipes.catalog",
    "sophia_integrations.recipes.running.lightning_run",
    "sophia_integrations.recipes.running.train",
    "sophia_integrations.recipes.running.trainer_run",
    "support",
]
_context = multiprocessing.get_context("forkserver")


class _Process:
    """A process of `multiprocessing` with what the tests and torchrun's agent use of `subprocess.Popen`."""

    def __init__(self, context, target, *arguments):
        self._process = context.Process(target=target, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.returncode


class Process(_Process):
    """``python WORDS…`` as a fork of the server.

    Args:
        words: what follows ``python``: a script or ``-m`` and a module, and its arguments.
        cwd, env: the folder and the whole environment it runs in.
        start_new_session: whether it leads a session and process group of its own.
        limits: (resource, number) of `resource.setrlimit`.
    """

    def __init__(
        self,
        words: Iterable[object],
        *,
        cwd: str | Path,
        env: Mapping[str, str],
        start_new_session: bool = False,
        limits: Iterable[tuple[int, int]] = (),
    ) -> None:
        self._output = tempfile.TemporaryDirectory()
        self._files = [Path(self._output.name) / name for name in ("out", "err")]
        for file in self._files:
            file.touch()
        _context.set_forkserver_preload(IMPORTS)
        begin = (list(map(str, words)), str(cwd), dict(env), list(map(str, self._files)), start_new_session)
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(TESTS), *sys.path])):
            super().__init__(_context, _begin, *begin, list(limits))  # the first starts the server
        atexit.register(self._process.kill)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end; standard output and standard error. Raises `subprocess.TimeoutExpired`."""
        self.wait(timeout)
        atexit.unregister(self._process.kill)
        out, err = (file.read_text() for file in self._files)
        self._output.cleanup()
        return out, err


def start(
    words: Iterable[object], *, cwd: str | Path, env: Mapping[str, str], warm: bool = True, **options: object
) -> Process | subprocess.Popen[str]:
    """``python WORDS…``: a `Process`, with its `options`, or a new interpreter where `warm` is False."""
    if warm:
        return Process(words, cwd=cwd, env=env, **options)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, env=env, text=True, **pipes)


class _Rank(_Process):
    """What torchrun's agent calls `Popen` for: ``python -u WORDS…`` with all that has been imported so far."""

    def __init__(self, args, env, start_new_session, **files):
        super().__init__(multiprocessing.get_context("fork"), _become, args[2:], env, start_new_session)


def _begin(words, cwd, environment, files, new_session, limits):
    """The fork of the server becomes the process that was asked for."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    missing = [name for name in IMPORTS if name not in sys.modules]
    assert not missing, f"the server of warm processes could not import {missing}"
    subprocess_handler.Popen = _Rank
    os.chdir(cwd)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    for number, limit in limits:
        resource.setrlimit(number, (limit, limit))
    _become(words, environment, new_session)


def _become(words, environment, new_session):
    """Runs `words` in this process as a new interpreter would."""
    if new_session:
        os.setsid()
    multiprocessing.set_start_method(None, force=True)  # the platform's, not the one that made this process
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits an ignored one
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            sys.path.insert(0, os.getcwd())
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without them
