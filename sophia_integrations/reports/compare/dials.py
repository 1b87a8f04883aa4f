"""What a comparison turns in a recipe, whichever framework it is for: rate, decay, β₁, seed and horizon.

A recipe is a mapping as the loader resolves it; every function returns a changed copy.
"""

from __future__ import annotations

import copy
import os
from typing import Any, Protocol

from ...errors import UserError
from ...recipes.reading.loader import read

Settings = dict[str, Any]
OURS = "compare_"
"""How ``training.optim`` begins of the rivals that only a comparison's runs know."""
OWN_OPTIM_ARGS = ("sophia", OURS)
"""Optimizers whose β₁ stands in ``optim_args``; the others' is ``adam_beta1``."""
_NO_DECAY = ("constant", "constant_with_warmup", "reduce_lr_on_plateau")


def load(recipe: str | os.PathLike[str]) -> Settings:
    """A recipe's values, with its base and its defaults.  Raises `UserError` with all its problems."""
    return copy.deepcopy(read(recipe).settings)


class Dials(Protocol):
    """One framework's places for what a comparison turns."""

    folder_key: str

    def prepare(self, settings: Settings) -> Settings:
        """Without what a comparison decides itself; raises `UserError` for what cannot be compared."""

    def get(self, settings: Settings, dial: str) -> float:
        """The value of ``rate``, ``weight_decay`` or ``beta1``; raises `UserError` when the recipe has no rate."""

    def set(self, settings: Settings, dial: str, value: float) -> Settings:
        """With that value."""

    def with_seed(self, settings: Settings, seed: int) -> Settings:
        """With initial weights and an order of the data of that seed."""

    def with_horizon(self, settings: Settings, share: float) -> Settings:
        """A run of that share of the length, its whole schedule with it."""

    def measured(self, settings: Settings, steps: int, logs: int) -> Settings:
        """A short run of which only the time is wanted: logged every `logs` steps, evaluated at its end alone."""

    def length(self, settings: Settings) -> tuple[int | None, float | None]:
        """Optimizer steps, or where they follow from them, epochs."""

    def evaluations(self, settings: Settings, steps: int) -> int:
        """How often a run of `steps` is evaluated."""

    def interval(self, settings: Settings) -> int:
        """Steps after which the price of a step repeats."""


def dials_of(settings: Settings) -> Dials:
    """Those of the recipe's framework."""
    return _HF if settings.get("framework") == "hf" else _LIGHTNING


class _HfDials:
    folder_key = "run_dir"

    def prepare(self, settings: Settings) -> Settings:
        new = copy.deepcopy(settings)
        new.pop("run_dir", None)
        new.pop("sample", None)
        training = new["training"]
        kind = training.get("lr_scheduler_type", "linear")
        if kind in _NO_DECAY:
            raise UserError(
                f"training.lr_scheduler_type: {kind} does not decay to an end, and runs are judged after their whole "
                "decay: use cosine or linear"
            )
        for key in ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"):
            training.pop(key, None)
        return new

    def get(self, settings: Settings, dial: str) -> float:
        training = settings["training"]
        if dial == "rate":
            if "learning_rate" not in training:
                raise UserError("training.learning_rate: give one: the rates that are tried lie around it")
            return float(training["learning_rate"])
        if dial == "weight_decay":
            return float(training.get("weight_decay", 0.0))
        optim = str(training.get("optim", ""))
        if optim.startswith(OWN_OPTIM_ARGS):
            return float(optim_args(training).get("beta1", _beta1_of(optim)))
        return float(training.get("adam_beta1", 0.9))

    def set(self, settings: Settings, dial: str, value: float) -> Settings:
        new = copy.deepcopy(settings)
        training = new["training"]
        if dial == "beta1" and str(training.get("optim", "")).startswith(OWN_OPTIM_ARGS):
            set_optim_args(training, beta1=value)
        else:
            key = {"rate": "learning_rate", "weight_decay": "weight_decay", "beta1": "adam_beta1"}[dial]
            training[key] = value
        return new

    def with_seed(self, settings: Settings, seed: int) -> Settings:
        new = copy.deepcopy(settings)
        new["training"]["seed"] = seed
        return new

    def with_horizon(self, settings: Settings, share: float) -> Settings:
        new = copy.deepcopy(settings)
        training = new["training"]
        if training.get("max_steps", -1) > 0:
            training["max_steps"] = scaled(training["max_steps"], share)
        else:
            training["num_train_epochs"] = float(training.get("num_train_epochs", 3)) * share
        if training.get("warmup_steps", 0) >= 1:
            training["warmup_steps"] = scaled(training["warmup_steps"], share)
        more = training.get("lr_scheduler_kwargs")
        for key in more if isinstance(more, dict) else ():
            if key.endswith("_steps") and isinstance(more[key], int):
                more[key] = scaled(more[key], share)
        return new

    def measured(self, settings: Settings, steps: int, logs: int) -> Settings:
        new = copy.deepcopy(settings)
        training = new["training"]
        training.update(
            max_steps=steps, eval_strategy="steps", eval_steps=steps, save_strategy="no", logging_steps=logs
        )
        for key in ("warmup_steps", "warmup_ratio", "lr_scheduler_kwargs", "eval_delay", "save_steps"):
            training.pop(key, None)
        training["lr_scheduler_type"] = "linear"
        if training.get("optim") == "sophia_eigen":
            set_optim_args(training, basis_warmup=0)
        return new

    def length(self, settings: Settings) -> tuple[int | None, float | None]:
        training = settings["training"]
        steps = training.get("max_steps", -1)
        return (steps, None) if steps > 0 else (None, float(training.get("num_train_epochs", 3)))

    def evaluations(self, settings: Settings, steps: int) -> int:
        training = settings["training"]
        every = training.get("eval_steps") or training.get("logging_steps", 500)
        by_steps = training.get("eval_strategy") == "steps"
        return max(1, int(steps / every if every >= 1 else 1 / every)) if by_steps else 1

    def interval(self, settings: Settings) -> int:
        return _period(optim_args(settings["training"]).get("hessian_interval", 10))


class _LightningDials:
    folder_key = "trainer.default_root_dir"

    def prepare(self, settings: Settings) -> Settings:
        new = copy.deepcopy(settings)
        trainer = new.get("trainer") or {}
        trainer.pop("default_root_dir", None)
        model = new.get("model")
        if not (isinstance(model, dict) and str(model.get("class_path")).endswith(".CausalLM")):
            raise UserError("model: only CausalLM's optimizer and schedule are known here; compare a recipe of it")
        arguments = model.setdefault("init_args", {})
        if not isinstance(arguments.get("optimizer"), dict):
            raise UserError("model.init_args.optimizer: give a class_path and init_args with lr, to be changed")
        if arguments.get("schedule", "cosine") == "constant":
            raise UserError(
                "model.init_args.schedule: constant does not decay, and runs are judged after their whole decay: use "
                "cosine or linear"
            )
        if trainer.get("limit_val_batches") in (0, 0.0):
            raise UserError("trainer.limit_val_batches: 0 leaves no validation loss to judge by: leave it out")
        if not isinstance(trainer.get("max_steps"), int) or trainer["max_steps"] < 1:
            raise UserError("trainer.max_steps: give the number of steps: shares of it are the horizons")
        new["trainer"] = trainer
        return new

    def get(self, settings: Settings, dial: str) -> float:
        optimizer = settings["model"]["init_args"]["optimizer"]
        arguments = optimizer.get("init_args") or {}
        if dial == "rate":
            if "lr" not in arguments:
                raise UserError(
                    "model.init_args.optimizer.init_args.lr: give one: the rates that are tried lie around it"
                )
            return float(arguments["lr"])
        if dial == "weight_decay":
            return float(arguments.get("weight_decay", 0.1 if "Sophia" in optimizer["class_path"] else 0.01))
        if "momentum" in arguments:
            return float(arguments["momentum"])
        eigen = (settings["model"]["init_args"].get("groups") or {}).get("basis") == "eigen"
        return float((self._betas(settings) or (_beta1_of("sophia_eigen" if eigen else optimizer["class_path"]),))[0])

    def set(self, settings: Settings, dial: str, value: float) -> Settings:
        new = copy.deepcopy(settings)
        arguments = new["model"]["init_args"]["optimizer"].setdefault("init_args", {})
        if dial != "beta1":
            arguments[{"rate": "lr", "weight_decay": "weight_decay"}[dial]] = value
        elif "momentum" in arguments:
            arguments["momentum"] = value
        else:
            groups = new["model"]["init_args"].get("groups") or {}
            eigen = groups.get("basis") == "eigen"
            place = groups if eigen else arguments
            second = (self._betas(new) or (None, 0.9 if eigen else 0.99 if "Sophia" in _class(new) else 0.999))[1]
            place["betas"] = [value, second]
        return new

    def with_seed(self, settings: Settings, seed: int) -> Settings:
        new = copy.deepcopy(settings)
        new["seed_everything"] = seed
        data = new.get("data")
        if isinstance(data, dict) and str(data.get("class_path")).endswith("TextDataModule"):
            data.setdefault("init_args", {})["seed"] = seed
        return new

    def with_horizon(self, settings: Settings, share: float) -> Settings:
        new = copy.deepcopy(settings)
        new["trainer"]["max_steps"] = scaled(new["trainer"]["max_steps"], share)
        arguments = new["model"]["init_args"]
        if arguments.get("warmup_steps"):
            arguments["warmup_steps"] = scaled(arguments["warmup_steps"], share)
        return new

    def measured(self, settings: Settings, steps: int, logs: int) -> Settings:
        new = copy.deepcopy(settings)
        new["trainer"].update(
            max_steps=steps, val_check_interval=steps, check_val_every_n_epoch=None, log_every_n_steps=logs
        )
        new["model"]["init_args"]["warmup_steps"] = 0
        groups = new["model"]["init_args"].get("groups")
        if groups and groups.get("basis") == "eigen":
            groups["basis_warmup"] = 0
        return new

    def length(self, settings: Settings) -> tuple[int | None, float | None]:
        return settings["trainer"]["max_steps"], None

    def evaluations(self, settings: Settings, steps: int) -> int:
        every = settings["trainer"].get("val_check_interval")
        return max(1, steps // every) if isinstance(every, int) and every else 1

    def interval(self, settings: Settings) -> int:
        arguments = settings["model"]["init_args"]["optimizer"].get("init_args") or {}
        return _period(arguments.get("hessian_interval", 10))

    @staticmethod
    def _betas(settings: Settings) -> Any:
        arguments = settings["model"]["init_args"]
        groups = arguments.get("groups") or {}
        return groups.get("betas") or (arguments["optimizer"].get("init_args") or {}).get("betas")


def optim_args(training: dict[str, Any]) -> dict[str, str]:
    """``optim_args`` of TrainingArguments as a mapping of words."""
    text = str(training.get("optim_args") or "")
    return dict(pair.strip().split("=", 1) for pair in text.split(",") if "=" in pair)


def set_optim_args(training: dict[str, Any], **values: Any) -> None:
    """Changes some of them in place."""
    words = {**optim_args(training), **values}
    training["optim_args"] = ",".join(f"{key}={value}" for key, value in words.items())


def scaled(steps: int, share: float) -> int:
    """A share of a number of steps, at least one."""
    return max(1, round(steps * share))


def rounded(value: float) -> float:
    """Four digits, so that a value that is multiplied and divided again is the same."""
    return float(f"{value:.4g}")


def _beta1_of(optimizer: str) -> float:
    """The default β₁ of an optimizer by its name or class."""
    for part, value in (("eigen", 0.9), ("sophia", 0.965), ("muon", 0.95), ("soap", 0.95)):
        if part in optimizer.lower():
            return value
    return 0.9


def _period(interval: Any) -> int:
    steps = int(float(interval))
    return steps if 1 <= steps <= 50 else 10


def _class(settings: Settings) -> str:
    return str(settings["model"]["init_args"]["optimizer"]["class_path"])


_HF, _LIGHTNING = _HfDials(), _LightningDials()
