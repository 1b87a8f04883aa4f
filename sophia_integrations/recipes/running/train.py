"""One run, from recipe to summary: checks, data, model, a plain ``transformers.Trainer``, and going on after a stop."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ..reading.loader import Draft, check, read
from .folder import RunFolder, choose_folder, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...text.documents import Corpus
    from ..reading.schema import Tokenizer

NEEDED = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "tqdm", "tensorboard")
_CORPUS = {"source", "files", "validation_files", "validation_fraction"}


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: the folder, and the signal that stopped it (0 when the run is complete)."""

    folder: Path
    signal: int = 0
    trained: bool = True


def require_packages(names: Sequence[str] = NEEDED) -> None:
    """Raises `UserError` naming the packages of the recipes extra that are not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"recipes need {', '.join(missing)}, not installed here: pip install 'sophia-integrations[recipes]'"
        )


def train(
    file: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    fresh: bool = False,
    say: Callable[[str], object] = print,
) -> Outcome:
    """Trains a recipe, goes on with an interrupted run of it, or says that it is complete.

    Args:
        file: the recipe.
        overrides: ``key=value`` with dots in the key.
        fresh: start in a new numbered folder instead of going on.
        say: receives the lines for the reader.

    Raises:
        UserError: anything the user can mend; before training where it can be known then.
    """
    draft = read(file, overrides)
    if draft.recipe is not None and not fresh:
        folder, settings = choose_folder(draft.recipe, draft.file, fresh=False), resolve(draft.recipe)
        if folder.complete:
            folder.require_same(settings)
            loss = folder.read_summary().get("validation_loss")
            shown = "not finite" if loss is None else f"{loss:.4f}"
            say(f"{folder.path} is complete: validation loss {shown}. To train anew, add --fresh.")
            return Outcome(folder.path, trained=False)
    require_packages()
    recipe = check(draft)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("recipes train in one process; start this without torchrun (WORLD_SIZE is set)")
    folder, settings = choose_folder(recipe, draft.file, fresh=fresh), resolve(recipe)
    folder.require_same(settings)
    folder.prepare()
    with folder.lock():
        folder.claim(settings)
        return _run(draft, folder, settings, say)


def _run(draft: Draft, folder: RunFolder, settings: dict[str, Any], say: Callable[[str], object]) -> Outcome:
    from ...text.blocks import build_blocks
    from ...text.documents import load_corpus
    from ...text.tokenizer import load_tokenizer
    from ..reading.schema import Recipe
    from .checkpoints import last_good
    from .finish import finish
    from .model import build_model, load_model
    from .trainer import build_arguments, build_trainer

    recipe = Recipe.model_validate(settings)
    arguments = build_arguments(recipe.training, folder)
    corpus = load_corpus(**recipe.data.model_dump(include=_CORPUS))
    if corpus.skipped:
        say(f"Skipping {len(corpus.skipped)} files that are not text in their declared encoding.")
    if folder.tokenizer.is_dir():
        tokenizer = load_tokenizer(str(folder.tokenizer))
    else:
        tokenizer = _build_tokenizer(recipe.tokenizer, corpus, say)
    splits = build_blocks(corpus, tokenizer, recipe.data.block_size, say)
    folder.require_same_data(splits.to_json())
    say(splits.describe())

    checkpoint = last_good(folder.path, say)
    model = build_model(recipe.model, tokenizer, arguments.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _require_room(folder.path, parameters, arguments)
    if not folder.tokenizer.is_dir():
        _save_tokenizer(tokenizer, folder)
    say(f"model: {model.config.model_type}, {parameters:,} parameters, optimizer {_word(arguments.optim)}")
    if checkpoint is not None and checkpoint.finished:
        best = checkpoint.state.get("best_model_checkpoint") if arguments.load_best_model_at_end else None
        model = load_model(best or str(checkpoint.path), tokenizer)
    trainer, watch = build_trainer(model, tokenizer, splits, arguments, folder)
    if checkpoint is not None and checkpoint.finished:
        trainer.state.global_step = trainer.state.max_steps = checkpoint.step
        trainer.state.epoch = checkpoint.state["epoch"]
        watch.metrics.resume_at(checkpoint.step)
    else:
        _create_optimizer(trainer)
    if checkpoint is None or not checkpoint.finished:
        say(f"resuming from {checkpoint.path}" if checkpoint else f"training in {folder.path}")
        try:
            with watch.stop.listening():
                trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        except Exception as error:
            if _disk_trouble(error):
                raise UserError(
                    f"{folder.path} could not be written in training ({_reason(error)}); make room and run the same "
                    "command again: it goes on from the last whole checkpoint"
                ) from None
            raise
        if watch.stop.signal is not None and trainer.state.global_step < trainer.state.max_steps:
            say(f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, checkpoint saved in "
                f"{folder.path}. To go on, run the same command again.")  # fmt: skip
            return Outcome(folder.path, watch.stop.signal)
    finish(recipe, trainer, tokenizer, splits, folder, watch, say)
    return Outcome(folder.path)


def _build_tokenizer(wanted: Tokenizer, corpus: Corpus, say: Callable[[str], object]) -> PreTrainedTokenizerBase:
    from ...text.tokenizer import load_tokenizer, train_tokenizer

    if wanted.pretrained is not None:
        return load_tokenizer(wanted.pretrained)
    assert wanted.train is not None
    return train_tokenizer(corpus.train, wanted.train.vocab_size, wanted.train.min_frequency, say)


def _create_optimizer(trainer: Any) -> None:
    """Makes the Trainer build its optimizer now, so that arguments it refuses are known before training."""
    try:
        trainer.create_optimizer()
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training.optim, training.optim_args: {_reason(error)}") from None


def _save_tokenizer(tokenizer: Any, folder: RunFolder) -> None:
    aside = folder.path / ".tokenizer"
    shutil.rmtree(aside, ignore_errors=True)
    tokenizer.save_pretrained(aside)
    aside.rename(folder.tokenizer)


def _require_room(path: Path, parameters: int, arguments: Any) -> None:
    """Refuses to start when the disk cannot hold the checkpoints kept at once (weights and two moments, fp32)."""
    kept = (arguments.save_total_limit or 1) + 1
    needed = parameters * 4 * (3 * kept + 1)
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"{path}: the run needs about {needed / 1e9:.2f} GB for its checkpoints and the disk has "
            f"{free / 1e9:.2f} GB free; make room or choose another folder with run_dir=PATH"
        )


def _disk_trouble(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    text = str(error)
    return any(sign in text for sign in ("PytorchStreamWriter", "No space left", "File too large", "StorageFull"))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def _word(option: Any) -> str:
    return str(getattr(option, "value", option))
