"""``--dry-run``: everything but the training, and what the training would take; the model stays without numbers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .anywhere import read_anywhere
from .folder import RunFolder
from .train import folder_and_settings, require_packages, require_packages_of


def dry_run(
    file: str | os.PathLike[str], overrides: Sequence[str], say: Callable[[str], object], nproc: int = 1
) -> None:
    """Builds what `train` would build, and says what it would take.

    Reads and tokenizes the data (the cache keeps that), builds the model from its shapes alone, asks the optimizer for
    its state, and writes no run folder.

    Args:
        file: the recipe.
        overrides: ``key=value`` with dots in the key.
        say: receives the lines for the reader.
        nproc: work it out for so many processes; a Lightning recipe says how many by itself.

    Raises:
        UserError: what `train` would raise before training.
    """
    require_packages()
    draft, adapted = read_anywhere(file, overrides)
    require_packages_of(draft.framework == "lightning")
    folder, asked = folder_and_settings(draft)
    folder.require_same(asked)
    settings = folder_and_settings(adapted)[1]
    if draft.framework == "lightning":
        from .lightning.dry_run import build_plan
    else:
        build_plan = _build_plan
    with tempfile.TemporaryDirectory(prefix="sophia-dry-run-") as place:
        aside = RunFolder(Path(place) / "run", folder.setting)
        aside.path.mkdir()
        for line in build_plan(settings, aside, folder, say, nproc):
            say(line)
    say("Nothing was trained, and no run folder written.")


def _build_plan(
    settings: dict[str, Any], aside: RunFolder, folder: RunFolder, say: Callable[[str], object], nproc: int
) -> list[str]:
    from ..reading.schema import Recipe
    from .batch_text import describe_batch, first_batch
    from .data import load_data
    from .memory import groups_of, optimizer_maker, weigh
    from .model import empty_model
    from .plan import Batch, Plan, checkpoints_kept, disk_in_words, length_of, passes_of
    from .run import refused_optimizer
    from .trainer import build_arguments

    recipe = Recipe.model_validate(settings)
    arguments = build_arguments(recipe.training, aside)
    tokenizer, data = load_data(recipe, aside, arguments.seed, say)
    say(data.describe())
    model = empty_model(recipe.model, recipe.task, tokenizer, data)
    with refused_optimizer():
        _make_optimizer(arguments, model)
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    rows = len(data.train) if "train" in data.counts else None  # type: ignore[arg-type]
    length = length_of(arguments, rows, nproc)
    plan = Plan(
        model.config.model_type,
        optimizer,
        weigh(model, optimizer_maker(arguments), groups_of(arguments, model)),
        Batch(
            arguments.train_batch_size,
            arguments.gradient_accumulation_steps,
            nproc,
            data.tokens_per_row,
        ),
        length,
        passes_of(optimizer, recipe.training),
        checkpoints_kept(arguments, length),
    )
    batch = first_batch(data, arguments.train_batch_size, arguments.seed)
    shown = describe_batch(batch, tokenizer, data.labels, answers=recipe.task == "seq2seq")
    return [*shown, *plan.describe(), disk_in_words(plan, folder)]


def _make_optimizer(arguments: Any, model: Any) -> None:
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    trained = options.pop("params", None) or [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind(trained, **options)
