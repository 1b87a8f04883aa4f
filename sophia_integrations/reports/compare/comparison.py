"""``sophia compare``: tune every optimizer with the same budget, train them on seeds that tuned nothing, and judge."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import UserError
from ...recipes.running.run_folder import free_name, write_text
from ..places import Settings, is_lightning
from ..run_folder import read_json
from .figure import draw
from .judge import Judged, judge
from .plan import finals, plan
from .price import Price, measure
from .progress import Progress
from .protocol import Protocol, read_protocol, to_yaml
from .result import Result, to_json
from .rivals import Side, sides_of
from .run import Run
from .runs import Runs
from .table import to_markdown
from .tuning import Tuned, tune

_INTERRUPTED = 130


def compare(
    recipe: str,
    against: Sequence[str] = ("adamw",),
    protocol: str | None = None,
    budget: int | None = None,
    seeds: str | Sequence[int] | None = None,
    dry_run: bool = False,
    say: Callable[[str], object] = print,
    time_limit: float | None = None,
) -> int:
    """Compares a recipe with other optimizers, or goes on with a comparison that was stopped or killed.

    Everything is kept in ``runs/compare-RECIPE``, of Lightning ``runs/compare-RECIPE-lightning``: the runs, and for
    each way of judging a folder with the table, the figure, ``compare.json`` and the protocol. What another command
    left in that folder is kept beside it.

    Args:
        recipe: a recipe.
        against: names of `RIVALS`, or recipes. The reference is adamw if it is among them, else the first.
        protocol: a way to judge, or a file.
        budget: tuning runs of each optimizer, instead of the protocol's; 4 to 7 of them try learning rates alone, and
            the best again at all steps.
        seeds: of the runs that count, instead of the protocol's; ``0,1,2`` or numbers.
        dry_run: only measure a step of each optimizer and say what the comparison has still to train, and how long.
        say: receives the lines for the reader.
        time_limit: seconds of a run.

    Returns:
        0, or 130 after Ctrl-C: the same command goes on then.

    Raises:
        UserError: what the user can mend, before anything is trained where it can be known then.
    """
    checked = read_protocol(protocol, budget, _seeds(seeds))
    sides = sides_of(recipe, against)
    lightning = "-lightning" if is_lightning(sides[0].settings) else ""
    folder = Path("runs") / f"compare-{Path(recipe).stem}{lightning}"
    command = _command(recipe, against, protocol, budget, seeds)
    progress = Progress(say)
    if not dry_run:
        _set_aside(folder / checked.judge, command, progress.say)
        (folder / checked.judge).mkdir(parents=True, exist_ok=True)
        write_text(folder / checked.judge / "protocol.yaml", to_yaml(checked))
    comparison = _Comparison(folder, sides, checked, progress, time_limit)
    try:
        comparison.measure()
        progress.say(comparison.plan())
        if dry_run:
            return 0
        result = comparison.result(recipe, command)
    except KeyboardInterrupt:
        progress.say(f"Stopped. {comparison.runs.kept()} To go on, run the same command again: {command}")
        return _INTERRUPTED
    finally:
        progress.close()
    _report(folder / checked.judge, result, say)
    return 0


class _Comparison:
    """The runs of a comparison in their order."""

    def __init__(
        self, folder: Path, sides: Sequence[Side], protocol: Protocol, progress: Progress, time_limit: float | None
    ) -> None:
        self.sides, self.protocol, self.progress = sides, protocol, progress
        self.runs = Runs(folder, progress.say, progress, time_limit)
        self.prices: dict[str, Price] = {}
        self.reference = "adamw" if any(side.name == "adamw" for side in sides[1:]) else sides[1].name

    def measure(self) -> None:
        """What a step of each side costs."""
        self.progress.begin("a step of each is measured", 1, 0.0)
        self.prices = measure(self.sides, self.runs.folder, self.progress.say)
        self.progress.end()

    def plan(self) -> str:
        """How many runs and how long."""
        found = plan(self.sides, self.protocol, self.reference, self.prices, self.runs.find)
        self.progress.expect(found.seconds)
        tuning = self.protocol.tuning
        stages = 2 if tuning.knob == "none" else 3
        edges = stages * tuning.extensions if tuning.budget else 0
        return "\n".join([*(found.of(side, self.prices[side.name]) for side in self.sides), found.sentence(edges)])

    def train(self, side: Side, settings: Settings, what: str, extends: bool = False) -> Run:
        """One run of a side, found or executed; one that extends a grid was not planned."""
        price = self.prices[side.name]
        seconds = price.seconds(settings)
        if extends:
            self.progress.expect(seconds)
        found = self.runs.find(settings)
        if found is not None:
            self.progress.expect(-seconds)
            return found
        steps = price.steps(settings)
        name = f"{side.name} {what}, {steps} steps"
        self.progress.begin(name, steps, seconds)
        run = self.runs.get(settings, f"{side.name} {what} T={steps}")
        self.progress.end()
        return run

    def result(self, recipe: str, command: str) -> Result:
        """All runs, and what they say."""
        tuned = tune(self.sides, self.protocol.tuning, self.train)
        judged = [self._confirmed(one) for one in tuned]
        reference = next(one for one in judged if one.name == self.reference)
        verdicts = [judge(self.protocol, reference, one) for one in judged if one is not reference]
        return Result(recipe, command, self.protocol, tuned, judged, reference, verdicts)

    def _confirmed(self, tuned: Tuned) -> Judged:
        side = tuned.side
        runs = {
            share: [
                self.train(side, settings, f"seed {seed}")
                for seed, settings in zip(self.protocol.seeds, every, strict=True)
            ]
            for share, every in finals(side, self.protocol, self.reference).items()
        }
        return Judged(side.name, runs, self.prices[side.name], tuned.at_edge)


def _set_aside(folder: Path, command: str, say: Callable[[str], object]) -> None:
    """Keeps what another command left in `folder` under a name beside it."""
    result = folder / "compare.json"
    if not result.is_file():
        return
    try:
        earlier = read_json(result).get("command", "unknown")
    except UserError:
        earlier = "unknown"
    if earlier != command:
        say(f"What another command left there ({earlier}) is now in {folder.rename(free_name(folder))}.")


def _report(folder: Path, result: Result, say: Callable[[str], object]) -> None:
    write_text(folder / "compare.json", to_json(result))
    table = to_markdown(result)
    write_text(folder / "compare.md", table)
    draw(result, folder / "compare.png")
    say(table)
    say(f"Everything is in {folder}: compare.md, compare.json, compare.png, protocol.yaml; the runs are beside it")


def _seeds(seeds: str | Sequence[int] | None) -> list[int] | None:
    if not isinstance(seeds, str):
        return None if seeds is None else list(seeds)
    try:
        return [int(part) for part in seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds {seeds}: expected whole numbers between commas, such as 0,1,2") from None


def _command(
    recipe: str,
    against: Sequence[str],
    protocol: str | None,
    budget: int | None,
    seeds: str | Sequence[int] | None,
) -> str:
    words = ["sophia", "compare", recipe, *(word for name in against for word in ("--against", name))]
    words += ["--protocol", protocol] if protocol else []
    words += ["--budget", str(budget)] if budget is not None else []
    words += ["--seeds", seeds if isinstance(seeds, str) else ",".join(map(str, seeds))] if seeds else []
    return shlex.join(words)
