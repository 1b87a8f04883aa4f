"""The JSON Schema of recipes as made once for the installed versions, kept in the user's cache folder.

With it at hand nothing heavy is imported.  A folder that cannot be written costs time, never the command.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from ...cache import cache_dir, digest, write_aside
from ...hf.arguments import NAMES

_PACKAGES = ("torch", "transformers", "peft", "lightning", "jsonargparse", "pydantic")
_PACKAGE = Path(__file__).parents[2]


def document(framework: str, model_type: str | None = None) -> dict[str, Any]:
    """The JSON Schema of a framework's recipes.

    Args:
        framework: ``hf`` or ``lightning``.
        model_type: adds the keys of this transformers config, where it is one that the framework's recipes may name.

    Raises ModuleNotFoundError when it has to be made and the framework is not installed.
    """
    found = _kept(f"schema-{framework}", lambda: _module().make(framework))
    section = found["$defs"]["config"]
    if model_type in section["properties"]["model_type"]["enum"]:
        keys = _kept(f"schema-config-{model_type}", lambda: _module().config(model_type))
        section["properties"] = {**keys, **section["properties"]}
        section["additionalProperties"] = False
    return found


def _module() -> Any:
    from . import json_schema

    return json_schema


def _kept(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, from the cache where it was made for the same versions."""
    stamp = _stamp()
    file = cache_dir() / f"{name}-{digest([str(_PACKAGE), *NAMES])[:8]}.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["stamp"] == stamp:
            return kept["schema"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, not readable or damaged: it is made anew
    made = make()
    text = json.dumps({"stamp": stamp, "schema": made})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_aside(file, lambda aside: aside.write_text(text, encoding="utf-8"))
    except OSError:
        pass
    return made


@functools.cache
def _stamp() -> str:
    """The versions that a document depends on; of this package the newest change, for it may be installed in place."""
    newest = max(file.stat().st_mtime_ns for file in _PACKAGE.rglob("*.py"))
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return ", ".join([*versions, f"sources {newest}"])
