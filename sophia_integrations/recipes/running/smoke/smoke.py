"""``--smoke``: any recipe in miniature, offline, on a CPU, in its own run folder: does it run at all, end to end?"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import UserError
from ..anywhere import read_anywhere
from ..folder import RunFolder
from ..processes import Processes
from ..train import Outcome, folder_and_settings, require_packages, require_packages_of, run_in
from .sizes import INTERVAL, LENGTH, LONGEST, ROWS, STEPS

if TYPE_CHECKING:
    from .data import Sample

INPUTS = "inputs"
_ONLY_ELSEWHERE = {
    "fp16", "fp16_full_eval", "bf16_full_eval", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "deepspeed", "fsdp", "fsdp_config", "use_liger_kernel", "push_to_hub", "hub_model_id", "hub_token", "ddp_backend",
    "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers", "auto_find_batch_size",
    "num_train_epochs", "warmup_ratio", "save_total_limit", "eval_delay", "run_name",
}  # fmt: skip


def smoke(file: str | os.PathLike[str], overrides: Sequence[str], say: Callable[[str], object]) -> Outcome:
    """Trains a recipe in miniature and says what that proves.

    The model keeps its class and options and loses its size; weights are random; some rows of the recipe's own data
    are used where it is on this machine.  Nothing is fetched.  Each call begins anew, in ``<run folder>-smoke``.

    Args:
        file: the recipe.
        overrides: ``key=value`` with dots in the key.
        say: receives the lines for the reader.

    Raises:
        UserError: what `train` would raise, as far as a run in miniature meets it; no estimate was made, or the loss
            was not finite.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    processes = Processes()
    if processes.count > 1:
        raise UserError("--smoke runs in one process; start it without torchrun or accelerate launch")
    require_packages()
    from transformers.utils.logging import disable_progress_bar

    draft, adapted = read_anywhere(file, overrides)
    lightning = draft.framework == "lightning"
    require_packages_of(lightning)
    folder, settings = folder_and_settings(adapted)
    target = RunFolder(folder.path.with_name(f"{folder.path.name}-smoke"), folder.setting)
    _clear(target)
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="sophia-smoke-") as place:
        if lightning:
            from .lightning import miniature
        else:
            miniature = _miniature
        small, changes = miniature(settings, Path(place))
        say("smoke test: the recipe in miniature. Changed for it:")
        for line in changes:
            say(f"  {line}")
        target.prepare()
        outcome = run_in(target.path, _moved(small, place, target.path / INPUTS), processes, say, bring=Path(place))
    if outcome.signal:
        return outcome
    summary = target.read_summary()
    estimates = summary.get("hessian_updates")
    if estimates is not None and estimates < 2:
        raise UserError(f"smoke test: {estimates} Hessian estimate(s) were made in {summary['steps']} steps")
    if summary.get("train_loss") is None:
        raise UserError("smoke test: the loss was not finite or not logged; see the lines above")
    for line in _verdict(estimates, target.path):
        say(line)
    return outcome


def _verdict(estimates: int | None, folder: Path) -> list[str]:
    passes = f", {estimates} Hessian estimates" if estimates is not None else ""
    return [
        f"smoke test passed. Proved: the recipe is read, its rows become batches, the model class, adapters and "
        f"optimizer fit each other, {STEPS} steps train{passes}, evaluation, checkpoints and the model are written "
        f"({folder}).",
        "Not proved: that it learns, that the full size fits the memory, its speed, and whatever is listed as changed. "
        "--dry-run works the full size out.",
    ]


def _miniature(settings: dict[str, Any], place: Path) -> tuple[dict[str, Any], list[str]]:
    """The recipe in miniature, its files in `place`, and what was changed."""
    from .data import sample

    small = copy.deepcopy(settings)
    task, data = small["task"], small["data"]
    rows = sample(data, task)
    changes = [f"data: {rows.note}"]
    _shrink_data(data, rows, place, changes)
    _shrink_model(small, task, rows, place, changes)
    small["training"] = _shrink_training(small["training"], changes)
    if "sample" in small:
        small["sample"]["max_new_tokens"] = min(16, small["sample"].get("max_new_tokens", 16))
    return small, changes


def _shrink_data(data: dict[str, Any], rows: Sample, place: Path, changes: list[str]) -> None:
    for key in ("source", "hub", "columns", "validation_fraction"):
        data.pop(key, None)
    data.update({key: [str(place / name) for name in names] for key, names in rows.write(place).items()})
    data["format"] = rows.format
    length = min(data["block_size"], LENGTH if rows.format == "text" else LONGEST)
    if length < data["block_size"]:
        changes.append(f"data.block_size: {data['block_size']} → {length}")
        data["block_size"] = length


def _shrink_model(small: dict[str, Any], task: str, rows: Sample, place: Path, changes: list[str]) -> None:
    from .model import VOCABULARY, small_config, smoke_model, smoke_tokenizer

    model, tokenizer = small["model"], small.get("tokenizer") or {}
    if "train" in tokenizer:
        if tokenizer["train"]["vocab_size"] > VOCABULARY:
            changes.append(f"tokenizer.train.vocab_size: {tokenizer['train']['vocab_size']:,} → {VOCABULARY}")
            tokenizer["train"]["vocab_size"] = VOCABULARY
    else:
        own = "pretrained" not in tokenizer
        words, note = smoke_tokenizer(
            model["pretrained"] if own else tokenizer["pretrained"], model if own else {}, rows, task, _made(place, "t")
        )
        changes.extend([note] if note else [])
        small["tokenizer"] = {"pretrained": str(place / "t")}
    if model.get("pretrained") is not None:
        if "train" in tokenizer:
            raise UserError("tokenizer.train: a pretrained model knows only its own tokens")
        small["model"], more = smoke_model(model, task, words, _made(place, "m"))
        changes.extend(more)
    else:
        model["config"], sizes = small_config(model["config"], task)
        if model["config"].pop("vocab_size", None) is not None:
            sizes.append("vocab_size as the tokenizer's")
        changes.extend([f"model.config: {', '.join(sizes)}"] if sizes else [])


def _shrink_training(training: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    small = {key: value for key, value in training.items() if key not in _ONLY_ELSEWHERE}
    dropped = [key for key in training if key in _ONLY_ELSEWHERE and training[key] not in (None, False, 0, "no")]
    if dropped:
        changes.append(f"training: without {', '.join(dropped)}")
    rows = min(ROWS, small.get("per_device_train_batch_size", 8))
    small.update(
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=16,
        gradient_accumulation_steps=min(2, small.get("gradient_accumulation_steps", 1)),
        warmup_steps=min(2, small.get("warmup_steps", 0)),
        logging_strategy="steps",
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=STEPS // 2,
        save_strategy="steps",
        save_steps=STEPS // 2,
        report_to=["tensorboard"],
    )
    done = f"{STEPS} steps of {rows} rows × {small['gradient_accumulation_steps']}, on the CPU"
    changes.append(f"training: {done}")
    if str(small.get("optim", "")).startswith("sophia"):
        small["optim_args"] = _often(small.get("optim_args"), changes)
    return small


def _often(optim_args: Any, changes: list[str]) -> str:
    """The optimizer's arguments with a Hessian pass every few steps."""
    parts = [part for part in str(optim_args or "").replace(" ", "").split(",") if part]
    kept = [part for part in parts if not part.startswith("hessian_interval=")]
    given = next((int(part.partition("=")[2]) for part in parts if part not in kept), 10)
    if given > INTERVAL:
        changes.append(f"hessian_interval: {given} → {INTERVAL}")
    return ",".join([*kept, f"hessian_interval={min(given, INTERVAL)}"])


def _clear(folder: RunFolder) -> None:
    """Takes away an earlier smoke test; raises `UserError` when the folder is anything else."""
    if not folder.path.exists() and not folder.path.is_symlink():
        return
    if not (folder.path / INPUTS).is_dir() and any(folder.path.iterdir()):
        raise UserError(
            f"{folder.path} is in the way of the smoke test and not its own; move it, or set {folder.setting}"
        )
    if (folder.path / ".lock").is_file():
        with folder.lock():
            shutil.rmtree(folder.path)
    else:
        shutil.rmtree(folder.path)


def _made(place: Path, name: str) -> Path:
    (place / name).mkdir()
    return place / name


def _moved(value: Any, old: str, new: Path) -> Any:
    """A nested value with every path below `old` below `new` instead."""
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, old, new) for item in value]
    return str(new.absolute()) + value[len(old) :] if isinstance(value, str) and value.startswith(old) else value
