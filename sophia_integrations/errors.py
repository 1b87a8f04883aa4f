"""Errors whose text is meant for the person who typed the command: what, where, what to do."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mistake or a condition of the machine that the user can mend; the message is one clear sentence."""


class RecipeError(UserError):
    """Every problem of a recipe at once; ``problems`` holds one line each, beginning with its place."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def one_line(error: BaseException) -> str:
    """The error's own words in one line; its type where it has none."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error whose further lines explain or advise; its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
