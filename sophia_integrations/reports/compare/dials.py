"""What a comparison turns in a recipe, whichever framework it is for: rate, decay, β₁, seed and horizon.

A recipe is a mapping as the loader resolves it; every function returns a changed copy.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from typing import Any

from ...errors import UserError
from ...recipes.reading.loader import read
from ..places import Settings, is_lightning, path_of, put, value_of

OURS = "compare_"
"""How ``training.optim`` begins of the rivals that only a comparison's runs know."""
OWN_OPTIM_ARGS = ("sophia", OURS)
"""Optimizers whose β₁ stands in ``optim_args``; the others' is ``adam_beta1``."""
_NO_DECAY = ("constant", "constant_with_warmup", "reduce_lr_on_plateau")


def load(recipe: str | os.PathLike[str]) -> Settings:
    """A recipe's values, with its base and its defaults.  Raises `UserError` with all its problems."""
    return copy.deepcopy(read(recipe).settings)


class Dials(ABC):
    """What a comparison turns; what is not abstract is the same in both frameworks but for its place."""

    folder_key: str

    @abstractmethod
    def prepare(self, settings: Settings) -> Settings:
        """Without what a comparison decides itself; raises `UserError` for what cannot be compared."""

    def get(self, settings: Settings, dial: str) -> float:
        """The value of ``rate``, ``weight_decay`` or ``beta1``; raises `UserError` when the recipe has no rate."""
        name = self._name(settings, dial)
        value = value_of(settings, name)
        if value is None and dial == "rate":
            key = ".".join(map(str, path_of(settings, name)))
            raise UserError(f"{key}: give one: the rates that are tried lie around it")
        return float(self._default(settings, dial) if value is None else value)

    def set(self, settings: Settings, dial: str, value: float) -> Settings:
        """With that value."""
        new = copy.deepcopy(settings)
        put(new, self._name(settings, dial), value)
        return new

    def with_seed(self, settings: Settings, seed: int) -> Settings:
        """With initial weights and an order of the data of that seed."""
        new = copy.deepcopy(settings)
        put(new, "seed", seed)
        return new

    def with_horizon(self, settings: Settings, share: float) -> Settings:
        """A run of that share of the length, its whole schedule with it."""
        new = copy.deepcopy(settings)
        for name in ("max_steps", "warmup_steps"):
            if (steps := value_of(new, name)) and steps >= 1:
                put(new, name, scaled(steps, share))
        return new

    @abstractmethod
    def measured(self, settings: Settings, steps: int, logs: int) -> Settings:
        """A short run of which only the time is wanted: logged every `logs` steps, evaluated at its end alone."""

    def length(self, settings: Settings) -> tuple[int | None, float | None]:
        """Optimizer steps, or where they follow from them, epochs."""
        steps = value_of(settings, "max_steps")
        return (steps, None) if steps and steps > 0 else (None, float(value_of(settings, "epochs") or 3))

    @abstractmethod
    def evaluations(self, settings: Settings, steps: int) -> int:
        """How often a run of `steps` is evaluated."""

    def interval(self, settings: Settings) -> int:
        """Steps after which the price of a step repeats."""
        steps = int(value_of(settings, "hessian_interval"))
        return steps if 1 <= steps <= 50 else 10

    @abstractmethod
    def _name(self, settings: Settings, dial: str) -> str:
        """What `path_of` calls a dial."""

    @abstractmethod
    def _default(self, settings: Settings, dial: str) -> float:
        """The weight decay or β₁ of an optimizer that is told none."""


def dials_of(settings: Settings) -> Dials:
    """Those of the recipe's framework."""
    return _LIGHTNING if is_lightning(settings) else _HF


class _HfDials(Dials):
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

    def with_horizon(self, settings: Settings, share: float) -> Settings:
        new = super().with_horizon(settings, share)
        steps, epochs = self.length(settings)
        if steps is None:
            put(new, "epochs", epochs * share)
        more = new["training"].get("lr_scheduler_kwargs")
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
            put(new, "basis_warmup", 0)
        return new

    def evaluations(self, settings: Settings, steps: int) -> int:
        training = settings["training"]
        every = training.get("eval_steps") or training.get("logging_steps", 500)
        by_steps = training.get("eval_strategy") == "steps"
        return max(1, int(steps / every if every >= 1 else 1 / every)) if by_steps else 1

    def _name(self, settings: Settings, dial: str) -> str:
        own = str(settings["training"].get("optim", "")).startswith(OWN_OPTIM_ARGS)
        return {"rate": "learning_rate", "beta1": "beta1" if own else "adam_beta1"}.get(dial, dial)

    def _default(self, settings: Settings, dial: str) -> float:
        return _beta1_of(str(settings["training"].get("optim", ""))) if dial == "beta1" else 0.0


class _LightningDials(Dials):
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
        betas = self._betas(settings) if self._in_betas(settings, dial) else None
        return float(betas[0]) if betas else super().get(settings, dial)

    def set(self, settings: Settings, dial: str, value: float) -> Settings:
        if not self._in_betas(settings, dial):
            return super().set(settings, dial, value)
        new, eigen, betas = copy.deepcopy(settings), self._eigen(settings), self._betas(settings)
        second = betas[1] if betas else 0.9 if eigen else 0.99 if "Sophia" in _class(settings) else 0.999
        model = new["model"]["init_args"]
        place = model["groups"] if eigen else model["optimizer"].setdefault("init_args", {})
        place["betas"] = [value, second]
        return new

    def with_seed(self, settings: Settings, seed: int) -> Settings:
        new = super().with_seed(settings, seed)
        data = new.get("data")
        if isinstance(data, dict) and str(data.get("class_path")).endswith("TextDataModule"):
            data.setdefault("init_args", {})["seed"] = seed
        return new

    def measured(self, settings: Settings, steps: int, logs: int) -> Settings:
        new = copy.deepcopy(settings)
        new["trainer"].update(
            max_steps=steps, val_check_interval=steps, check_val_every_n_epoch=None, log_every_n_steps=logs
        )
        new["model"]["init_args"]["warmup_steps"] = 0
        if self._eigen(new):
            put(new, "basis_warmup", 0)
        return new

    def evaluations(self, settings: Settings, steps: int) -> int:
        every = settings["trainer"].get("val_check_interval")
        return max(1, steps // every) if isinstance(every, int) and every else 1

    def _name(self, settings: Settings, dial: str) -> str:
        return {"rate": "learning_rate", "beta1": "momentum"}.get(dial, dial)

    def _default(self, settings: Settings, dial: str) -> float:
        if dial == "beta1":
            return _beta1_of("sophia_eigen" if self._eigen(settings) else _class(settings))
        return 0.1 if "Sophia" in _class(settings) else 0.01

    @staticmethod
    def _in_betas(settings: Settings, dial: str) -> bool:
        return dial == "beta1" and value_of(settings, "momentum") is None

    @staticmethod
    def _eigen(settings: Settings) -> bool:
        return value_of(settings, "basis") == "eigen"

    @staticmethod
    def _betas(settings: Settings) -> Any:
        model = settings["model"]["init_args"]
        return (model.get("groups") or {}).get("betas") or (model["optimizer"].get("init_args") or {}).get("betas")


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


def _class(settings: Settings) -> str:
    return str(settings["model"]["init_args"]["optimizer"]["class_path"])


_HF, _LIGHTNING = _HfDials(), _LightningDials()
