"""One training of a comparison as a process: how it is started, stopped and ended, and what it said last.

PLACE.yaml  PLACE/  PLACE.log
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from ...errors import UserError
from ..places import Settings
from .dials import dials_of

_CHILD = "sophia_integrations.reports.compare.child"


def command(place: Path) -> list[str]:
    """That repeats it by hand."""
    return ["python", "-m", _CHILD, "train", f"{place}.yaml"]


class Training:
    """A running process of the recipe `settings`, which ends at once when this one does.

    Args:
        place: its run folder; recipe and log lie beside it.
        settings: the resolved recipe, without a run folder.
        name: how it is spoken of.
        options: of the child, before ``train``.
        descriptors: open files that it inherits.
    """

    def __init__(
        self,
        place: Path,
        settings: Settings,
        name: str,
        options: Sequence[str] = (),
        descriptors: Sequence[int] = (),
    ) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        text = f"# One run of a comparison: {name}\n" + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        Path(f"{place}.yaml").write_text(text, encoding="utf-8")
        self.log = Path(f"{place}.log")
        train = ["train", f"{place}.yaml", f"{dials_of(settings).folder_key}={place}"]
        with open(self.log, "ab") as log:
            self._begin = log.tell()
            # Its own session: Ctrl-C reaches it through us, once, and it saves a checkpoint.
            self.process = subprocess.Popen(
                [sys.executable, "-m", _CHILD, *options, *train],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=descriptors,
            )

    def go_on(self) -> None:
        """Tells a child that takes turns to take one; what has ended does not hear it."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b".")  # type: ignore[union-attr]

    def stop(self) -> None:
        """Lets it save its checkpoint; a second Ctrl-C ends it at once."""
        try:
            self.process.send_signal(signal.SIGINT)
            self.process.wait()
        except KeyboardInterrupt:
            self.kill()

    def kill(self) -> None:
        """Ends it and what it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """It ends at the end of its standard input, if it has not yet."""
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()

    def last_lines(self, number: int = 4) -> list[str]:
        """What it wrote last."""
        with open(self.log, "rb") as file:
            file.seek(self._begin)
            text = file.read().decode("utf-8", errors="replace")
        return [line.strip() for line in text.splitlines() if line.strip()][-number:]

    def failure(self) -> UserError:
        """What to raise once it has failed."""
        said = "\n".join(self.last_lines()) or "without a word"
        return UserError(f"a run of the comparison failed: {said}\nIts whole log: {self.log}")
