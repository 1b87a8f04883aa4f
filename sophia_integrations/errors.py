"""What the person who typed the command is told: errors whose text is meant for them, and how they are worded."""

from __future__ import annotations

from collections.abc import Collection, Sequence


class UserError(Exception):
    """A mistake or a condition of the machine that the user can mend; the message is one clear sentence."""


class RecipeError(UserError):
    """Every problem of a recipe at once; ``problems`` holds one line each, beginning with its place."""

    def __init__(self, problems: Sequence[object]) -> None:
        self.problems = [str(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


def nearest(word: str, known: Collection[str], cutoff: float = 0.6) -> str | None:
    """The known word that is most like `word`; None where none reaches `cutoff`, a likeness from 0 to 1."""
    import difflib

    return next(iter(difflib.get_close_matches(word, sorted(known), n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, known: Collection[str]) -> str:
    """``, did you mean 'x'?`` or, with nothing near and few known words, ``; known: a, b``."""
    near = nearest(word, known)
    if near is not None:
        return f", did you mean {near!r}?"
    return f"; known: {', '.join(sorted(known))}" if 0 < len(known) <= 12 else ""


def one_line(error: BaseException) -> str:
    """Another library's error in one line: its text without line breaks; its type where it has none."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error whose further lines explain or advise; its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def needs(package: str, extra: str = "recipes") -> str:
    """The sentence about a package that is not installed, and the extra of ours that brings it."""
    return f"this needs {package}, which is not installed: pip install 'sophia-integrations[{extra}]'"
