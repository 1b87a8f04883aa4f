"""``sophia train --nproc N``: the same command in N processes of this machine, as one run with one exit code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

from ...errors import UserError

_LAUNCHED = "SOPHIA_LAUNCHED"
_GRACE = 30.0  # seconds that the others get to end after one has failed
_LOOK = 0.1  # seconds between two looks


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Runs ``sophia ARGUMENTS`` in `nproc` processes and returns the run's exit code.

    Ctrl-C and SIGTERM are passed on to every process.  When one process fails, the others are stopped; a failure
    that is no mistake of the user (a traceback, a kill) decides the exit code.

    Raises:
        UserError: `nproc` is less than 1, or this process is already one of several.
    """
    if nproc < 1:
        raise UserError(f"--nproc: expected at least 1, found {nproc}")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError("--nproc starts the processes itself: leave it out under torchrun or accelerate launch")
    port = _free_port()
    workers: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for worker in workers:
            _signal(worker, number if len(received) <= 2 else signal.SIGKILL)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for rank in range(nproc):
            if not received:
                workers.append(_start(arguments, rank, nproc, port))
        return _wait(workers)
    finally:
        for worker in workers:
            _signal(worker, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_launcher() -> None:
    """In a process that `launch` started: when the launcher vanishes, stop as SIGTERM does, with a checkpoint."""
    if os.environ.pop(_LAUNCHED, None) is None:
        return

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written to this pipe: it ends with the launcher
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _start(arguments: Sequence[str], rank: int, nproc: int, port: int) -> subprocess.Popen[bytes]:
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // nproc))
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
        _LAUNCHED: "1",
    }
    command = [sys.executable, "-m", __package__.partition(".")[0], *arguments]
    # A session of its own: Ctrl-C on the terminal comes through the launcher, once.
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """The run's exit code, once every process has ended."""
    until: float | None = None
    while any(worker.poll() is None for worker in workers):
        if until is None and any(worker.returncode for worker in workers):
            until = time.monotonic() + _GRACE
        if until is not None and time.monotonic() > until:
            codes = [worker.returncode for worker in workers]
            for worker in workers:
                _signal(worker, signal.SIGKILL)
            return _one_code(codes)
        time.sleep(_LOOK)
    return _one_code([worker.returncode for worker in workers])


def _one_code(codes: Sequence[int | None]) -> int:
    """The gravest: a kill, then a traceback, then a sentence for the user."""
    failures = sorted(code for code in codes if code)
    grave = [code for code in failures if code != 2]
    code = (grave or failures or [0])[0]
    return 128 - code if code < 0 else code


def _signal(worker: subprocess.Popen[bytes], number: int) -> None:
    if worker.poll() is None:
        worker.send_signal(number)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
