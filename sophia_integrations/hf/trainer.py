"""Trainers that bring Sophia with them, for code where the methods of `Trainer` must stay as they are."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from .callback import SophiaCallback
from .integration import around_training_step, optimizer_cls_and_kwargs


class SophiaTrainerMixin:
    """Makes any `Trainer` class train with Sophia: `class MyTrainer(SophiaTrainerMixin, SFTTrainer)`.

    It has the engine, the arguments and the logs of `optim="sophia"` in a plain Trainer, without its registration:
    the methods are overridden here. Put it first among the bases. `args.optim` still names the optimizer, and one
    that is not Sophia's is refused, so that nobody trains with AdamW under this name.
    """

    notes_sophia_labels = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        callbacks = self.callback_handler.callbacks
        if not any(isinstance(c, SophiaCallback) for c in callbacks):
            # Behind the flow callback and before the reporters, which must see its figures.
            callbacks.insert(1, SophiaCallback())

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """Sophia's class and keyword arguments.

        Raises:
            ValueError: `args.optim` is not one of Sophia's, or as for `optim="sophia"` elsewhere.
        """
        ours = optimizer_cls_and_kwargs(args, model)
        if ours is None:
            name = getattr(args.optim, "value", args.optim)
            raise ValueError(f"this Trainer trains with Sophia, and optim is {name!r}: pass optim='sophia'.")
        return ours

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with around_training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs)


class SophiaTrainer(SophiaTrainerMixin, Trainer):
    """`transformers.Trainer` that trains with Sophia; see `SophiaTrainerMixin`."""
