"""The names of optimizers that `compare` knows, light enough for every call of the command line."""

from __future__ import annotations

NAMES = ("adamw", "lion", "adahessian", "soap", "muon", "sign", "sophia", "sophia_eigen")
"""The optimizers that a recipe can be compared with by name; `rivals.RIVALS` says what each is."""
