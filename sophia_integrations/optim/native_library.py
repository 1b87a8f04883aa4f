"""`native_step.c` as a shared library, compiled at first use by the compiler of this machine and kept for the user.

A file in the cache is named by what it was made of (source, options, and the macros that the compiler defines, which
tell it and the processor apart) and by its own content, so a damaged one is never loaded. It is written aside and then
renamed: any number of processes may build at once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from ..cache import cache_dir

SOURCE = Path(__file__).with_name("native_step.c")

_OPTIONS = (
    "-O3 -std=gnu11 -fPIC -shared -pthread -ffp-contract=off -fno-math-errno -fno-trapping-math -fprefetch-loop-arrays"
).split()
"""Loops become vectors; every operation stays an IEEE one. Without prefetches one thread takes 3 % longer."""
_TUNING = (["-march=native"], [])
"""For this very processor, or where the compiler does not know it for any of its kind."""
_SECONDS = 120
_PROCESS = os.getpid()

_log = logging.getLogger(__name__)


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The library; or None, and why there is none, as half a sentence. Decided once a process."""
    found, reason = _attempt()
    if reason:
        _log.debug("Sophia's step runs in torch operations: %s.", reason)
    return found, reason


def threads_of_torch() -> ctypes.c_void_p:
    """`GOMP_parallel` of the OpenMP library that torch computes with; null where torch has none of that name.

    Also null in a fork, where the team of its parent is gone and GNU's library would wait for it forever.
    """
    return _gomp_parallel() if os.getpid() == _PROCESS else ctypes.c_void_p()


@functools.cache
def _gomp_parallel() -> ctypes.c_void_p:
    for path in sorted(Path(torch.__file__).with_name("lib").glob("libtorch_cpu.*")):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return ctypes.c_void_p()


def _attempt() -> tuple[ctypes.CDLL | None, str]:
    if os.name != "posix":
        return None, "it is compiled on Linux and macOS only"
    reason = "no C compiler was found (cc, gcc or clang)"
    for compiler in _compilers():
        for tuning in _TUNING:
            try:
                return _cached_or_built([*compiler, *tuning, *_OPTIONS]), ""
            except subprocess.SubprocessError as error:
                reason = f"{shlex.join(compiler)} failed ({_first_line(error)})"
            except OSError as error:
                reason = f"the compiled step could not be kept or loaded ({error})"
    return None, reason


def _compilers() -> Iterator[list[str]]:
    """Commands of compilers that exist: the user's, Python's own, the usual ones."""
    asked = [os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"]
    for command in dict.fromkeys(filter(None, asked)):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            yield words


def _cached_or_built(command: list[str]) -> ctypes.CDLL:
    """The library that `command` makes.

    Raises:
        OSError: the cache cannot be written, or what is in it cannot be loaded.
        subprocess.SubprocessError: the compiler fails.
    """
    source = SOURCE.read_bytes()
    macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])
    key = hashlib.sha256(b"\0".join([source, " ".join(command).encode(), macros])).hexdigest()[:24]
    folder = cache_dir() / "native"
    for path in sorted(folder.glob(f"step-{key}-*.so")):
        if path.stem.endswith(_digest(path)):
            try:
                return ctypes.CDLL(str(path))
            except OSError:
                continue  # made on this kind of processor for another C library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as aside:
        built = Path(aside) / "step.so"
        _run([*command, "-o", str(built), str(SOURCE)])
        path = folder / f"step-{key}-{_digest(built)}.so"
        os.replace(built, path)
    return ctypes.CDLL(str(path))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL, timeout=_SECONDS).stdout


def _first_line(error: subprocess.SubprocessError) -> str:
    said = (getattr(error, "stderr", None) or b"").decode("utf-8", "replace").strip()
    return said.splitlines()[0] if said else str(error)
