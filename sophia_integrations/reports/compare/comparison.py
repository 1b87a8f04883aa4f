"""``sophia compare``: tune every optimizer with the same budget, train them on seeds that tuned nothing, and judge."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import UserError
from ...recipes.running.run_folder import write_text
from ..places import Settings, is_lightning
from .dials import dials_of
from .figure import draw
from .judge import Judged, judge
from .price import Price, measure
from .progress import Progress, in_words
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
    each way of judging a folder with the table, the figure, ``compare.json`` and the protocol.

    Args:
        recipe: a recipe.
        against: names of `RIVALS`, or recipes. The reference is adamw if it is among them, else the first.
        protocol: a way to judge, or a file.
        budget: tuning runs of each optimizer, instead of the protocol's; 4 to 7 of them try learning rates alone, and
            the best again at all steps.
        seeds: of the runs that count, instead of the protocol's; ``0,1,2`` or numbers.
        dry_run: only measure a step of each optimizer and say what the comparison would take.
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
    (folder / checked.judge).mkdir(parents=True, exist_ok=True)
    write_text(folder / checked.judge / "protocol.yaml", to_yaml(checked))
    progress = Progress(say)
    try:
        comparison = _Comparison(folder, sides, checked, progress, time_limit)
        comparison.measure()
        progress.say(comparison.plan())
        if dry_run:
            return 0
        result = comparison.result(recipe, _command(recipe, against, protocol, budget, seeds))
    except KeyboardInterrupt:
        progress.say(f"Stopped. Finished runs are in {folder / 'runs'}; to go on, run the same command again.")
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
        """How many runs and how long; those that have ended before are among them."""
        lines, count, seconds = [], 0, 0.0
        for side in self.sides:
            price, planned = self.prices[side.name], self._planned(side)
            runs = sum(number for _, number in planned)
            spent = sum(number * price.seconds(settings) for settings, number in planned)
            count, seconds = count + runs, seconds + spent
            lines.append(f"{side.name} ({side.about}): {runs} runs, {price.step * 1000:.0f} ms a step")
        self.progress.expect(seconds)
        tuning = self.protocol.tuning
        stages = 2 if tuning.knob == "none" else 3
        more = f", and up to {stages * tuning.extensions} more of each where a best value lies at an edge"
        return "\n".join(
            [*lines, f"{count} runs in about {in_words(seconds)}{more if tuning.budget and tuning.extensions else ''}"]
        )

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
        finals = {}
        for share in self.protocol.shares(reference=side.name == self.reference):
            settings = dials_of(side.settings).with_horizon(side.settings, share)
            finals[share] = [
                self.train(side, dials_of(settings).with_seed(settings, seed), f"seed {seed}")
                for seed in self.protocol.seeds
            ]
        return Judged(side.name, finals, self.prices[side.name], tuned.at_edge)

    def _planned(self, side: Side) -> list[tuple[Settings, int]]:
        """Recipes of a side by their length, and how many runs of each."""
        tuning, dials = self.protocol.tuning, dials_of(side.settings)
        planned = [(1.0, tuning.finalists + tuning.knob_runs), (tuning.horizon, tuning.rates)] if tuning.budget else []
        planned += [(share, len(self.protocol.seeds)) for share in self.protocol.shares(side.name == self.reference)]
        return [(dials.with_horizon(side.settings, share), number) for share, number in planned]


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
