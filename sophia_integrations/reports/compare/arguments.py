"""The words of the verb `compare`, light enough for every call of the command line."""

from __future__ import annotations

from typing import Any

NAMES = ("adamw", "lion", "adahessian", "soap", "muon", "sign", "sophia", "sophia_eigen")
"""The optimizers that a recipe can be compared with by name; `rivals.RIVALS` says what each is."""

ARGUMENTS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("recipe",), {"metavar": "RECIPE", "help": "a path, or a name that sophia ls lists"}),
    (
        ("--against",),
        {
            "metavar": "NAME",
            "nargs": "+",
            "default": ["adamw"],
            "help": f"{', '.join(NAMES)}, or the files of recipes (default: adamw)",
        },
    ),
    (
        ("--protocol",),
        {"metavar": "NAME", "help": "same, half or fit, or a YAML file with a section compare: (default: same)"},
    ),
    (("--budget",), {"type": int, "metavar": "N", "help": "tuning runs of each optimizer; 0 tunes nothing"}),
    (("--seeds",), {"metavar": "0,1,2", "help": "of the runs that count; none of them tunes"}),
    (("--time-limit",), {"type": float, "metavar": "SECONDS", "help": "of a run; one that takes longer has no loss"}),
    (
        ("--dry-run",),
        {"action": "store_true", "help": "measure a step of each optimizer, say how many runs and how long, and stop"},
    ),
]
"""The words of the verb, for argparse's `add_argument`; `compare` takes them by the same names."""
