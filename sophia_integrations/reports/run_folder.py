"""One run's logged figures as a table of steps, from whichever of three sources its folder has; light, without torch.

    metrics.jsonl        ours
    trainer_state.json   any transformers.Trainer's; that of the newest checkpoint where the folder itself has none
    *.tfevents.*         TensorBoard's, in the folder or below it

Names are those of ``metrics.jsonl``: ``loss``, ``eval_loss``, ``lr``, ``grad_norm``, ``sophia/…``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipes.running.checkpoints import saved_checkpoints
from ..recipes.running.events import read_metrics
from ..recipes.running.run_folder import is_held
from .recipe_lines import RecipeLines

Rows = dict[int, dict[str, float]]
"""Figures by optimizer step, in order of steps; a figure that was logged and is not finite is NaN."""

_NAMES = {
    "learning_rate": "lr",
    "train_loss_step": "loss",
    "train_loss": "loss",
    **dict.fromkeys(("val_loss", "valid_loss", "validation_loss", "val/loss", "valid/loss", "eval/loss"), "eval_loss"),
}
"""What other loggers call a figure, after ``train/`` is taken off; `lr-…` of Lightning's LearningRateMonitor beside."""


@dataclass(frozen=True)
class Run:
    """What a folder says of its run.

    Attributes:
        folder: the run's.
        source: the file that the figures came from.
        rows: figures by step.
        recipe: the resolved recipe with the lines of its keys; empty where the folder has none.
        summary: of a complete run of ours; else empty.
        max_steps: optimizer steps that were asked for; None where nothing says.
        complete: whether it made them; None where nothing says.
    """

    folder: Path
    source: Path
    rows: Rows
    recipe: RecipeLines = field(default_factory=RecipeLines)
    summary: Mapping[str, Any] = field(default_factory=dict)
    max_steps: int | None = None
    complete: bool | None = None

    @property
    def last_step(self) -> int:
        """The last step that logged anything."""
        return max(self.rows)

    @property
    def horizon(self) -> int:
        """Steps of the whole schedule, as far as they are known."""
        return max(self.max_steps or 0, self.last_step)

    @property
    def optimizer(self) -> str | None:
        """Its name in the recipe's words; None where nothing says."""
        return self.recipe.optimizer or self.summary.get("optimizer")

    @property
    def sophia(self) -> bool:
        """Whether any figure of Sophia's was logged."""
        return any(name.startswith("sophia/") for name in self.names)

    @property
    def eigen(self) -> bool:
        """Whether Sophia is known to have run in the eigenbasis."""
        return "eigen" in (self.optimizer or "") or self.recipe.value("basis") == "eigen"

    @property
    def automatic(self) -> bool:
        """Whether ρ was set by itself: only then it is logged."""
        return "sophia/rho" in self.names

    @property
    def training(self) -> bool:
        """Whether a process holds the folder at this moment."""
        return is_held(self.folder / ".lock")

    @property
    def names(self) -> list[str]:
        """The figures that were logged, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))

    def series(self, name: str) -> dict[int, float]:
        """The finite values of a figure, by step."""
        return {s: row[name] for s, row in self.rows.items() if name in row and math.isfinite(row[name])}

    @property
    def warmup_end(self) -> int:
        """The step at which the learning rate is first at its peak, as far as logs tell; 0 without a rate."""
        rates = self.series("lr")
        return next((step for step, lr in rates.items() if lr >= 0.95 * max(rates.values())), 0)

    @property
    def middle(self) -> list[int]:
        """Logged steps after warm-up with at least half of the peak rate; without rates those of the second third."""
        rates = self.series("lr")
        if not rates:
            return [step for step in self.rows if 1 / 3 < step / self.horizon <= 2 / 3]
        return [step for step, lr in rates.items() if step > self.warmup_end and lr >= max(rates.values()) / 2]

    @property
    def end(self) -> list[int]:
        """Logged steps of the last tenth of the schedule, where the rate has fallen below a tenth of its peak."""
        rates = self.series("lr")
        return [s for s, lr in rates.items() if s > 0.9 * self.horizon and lr < max(rates.values()) / 10]

    def over(self, steps: Iterable[int], name: str) -> list[float]:
        """The finite values of a figure at `steps`."""
        series = self.series(name)
        return [series[step] for step in steps if step in series]

    @property
    def max_grad_norm(self) -> float | None:
        """The norm that gradients are clipped to; None where they are not, or nothing says."""
        most = self.recipe.value("max_grad_norm")
        return 1.0 if most is None and self.recipe.found and not self.recipe.lightning else most  # TrainingArguments'

    @property
    def clipped_share(self) -> float:
        """Share of the logged gradient norms that were clipped; NaN where none was logged, 0 without clipping."""
        norms, most = self.series("grad_norm").values(), self.max_grad_norm
        return sum(norm > most for norm in norms) / len(norms) if norms and most else 0.0 if norms else math.nan

    def not_finite(self, name: str) -> list[int]:
        """Steps that logged a figure as NaN or infinity."""
        return [step for step, row in self.rows.items() if name in row and not math.isfinite(row[name])]


def read_run(path: str | os.PathLike[str]) -> Run:
    """Reads a run folder.

    Raises:
        UserError: the folder is missing, has none of the three sources, or the one it has cannot be read or is empty.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is {'a file, not a folder' if folder.exists() else 'not there'}; give a run folder")
    recipe, summary = RecipeLines.read(folder / "recipe.yaml"), read_json(folder / "summary.json")
    max_steps, complete = recipe.value("max_steps"), None
    if (folder / "metrics.jsonl").is_file():
        source = folder / "metrics.jsonl"
        rows = _table((event["step"], event) for event in read_metrics(source))
        complete = bool(summary) if recipe.found else None
    elif states := _trainer_states(folder):
        source = states[-1]
        try:
            state = read_json(source)
        except UserError as error:
            before = f"; {states[-2].parent} can be read in its place" if states[1:] else ""
            raise UserError(f"{error}{before}") from None
        if not isinstance(state.get("log_history"), list):
            raise UserError(f"{source} is damaged: it holds no log_history; give another folder or checkpoint")
        rows = _table((entry.get("step"), entry) for entry in state["log_history"] if isinstance(entry, dict))
        max_steps = state.get("max_steps") or max_steps
        complete = state.get("global_step") == max_steps or _stopped(state)
    elif runs := sorted(folder.rglob("metrics.jsonl"), key=lambda file: file.stat().st_mtime):
        number = f"{len(runs)} run folders" if len(runs) > 1 else "a run folder"
        raise UserError(
            f"{folder} is no run folder but holds {number}: give one, such as {runs[-1].parent}, the newest"
        )
    elif events := sorted(folder.rglob("*.tfevents.*"), key=lambda file: file.stat().st_mtime):
        source = events[-1]
        rows = _tensorboard(source.parent)
    else:
        raise UserError(
            f"{folder} is no run folder: it has no metrics.jsonl, no trainer_state.json, also not in a checkpoint, and "
            "no TensorBoard file (*.tfevents.*)"
        )
    if not any({"loss", "eval_loss"} & row.keys() for row in rows.values()):
        raise UserError(f"{source} holds no logged loss; train at least until the first log")
    steps = max_steps if isinstance(max_steps, int) and max_steps > 0 else None
    return Run(folder, source, rows, recipe, summary, steps, complete)


def _trainer_states(folder: Path) -> list[Path]:
    """The folder's own state, or those of its checkpoints, the newest last."""
    if (own := folder / "trainer_state.json").is_file():
        return [own]
    states = (path / "trainer_state.json" for _, path in saved_checkpoints(folder))
    return [state for state in states if state.is_file()]


def _stopped(state: Mapping[str, Any]) -> bool:
    """Whether a callback ended the training, as EarlyStoppingCallback does."""
    value: Any = state
    for key in ("stateful_callbacks", "TrainerControl", "args", "should_training_stop"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return bool(value)


def _table(events: Iterable[tuple[Any, Mapping[str, Any]]]) -> Rows:
    """Rows by step, the later of two values kept; what is null was not finite, what is no number is left out."""
    rows: Rows = {}
    for step, event in events:
        if not isinstance(step, int):
            continue
        row = rows.setdefault(step, {})
        for name, value in event.items():
            if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
                row[_name(name)] = math.nan if value is None else float(value)
    return {step: rows[step] for step in sorted(rows)}


def _name(name: str) -> str:
    name = name.removeprefix("train/")
    return "lr" if re.fullmatch(r"lr-[^/]+(/(pg1|matrices))?", name) else _NAMES.get(name, name)


def _tensorboard(folder: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return _table((point.step, {tag: point.value}) for tag in events.Tags()["scalars"] for point in events.Scalars(tag))


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty where there is no such file; raises `UserError` when it is damaged."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{file} is damaged: it is not JSON; restore it or give another folder") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object; restore it or give another folder")
    return value
