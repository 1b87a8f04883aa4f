"""The command line `sophia`."""

from .commands import main

__all__ = ["main"]
