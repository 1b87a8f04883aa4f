"""Data and a recipe of a small fine-tuning, offline: which package of the standard library does a function come from?

sophia train recipes/compare/gpt2-131k-x4.yaml          # the checkpoint, runs/gpt2-131k-x4/model
python tests/measurements/which_package.py              # runs/which-package/: functions.jsonl, which-package.yaml
sophia compare runs/which-package/which-package.yaml --against adamw
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from sophia_integrations.text.files import standard_library

PACKAGES = 8
LINES = range(5, 60)
RECIPE = """\
# Which package of the standard library does a function come from?  Written by tests/measurements/which_package.py.
framework: hf
task: classify
model: {{pretrained: {checkpoint}}}
data: {{files: [{data}], block_size: 64, validation_fraction: 0.2}}
training:
  optim: sophia_eigen
  learning_rate: 1e-3
  lr_scheduler_type: linear
  warmup_steps: 30
  weight_decay: 0.1
  max_grad_norm: 1.0
  max_steps: 300
  per_device_train_batch_size: 32
  per_device_eval_batch_size: 256
  logging_steps: 10
  eval_strategy: steps
  eval_steps: 0.25
  save_strategy: "no"
  use_cpu: true
  seed: 0
"""


def functions(modules: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The functions of the packages that have most of them.

    Args:
        modules: path below the standard library, and text.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for name, text in modules:
        package, below, _ = name.partition("/")
        if below:
            found[package] += _functions(text)
    return {package: found[package] for package in sorted(found, key=lambda name: -len(found[name]))[:PACKAGES]}


def _functions(text: str) -> Iterator[str]:
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 in LINES:
            yield "\n".join(lines[node.lineno - 1 : node.end_lineno])


def main() -> None:
    """Writes both files and says how many functions there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/gpt2-131k-x4/model", help="a causal language model's folder")
    parser.add_argument("--out", type=Path, default=Path("runs/which-package"), help="folder to write to")
    given = parser.parse_args()
    library = standard_library()
    found = functions((name, row["text"]) for name, row in library.read(library.files))
    given.out.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "label": package} for package, texts in found.items() for text in texts]
    data, recipe = given.out / "functions.jsonl", given.out / "which-package.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe.write_text(RECIPE.format(checkpoint=given.checkpoint, data=data), encoding="utf-8")
    print(f"{data}: {len(rows)} functions, " + ", ".join(f"{name} {len(texts)}" for name, texts in found.items()))
    print(f"sophia compare {recipe} --against adamw")


if __name__ == "__main__":
    main()
