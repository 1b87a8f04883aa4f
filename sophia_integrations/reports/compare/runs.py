"""Runs of a comparison: each a process and a folder of its own, found again by the hash of its resolved recipe.

    runs/NAME-HASH.yaml  NAME-HASH/  NAME-HASH.log  NAME-HASH.json

The last is written when a run has ended, whichever way: that run is never run again. One that was killed goes on from
its own checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from ...recipes.running.checkpoints import saved_checkpoints
from ...recipes.running.events import read_metrics
from ...recipes.running.run_folder import write_text
from ..places import Settings
from ..run_folder import read_json
from .progress import Progress, in_words
from .run import Run, read_run
from .training import Training, command

_POLL = 0.2  # seconds
_LOST = 3
"""Training losses in a row that are not finite, after which a run is ended: it never comes back."""
_NOT_FINITE = re.compile(r"LinAlgError|not finite|non-finite|\bnan\b", re.IGNORECASE)


def digest(settings: Settings | list[Settings]) -> str:
    """The hash of a resolved recipe, or of several."""
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
        stopped: the run that Ctrl-C has stopped, and where it goes on; empty before.
    """

    def __init__(
        self, folder: Path, say: Callable[[str], object], progress: Progress, time_limit: float | None = None
    ) -> None:
        self.folder, self.say, self.progress, self.time_limit = folder / "runs", say, progress, time_limit
        self.executed = 0
        self.stopped = ""

    def find(self, settings: Settings) -> Run | None:
        """The run of this recipe, if it has ended."""
        for record in self.folder.glob(f"*-{digest(settings)}.json"):
            return read_run(record.with_suffix(""), str(read_json(record).get("why", "")))
        return None

    def kept(self) -> str:
        """What the folder keeps for a comparison that goes on, in sentences."""
        ended = sum(not record.name.startswith("measured-") for record in self.folder.glob("*.json"))
        kept = f"{ended} finished run{' is' if ended == 1 else 's are'} kept in {self.folder}." if ended else ""
        return f"{kept or 'No run has ended yet.'}{self.stopped}"

    def get(self, settings: Settings, name: str) -> Run:
        """The run of this recipe, executed now unless it has ended before.

        Args:
            settings: the resolved recipe, without a run folder.
            name: how its folder begins and how it is spoken of.

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
        why = self._execute(place, settings, name)
        run = read_run(place, why)
        _drop_weights(place)
        record = {"why": run.why, "seconds": round(time.monotonic() - began, 1), "command": " ".join(command(place))}
        write_text(Path(f"{place}.json"), json.dumps(record) + "\n")
        shown = f"loss {run.loss:.4f}" if not run.diverged else f"no loss: {run.why}"
        left = f"; about {in_words(self.progress.left)} left" if self.progress.left else ""
        self.say(f"{name}: {run.steps} steps, {shown} ({record['seconds']:.0f} s{left})")
        return run

    def _place(self, settings: Settings, name: str) -> Path:
        """Its run folder."""
        begun = next(self.folder.glob(f"*-{digest(settings)}.yaml"), None)
        return begun.with_suffix("") if begun else self.folder / f"{_safe(name)}-{digest(settings)}"

    def _execute(self, place: Path, settings: Settings, name: str) -> str:
        """Why it ended without a loss; empty when it ended by itself."""
        began, why = time.monotonic(), ""
        training = Training(place, settings, name)
        try:
            while training.process.poll() is None:
                time.sleep(_POLL)
                events = read_metrics(place / "metrics.jsonl")
                self.progress.at(events[-1]["step"] if events else 0)
                why = self._lost(events, began)
                if why:
                    training.kill()
        except KeyboardInterrupt:
            training.stop()
            goes_on = "from its checkpoint" if any(map(Path.exists, _checkpoints(place))) else "at its beginning"
            self.stopped = f" The one that was stopped, {name}, goes on {goes_on}."
            raise
        finally:
            training.close()
        if why or training.process.returncode == 0:
            return why
        said = training.last_lines()
        trained = any("loss" in event for event in read_metrics(place / "metrics.jsonl"))
        if trained and _NOT_FINITE.search("\n".join(said)):
            return f"it broke off: {said[-1]}"
        raise training.failure()

    def _lost(self, events: list, began: float) -> str:
        losses = [event for event in events if "loss" in event]
        if len(losses) >= _LOST and all(event["loss"] is None for event in losses[-_LOST:]):
            first = next(event["step"] for event in losses if event["loss"] is None)
            return f"its loss is not finite at step {first} and after"
        if self.time_limit is not None and time.monotonic() - began > self.time_limit:
            return f"it took more than {self.time_limit:g} s"
        return ""


def _drop_weights(place: Path) -> None:
    """Nothing of a finished run is needed but its figures."""
    for path in [*_checkpoints(place), place / "model"]:
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(place: Path) -> list[Path]:
    """Where they are, of the Trainer or of Lightning."""
    return [*(path for _, path in saved_checkpoints(place)), place / "checkpoints"]


def _safe(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", name).strip("-")
