"""Runs of a comparison: each a process and a folder of its own, found again by the hash of its resolved recipe.

    runs/NAME-HASH.yaml  NAME-HASH/  NAME-HASH.log  NAME-HASH.json

The last is written when a run has ended, whichever way: that run is never run again. One that was killed goes on from
its own checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from ...errors import UserError
from .dials import Settings, dials_of
from .progress import Progress, in_words
from .run import Run, read_events, read_json, read_run

_CHILD = "sophia_integrations.reports.compare.child"
_POLL = 0.2  # seconds
_LOST = 3
"""Training losses in a row that are not finite, after which a run is ended: it never comes back."""
_NOT_FINITE = re.compile(r"LinAlgError|not finite|non-finite|\bnan\b", re.IGNORECASE)


def digest(settings: Settings) -> str:
    """The hash of a resolved recipe."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Runs:
    """Finds finished runs below a folder and executes the others, one at a time.

    Args:
        folder: of the comparison.
        say: receives a line for every run.
        progress: is told where a run is.
        time_limit: seconds after which a run is ended and counts as one without a loss.

    Attributes:
        executed: how many runs this object has executed.
    """

    def __init__(
        self, folder: Path, say: Callable[[str], object], progress: Progress, time_limit: float | None = None
    ) -> None:
        self.folder, self.say, self.progress, self.time_limit = folder / "runs", say, progress, time_limit
        self.executed = 0

    def find(self, settings: Settings) -> Run | None:
        """The run of this recipe, if it has ended."""
        for record in self.folder.glob(f"*-{digest(settings)}.json"):
            return read_run(record.with_suffix(""), str(read_json(record).get("why", "")))
        return None

    def get(self, settings: Settings, name: str, window: tuple[int, int] | None = None) -> Run:
        """The run of this recipe, executed now unless it has ended before.

        Args:
            settings: the resolved recipe, without a run folder.
            name: how its folder begins and how it is spoken of.
            window: optimizer steps whose floating-point operations are counted.

        Raises:
            UserError: it failed otherwise than by diverging.
            KeyboardInterrupt: Ctrl-C; the run has saved a checkpoint.
        """
        found = self.find(settings)
        if found is not None:
            return found
        self.executed += 1
        began = time.monotonic()
        place = self._place(settings, name)
        why = self._execute(place, settings, window)
        run = read_run(place, why)
        if not why and not run.curve and not run.diverged:
            raise UserError(f"{place}: the run logged no validation loss, and runs are judged by it")
        _drop_weights(place)
        record = {"why": run.why, "seconds": round(time.monotonic() - began, 1), "command": " ".join(_command(place))}
        aside = Path(f"{place}.tmp")
        aside.write_text(json.dumps(record) + "\n", encoding="utf-8")
        aside.rename(Path(f"{place}.json"))
        shown = f"loss {run.loss:.4f}" if not run.diverged else f"no loss: {run.why}"
        left = f"; about {in_words(self.progress.left)} left" if self.progress.left else ""
        self.say(f"{name}: {run.steps} steps, {shown} ({record['seconds']:.0f} s{left})")
        return run

    def seconds(self, settings: Settings) -> float:
        """Wall time of a run that has ended, from start to end."""
        record = next(self.folder.glob(f"*-{digest(settings)}.json"))
        return float(read_json(record)["seconds"])

    def flops(self, settings: Settings) -> dict[str, float]:
        """What was counted in it, per step; empty when nothing was."""
        return next((read_json(file) for file in self.folder.glob(f"*-{digest(settings)}.flops")), {})

    def _place(self, settings: Settings, name: str) -> Path:
        """Its run folder; beside it lies the recipe."""
        self.folder.mkdir(parents=True, exist_ok=True)
        begun = next(self.folder.glob(f"*-{digest(settings)}.yaml"), None)
        place = begun.with_suffix("") if begun else self.folder / f"{_safe(name)}-{digest(settings)}"
        text = f"# One run of a comparison: {name}\n" + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        Path(f"{place}.yaml").write_text(text, encoding="utf-8")
        return place

    def _execute(self, place: Path, settings: Settings, window: tuple[int, int] | None) -> str:
        """Why it ended without a loss; empty when it ended by itself."""
        count = ["--flops", f"{place}.flops", *map(str, window)] if window else []
        train = ["train", f"{place}.yaml", f"{dials_of(settings).folder_key}={place}"]
        command = [sys.executable, "-m", _CHILD, *count, *train]
        began, why = time.monotonic(), ""
        with open(f"{place}.log", "ab") as log:
            begin = log.tell()
            # Its own session: Ctrl-C reaches it through us, once, and it saves a checkpoint.
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                while process.poll() is None:
                    time.sleep(_POLL)
                    events = read_events(place)
                    self.progress.at(events[-1]["step"] if events else 0)
                    why = self._lost(events, began)
                    if why:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
            except KeyboardInterrupt:
                _stop(process)
                raise
            finally:
                process.stdin.close()  # type: ignore[union-attr]
        if why or process.returncode == 0:
            return why
        tail = _tail(Path(f"{place}.log"), begin)
        trained = any("loss" in event for event in read_events(place))
        if trained and _NOT_FINITE.search(tail):
            return f"it broke off: {tail.splitlines()[-1]}"
        raise UserError(f"a run of the comparison failed: {tail or 'without a word'}\nIts whole log: {place}.log")

    def _lost(self, events: list, began: float) -> str:
        losses = [event for event in events if "loss" in event]
        if len(losses) >= _LOST and all(event["loss"] is None for event in losses[-_LOST:]):
            first = next(event["step"] for event in losses if event["loss"] is None)
            return f"its loss is not finite at step {first} and after"
        if self.time_limit is not None and time.monotonic() - began > self.time_limit:
            return f"it took more than {self.time_limit:g} s"
        return ""


def _command(place: Path) -> list[str]:
    return ["python", "-m", _CHILD, "train", f"{place}.yaml"]


def _stop(process: subprocess.Popen) -> None:
    """Lets a run save its checkpoint; a second Ctrl-C ends it at once."""
    try:
        process.send_signal(signal.SIGINT)
        process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _drop_weights(place: Path) -> None:
    """Nothing of a finished run is needed but its figures."""
    for path in [*place.glob("checkpoint-*"), place / "checkpoints", place / "model"]:
        shutil.rmtree(path, ignore_errors=True)


def _tail(log: Path, begin: int, lines: int = 4) -> str:
    """The last lines that the run wrote."""
    with open(log, "rb") as file:
        file.seek(begin)
        text = file.read().decode("utf-8", errors="replace")
    return "\n".join([line.strip() for line in text.splitlines() if line.strip()][-lines:])


def _safe(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", name).strip("-")
