"""What editors get to complete and check recipes with: a JSON Schema for each framework."""

from __future__ import annotations

import json


def schema_text(framework: str) -> str:
    """The JSON Schema of a framework's recipes, with the words of the packages installed here."""
    if framework == "lightning":
        from .lightning_schema import lightning_schema as made
    else:
        from .json_schema import recipe_schema as made
    return json.dumps(made(), indent=1, ensure_ascii=False) + "\n"
