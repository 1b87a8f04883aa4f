"""argparse with the nearest word for a mistyped one, and with options anywhere among the other arguments."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` without abbreviations, whose complaints name the nearest known word."""

    def __init__(self, *positional: Any, **options: Any) -> None:
        super().__init__(*positional, allow_abbrev=False, **options)
        self.verbs: dict[str, Parser] = {}

    def add_subparsers(self, **options: Any) -> Any:
        """As in argparse; keeps the parsers of the verbs in `verbs`."""
        made = super().add_subparsers(**options)
        self.verbs = made.choices
        return made

    def error(self, message: str) -> NoReturn:
        """Exits with code 2; a value outside its choices is answered with the nearest choice."""
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong:
            message += nearest(wrong[1], re.findall(r"[\w-]+", wrong[2]))
        missing = "the following arguments are required: "
        if message.startswith(missing):  # intermixed parsing counts those that may be left out among them
            optional = {action.metavar for action in self._actions if action.nargs in ("*", "?")}
            message = missing + ", ".join(name for name in message[len(missing) :].split(", ") if name not in optional)
        super().error(message)


def parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Parses the words after ``sophia``; exits with code 2 and one sentence on a mistake."""
    if not words or words[0].startswith("-"):
        return parser.parse_args(words)
    verb, *rest = words
    if verb not in parser.verbs:
        if verb.endswith((".yaml", ".yml")):
            parser.error(f"no verb before {verb}: did you mean '{parser.prog} train {verb}'?")
        parser.error(f"unknown verb {verb!r}{nearest(verb, parser.verbs)}")
    chosen = parser.verbs[verb]
    arguments, unknown = chosen.parse_known_intermixed_args(rest)
    if unknown:
        options = re.findall(r"--[a-z][\w-]*", chosen.format_usage())
        chosen.error(f"unknown argument {unknown[0]!r}{nearest(unknown[0].partition('=')[0], [*options, '--help'])}")
    return arguments


def nearest(word: str, known: Collection[str]) -> str:
    """``, did you mean 'x'?``, or nothing when no known word is near."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""
