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
