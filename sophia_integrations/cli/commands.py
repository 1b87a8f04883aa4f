"""The verbs of ``sophia``: one function each, imports inside it, no logic of its own; typer completes their words."""

from __future__ import annotations

import glob
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from ..errors import UserError, needs, one_line
from ..reports.compare.names import NAMES as RIVALS

_EXTRAS = {
    **dict.fromkeys(("lightning", "jsonargparse"), "lightning"),
    **dict.fromkeys(("transformers", "accelerate", "tokenizers", "datasets", "yaml", "pydantic"), "recipes"),
    **dict.fromkeys(("jsonschema", "matplotlib", "tensorboard", "tqdm", "torch", "numpy", "safetensors"), "recipes"),
}
"""The extra of ours that brings a package."""


class _Verbs(TyperGroup):
    """Ends the process with the code that a verb returns, and with one message for what the user can mend."""

    def invoke(self, ctx: Any) -> Any:
        message = ""
        try:
            code = super().invoke(ctx) or 0
            sys.stdout.flush()
        except KeyboardInterrupt:
            code, message = 130, "Stopped; whatever was saved is kept. To go on, run the same command again."
        except BrokenPipeError:
            raise  # the reader of a pipe went away, as `head` does: typer ends quietly
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _EXTRAS:
                raise
            code, message = 2, needs(package, _EXTRAS[package])
        except OSError as error:
            code, message = 2, f"{f'{error.filename}: ' if error.filename else ''}{one_line(error)}"
        except UserError as error:
            code, message = 2, str(error)
        if message:
            print(message, file=sys.stderr)
        raise typer.Exit(code)


app = typer.Typer(
    cls=_Verbs,
    help="Sophia in the training loop you already have.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None: ...


def _recipes(incomplete: str) -> list[str]:
    """Words that a shell may complete: names of shipped recipes, YAML files, folders."""
    from ..recipes.catalog import names

    nearby = [f"{path}/" if os.path.isdir(path) else path for path in glob.glob(f"{glob.escape(incomplete)}*")]
    files = [path for path in nearby if path.endswith(("/", ".yaml", ".yml"))]
    return [name for name in names() if name.startswith(incomplete)] + files


Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A path, or a name that sophia ls lists.", autocompletion=_recipes)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="Such as training.max_steps=50.", show_default=False)
]


@app.command("ls")
def list_recipes() -> None:
    """List the recipes that come with the package."""
    from ..recipes.catalog import listing

    print(listing(), end="")


@app.command()
def show(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print a recipe as it is understood: with its base, the arguments and the defaults."""
    from ..recipes.reading.loader import read
    from ..recipes.reading.yaml_text import to_yaml

    print(to_yaml(read(recipe, overrides or ()).settings), end="")


@app.command()
def cp(
    recipe: Recipe, dest: Annotated[Path, typer.Argument(metavar="DEST", help="A file or folder.")] = Path(".")
) -> None:
    """Copy a recipe to change it; never overwrites."""
    from ..recipes.catalog import copy

    for path in copy(recipe, dest):
        print(path)


@app.command()
def validate(recipe: Recipe, overrides: Overrides = None) -> None:
    """Check a recipe without training; reports every problem at once.

    Names, types and combinations are checked without importing torch; nothing of the recipe is run. The first call
    after an upgrade imports the frameworks, to learn their words. What only building shows: sophia train --dry-run.
    """
    from ..recipes.reading.loader import read

    read(recipe, overrides or ())
    print(f"{recipe}: valid")


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start in a new numbered folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build everything, say what it takes, and stop.")] = False,
    nproc: Annotated[int, typer.Option(metavar="N", min=1, help="Train in N processes of this machine.")] = 1,
) -> int:
    """Train a recipe, or go on with an interrupted run of it."""
    if dry_run:
        from ..recipes.running.dry_run import dry_run as plan

        plan(recipe, overrides or (), print, nproc)
        return 0
    if nproc > 1:
        from .launch import launch

        return launch(["train", recipe, *(overrides or ()), *(["--fresh"] if fresh else [])], nproc)
    from ..recipes.running.train import train

    outcome = train(recipe, overrides or (), fresh=fresh)
    if outcome.signal:
        return 128 + outcome.signal
    if outcome.trained:
        from ..reports.plot import plot_run

        plot_run(outcome.folder)
        parts = ("model", "checkpoints", "metrics.jsonl", "loss.png", "summary.json", "tensorboard")
        made = ", ".join(part for part in parts if (outcome.folder / part).exists())
        print(f"Everything is in {outcome.folder}: {made}")
    return 0


@app.command()
def prepare(recipe: Recipe, overrides: Overrides = None) -> None:
    """Fetch and tokenize what a recipe needs, so that it trains offline."""
    from ..recipes.running.prepare import prepare

    prepare(recipe, overrides or (), print)


@app.command(context_settings={"ignore_unknown_options": True})
def run(arguments: Annotated[list[str], typer.Argument(metavar="SCRIPT.py|-m MODULE")]) -> int:
    """Run a training script with optim='sophia' known to its Trainer.

    Runs a script or module as python does, with optim='sophia', 'sophia_g' and 'sophia_h' known to every
    transformers.Trainer in it. Also: torchrun … -m sophia_integrations run SCRIPT.py …
    """
    from ..hf.run import run

    return run(arguments)


@app.command()
def plot(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Such as runs/pretrain-gpt2-stdlib.")],
) -> None:
    """Draw loss.png of a run folder."""
    from ..reports.plot import plot_run

    print(plot_run(run_dir))


@app.command()
def schema(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="Write it there instead.")] = None,
    framework: Annotated[Literal["hf", "lightning"], typer.Option(help="Whose recipes to describe.")] = "hf",
) -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML.

    It holds our keys and those of the installed transformers, peft and lightning; validate judges by the same. In a
    recipe, the line '# yaml-language-server: $schema=FILE' points an editor to it.
    """
    import json

    from ..recipes.reading.schema_cache import document

    text = json.dumps(document(framework), indent=1, ensure_ascii=False)
    if file is None:
        print(text)
    else:
        file.write_text(text + "\n", encoding="utf-8")
        print(file)


@app.command()
def doctor(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, or any with a trainer_state.json or TensorBoard files.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> int:
    """Say what is off with a run, and which line of its recipe to edit.

    Exit code 0: nothing is off; 1: something is; 2: the folder cannot be read.
    """
    from ..reports.doctor import doctor

    return doctor(run, as_json)


@app.command()
def bench(
    what: Annotated[Literal["step", "pass", "train"], typer.Argument(help="What to time.")],
    size: Annotated[
        str | None, typer.Option(help="step: 10m, 124m; pass, train: small, long, wide, …-accumulated, 124m.")
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the parameters, in step.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch on the CPU.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")] = None,
    cycles: Annotated[int, typer.Option(help="Measured cycles of 10 steps.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Write the figures there as well.")] = None,
) -> None:
    """Time a step, a Hessian pass or a training step beside other optimizers, in turns."""
    from ..reports.bench import bench

    bench(what, size=size, dtype=dtype, threads=threads, device=device, cycles=cycles, json=json)


@app.command()
def compare(
    recipe: Recipe,
    against: Annotated[
        list[str] | None, typer.Option(metavar="NAME|RECIPE", help=f"{', '.join(RIVALS)}, or a recipe; repeatable.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="same (default), half, fit, or a YAML file with a section compare:"),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(help="Tuning runs of each optimizer (10). 4 to 7: rates alone, the best at all steps; 0: none."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="Of the runs that count; none tunes.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds; a run that takes longer has no loss.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many runs are left and how long.")] = False,
) -> int:
    """Train a recipe and the same with other optimizers, equally tuned, and say which needs fewer steps."""
    from ..reports.compare.comparison import compare

    return compare(recipe, against or ["adamw"], protocol, budget, seeds, dry_run, print, time_limit)
