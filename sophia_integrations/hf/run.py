"""Runs somebody else's training script or module with Sophia registered; everything else is as under `python`."""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import runpy
import sys
import types
import zipfile
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path

USAGE = "usage: sophia run SCRIPT.py [ARGUMENT ...]\n       sophia run -m MODULE [ARGUMENT ...]"


def run(arguments: Sequence[str]) -> int:
    """Run `SCRIPT.py …` or `-m MODULE …` as `__main__`, like the interpreter does.

    The arguments after it are the script's own, whatever they look like. Exceptions, `SystemExit` and signals pass
    through, so that exit codes and tracebacks are the script's. Nothing is imported for it but this package.

    Args:
        arguments: what follows `sophia run`.

    Returns:
        0 after the script's end; 1 and 2, as the interpreter, for a module and a script that are not there.
    """
    if list(arguments) in ([], ["-m"]):
        return _complain(USAGE, 2)
    if arguments[0] == "-m":
        module, rest = arguments[1], arguments[2:]
        _set_first_path(os.getcwd())
        if not _exists(module):
            return _complain(f"sophia run: no module named {module}", 1)
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return 0
    script = Path(arguments[0])
    if not script.exists():
        return _complain(f"sophia run: no file {script}; for a module: sophia run -m {script}", 2)
    sys.argv = list(arguments)
    if script.is_file() and script.suffix != ".pyc" and not zipfile.is_zipfile(script):
        _run_file(script)
    else:
        runpy.run_path(str(script), run_name="__main__")
    return 0


def _run_file(script: Path) -> None:
    """`runpy.run_path` without what tells it from `python SCRIPT`: its `__main__` goes away before the process does,
    `sys.argv[0]` and `__file__` are the same, and its frames open every traceback."""
    _set_first_path(str(script.resolve().parent))
    path = os.path.abspath(script)
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=builtins, __loader__=SourceFileLoader("__main__", path))
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def _set_first_path(path: str) -> None:
    """The interpreter puts the script's folder, or the current one, first; here that place is our own script's."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = path


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            return False
        raise


def _complain(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
