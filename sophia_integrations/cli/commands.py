"""The command ``sophia``: one function per verb, imports inside it, no logic of its own.

Exit codes: 0 done; 2 a mistake or condition the user can mend, said in one message; 130 and 143 stopped by
Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from . import completion
from .arguments import Parser, parse

_EXTRA = {
    "yaml", "pydantic", "torch", "transformers", "accelerate", "tokenizers", "numpy", "matplotlib", "tensorboard",
    "tqdm", "safetensors", "datasets", "shtab",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; `argv` defaults to the process's own arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["run"] and words[1:2] not in (["-h"], ["--help"]):
        return _run(words[1:])
    arguments = parse(build_parser(), words)
    verb: Callable[[argparse.Namespace], int] = arguments.verb
    try:
        return verb(arguments)
    except KeyboardInterrupt:
        print("Stopped; whatever was saved is kept. To go on, run the same command again.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe went away, as `head` does
        return 141
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = "lightning" if package in ("lightning", "jsonargparse") else "recipes" if package in _EXTRA else None
        if extra is None:
            raise
        return _complain(f"this needs {package}, which is not installed: pip install 'sophia-integrations[{extra}]'")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}")
    except Exception as error:
        from ..errors import UserError

        if not isinstance(error, UserError):
            raise
        return _complain(str(error))


def _complain(message: str) -> int:
    if message:
        print(message, file=sys.stderr)
    return 2


def build_parser() -> Parser:
    """The command line: every verb with its arguments and help."""
    parser = Parser(
        prog="sophia",
        description="Sophia in the training loop you already have.",
        epilog="sophia VERB --help tells more. To complete words with the Tab key, once per shell: "
        'eval "$(sophia completion bash)"',
    )
    parser.add_argument("--version", action=_Version)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=Parser)

    ls = verbs.add_parser("ls", help="list the recipes that come with the package")
    ls.set_defaults(verb=_ls)

    show = verbs.add_parser("show", help="print a recipe resolved, with where each value comes from")
    _add_recipe(show)
    show.set_defaults(verb=_show)

    cp = verbs.add_parser("cp", help="copy a recipe to change it; never overwrites")
    name = cp.add_argument("recipe", metavar="NAME", help="a recipe that sophia ls lists, or a path")
    name.complete = completion.RECIPE  # type: ignore[attr-defined]
    dest = cp.add_argument("dest", metavar="DEST", nargs="?", default=".", help="a file or folder (default: here)")
    dest.complete = completion.FILE  # type: ignore[attr-defined]
    cp.set_defaults(verb=_cp)

    validate = verbs.add_parser(
        "validate",
        help="check a recipe without training; reports every problem at once",
        description="Checks names, types and combinations without importing torch; nothing of the recipe is run.",
    )
    _add_recipe(validate)
    validate.add_argument("--deep", action="store_true", help="build data, model, Trainer and optimizer too")
    validate.set_defaults(verb=_validate)

    train = verbs.add_parser("train", help="train a recipe, or go on with an interrupted run of it")
    _add_recipe(train)
    train.add_argument("--fresh", action="store_true", help="start in a new numbered folder")
    how = train.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="build everything, say what training would take, and stop")
    how.add_argument("--smoke", action="store_true", help="train a tiny version: two minutes on a CPU for any recipe")
    train.add_argument("--nproc", type=int, metavar="N", help="train in N processes of this machine, one per GPU")
    train.set_defaults(verb=_train)

    prepare = verbs.add_parser("prepare", help="fetch and tokenize what a recipe needs, so that it trains offline")
    _add_recipe(prepare)
    prepare.set_defaults(verb=_prepare)

    run = verbs.add_parser(
        "run",
        help="run a training script with optim='sophia' known to its Trainer",
        usage="%(prog)s SCRIPT.py [ARGUMENT ...]\n       %(prog)s -m MODULE [ARGUMENT ...]",
        description="Runs a script or module as python does, with optim='sophia', 'sophia_g' and 'sophia_h' known to "
        "every transformers.Trainer in it. Also: torchrun … -m sophia_integrations run SCRIPT.py …",
    )
    run.set_defaults(verb=None)

    plot = verbs.add_parser("plot", help="draw loss.png of a run folder")
    run_dir = plot.add_argument("run_dir", metavar="RUN_DIR", help="a run folder, such as runs/pretrain-gpt2-stdlib")
    run_dir.complete = completion.FOLDER  # type: ignore[attr-defined]
    plot.set_defaults(verb=_plot)

    schema = verbs.add_parser(
        "schema",
        help="print the JSON Schema of recipes, for editors that complete and check YAML",
        description="The schema holds our keys and those of the installed transformers, peft and lightning. In a "
        "recipe, the line '# yaml-language-server: $schema=FILE' points an editor to it.",
    )
    file = schema.add_argument("file", metavar="FILE", nargs="?", help="write it there instead of printing it")
    file.complete = completion.FILE  # type: ignore[attr-defined]
    schema.add_argument(
        "--framework", choices=("hf", "lightning"), default="hf", help="whose recipes to describe (default: hf)"
    )
    schema.set_defaults(verb=_schema)

    complete = verbs.add_parser(
        "completion",
        help="print a script that completes this command's words in a shell",
        description='For bash: eval "$(sophia completion bash)" in ~/.bashrc. For zsh: '
        "sophia completion zsh > ~/.zfunc/_sophia, with that folder in fpath.",
    )
    complete.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    complete.set_defaults(verb=_completion)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument("recipe", metavar="RECIPE", help="a path, or a name that sophia ls lists")
    recipe.complete = completion.RECIPE  # type: ignore[attr-defined]
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as training.max_steps=50")


class _Version(argparse.Action):
    """Prints the version; the package is imported only then."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from .. import __version__

        print(f"sophia-integrations {__version__}")
        parser.exit()


def _ls(arguments: argparse.Namespace) -> int:
    import shutil

    from ..recipes.catalog import listing

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(listing(width), end="")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from ..recipes.reading.loader import read
    from ..recipes.reading.origins import describe_origins

    draft = read(arguments.recipe, arguments.overrides)
    draft.raise_problems()
    print(describe_origins(draft), end="")
    return 0


def _cp(arguments: argparse.Namespace) -> int:
    from ..recipes.catalog import copy

    for path in copy(arguments.recipe, arguments.dest):
        print(path)
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    from ..recipes.reading.loader import read

    if arguments.deep:
        from ..recipes.running.dry_run import dry_run

        dry_run(arguments.recipe, arguments.overrides, lambda line: None)
        print(f"{arguments.recipe}: valid, and everything but the training was built")
        return 0
    read(arguments.recipe, arguments.overrides).raise_problems()
    print(f"{arguments.recipe}: valid")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    recipe, overrides = arguments.recipe, arguments.overrides
    if arguments.dry_run:
        from ..recipes.running.dry_run import dry_run

        dry_run(recipe, overrides, print, arguments.nproc or 1)
        return 0
    if arguments.smoke:
        from ..recipes.running.smoke.smoke import smoke

        if arguments.nproc is not None:
            return _complain("--smoke runs in one process; leave --nproc out")
        return _ended(smoke(recipe, overrides, print))
    if arguments.nproc is not None:
        from ..recipes.running.launch import launch

        fresh = ["--fresh"] if arguments.fresh else []
        return launch(["train", recipe, *overrides, *fresh], arguments.nproc)
    from ..recipes.running.train import train

    return _ended(train(recipe, overrides, fresh=arguments.fresh))


def _ended(outcome: object) -> int:
    if outcome.signal:
        return 128 + outcome.signal
    if outcome.trained:
        from ..reports.plot import plot_run

        plot_run(outcome.folder)
        parts = ("model", "checkpoints", "metrics.jsonl", "loss.png", "summary.json", "tensorboard")
        made = ", ".join(part for part in parts if (outcome.folder / part).exists())
        print(f"Everything is in {outcome.folder}: {made}")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from ..recipes.running.prepare import prepare

    prepare(arguments.recipe, arguments.overrides, print)
    return 0


def _run(words: list[str]) -> int:
    """Outside `main`'s error handling: a script's exceptions and signals are its own."""
    from ..hf.run import run

    return run(words)


def _plot(arguments: argparse.Namespace) -> int:
    from ..reports.plot import plot_run

    print(plot_run(arguments.run_dir))
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from ..recipes.reading.editors import schema_text

    text = schema_text(arguments.framework)
    if arguments.file is None:
        print(text, end="")
    else:
        with open(arguments.file, "w", encoding="utf-8") as file:
            file.write(text)
        print(arguments.file)
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    print(completion.script(build_parser(), arguments.shell), end="")
    return 0
