"""The command line `sophia`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; `argv` defaults to the process's own arguments.

    0 done; 2 a mistake or condition the user can mend, said in one message; 130 and 143 stopped by Ctrl-C and SIGTERM.
    ``sophia run`` and ``--version`` work with torch alone, and a script that it runs has its own errors and signals.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["run"] and words[1:2] not in (["-h"], ["--help"]):
        from ..hf.run import run

        return run(words[1:])
    if words == ["--version"]:
        from .. import __version__

        print(f"sophia-integrations {__version__}")
        return 0
    try:
        from .commands import app

        return app(words, prog_name="sophia")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "pydantic"):  # which typer imports late
            raise
        from ..errors import needs

        print(needs(error.name), file=sys.stderr)
        return 2


__all__ = ["main"]
