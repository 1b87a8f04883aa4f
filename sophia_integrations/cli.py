"""The command ``sophia``: one function per verb, imports inside it, no logic of its own.

Exit codes: 0 done; 2 a mistake or condition the user can mend, said in one message; 130 and 143 stopped by
Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

_EXTRA = {"yaml", "pydantic", "torch", "transformers", "accelerate", "tokenizers", "numpy", "matplotlib", "tensorboard", "tqdm", "safetensors"}  # noqa: E501  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; `argv` defaults to the process's own arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["run"] and words[1:2] not in (["-h"], ["--help"]):
        return _run(words[1:])
    arguments = _parser().parse_args(words)
    verb: Callable[[argparse.Namespace], int] = arguments.verb
    try:
        return verb(arguments)
    except KeyboardInterrupt:
        print("Stopped; whatever was saved is kept. To go on, run the same command again.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        return _complain(f"this needs {package}, which is not installed: pip install 'sophia-integrations[recipes]'")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}")
    except Exception as error:
        from .errors import UserError

        if not isinstance(error, UserError):
            raise
        return _complain(str(error))


def _complain(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sophia", description="Sophia in the training loop you already have.")
    parser.add_argument("--version", action=_Version)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    train = verbs.add_parser("train", help="train a recipe, or go on with an interrupted run of it")
    _add_recipe(train)
    train.add_argument("--fresh", action="store_true", help="start in a new numbered folder")
    train.set_defaults(verb=_train)

    validate = verbs.add_parser("validate", help="check a recipe without training; reports every problem at once")
    _add_recipe(validate)
    validate.set_defaults(verb=_validate)

    run = verbs.add_parser(
        "run",
        help="run a training script with optim='sophia' known to its Trainer",
        usage="%(prog)s SCRIPT.py [ARGUMENT ...]\n       %(prog)s -m MODULE [ARGUMENT ...]",
        description="Runs a script or module as python does, with optim='sophia', 'sophia_g' and 'sophia_h' known to "
        "every transformers.Trainer in it. Also: torchrun … -m sophia_integrations run SCRIPT.py …",
    )
    run.set_defaults(verb=None)

    plot = verbs.add_parser("plot", help="draw loss.png of a run folder")
    plot.add_argument("run_dir", metavar="RUN_DIR", help="a run folder, such as runs/pretrain-gpt2-stdlib")
    plot.set_defaults(verb=_plot)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe, such as recipes/hf/pretrain-gpt2-stdlib.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as training.max_steps=50")


class _Version(argparse.Action):
    """Prints the version; the package is imported only then."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from . import __version__

        print(f"sophia-integrations {__version__}")
        parser.exit()


def _train(arguments: argparse.Namespace) -> int:
    from .recipes.running.train import train

    outcome = train(arguments.recipe, arguments.overrides, fresh=arguments.fresh)
    if outcome.signal:
        return 128 + outcome.signal
    if outcome.trained:
        from .reports.plot import plot_run

        plot_run(outcome.folder)
        print(f"Everything is in {outcome.folder}: model, metrics.jsonl, loss.png, summary.json, tensorboard")
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    from .recipes.reading.loader import check, read
    from .recipes.running.train import require_packages

    draft = read(arguments.recipe, arguments.overrides)
    require_packages()
    check(draft)
    print(f"{arguments.recipe}: valid")
    return 0


def _run(words: list[str]) -> int:
    """Outside `main`'s error handling: a script's exceptions and signals are its own."""
    from .hf.run import run

    return run(words)


def _plot(arguments: argparse.Namespace) -> int:
    from .reports.plot import plot_run

    print(plot_run(arguments.run_dir))
    return 0
