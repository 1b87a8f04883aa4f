"""Reading a recipe away from the machine it is meant for: nothing is refused because this one has no GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..reading.draft import Draft
from ..reading.loader import check, read

_GPU_ONLY = ("fp16", "fp16_full_eval", "tf32", "torch_compile")


def read_anywhere(file: str | os.PathLike[str], overrides: Sequence[str]) -> tuple[Draft, Draft]:
    """The recipe as it stands, checked lightly, and as this machine can take it, checked in full.

    Raises `UserError` for every problem that is none of the machine's.
    """
    draft = read(file, overrides)
    draft.raise_problems()
    adapted = read(file, [*overrides, *_adaptations(draft)])
    check(adapted)
    return draft, adapted


def _adaptations(draft: Draft) -> list[str]:
    import torch

    if draft.recipe is None or torch.cuda.is_available():
        return []
    training = draft.recipe.training
    words = [] if "use_cpu" in training else ["training.use_cpu=true"]
    return words + [f"training.{name}=false" for name in _GPU_ONLY if training.get(name)]
