"""The Lightning callback: attaches the engine to the module's Sophia optimizer and logs; it never estimates itself."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import nn

from ..curvature import GaussNewtonBartlett, Hutchinson, Readout, UnitEstimator
from ..optim import LogFigures, SophiaG, SophiaH
from .source import BatchLogits, Source, find_source

_ours: weakref.WeakSet[UnitEstimator] = weakref.WeakSet()
"""The estimators that callbacks made; an optimizer that brings another one keeps it."""


class SophiaCallback(Callback):
    """Gives the Sophia optimizer of `configure_optimizers` its Hessian pass, and logs how it does.

    The pass runs inside `optimizer.step()`, in automatic and manual optimization, on the micro-batches of the
    step. The optimizer that is about to step gets it, however late it was built, also in the trial steps of
    `LearningRateFinder`, `BatchSizeFinder` and `Tuner`, which run without the callbacks.

    Where the predictions are, in this order: `model`; a method `sophia_logits(batch)` of the module, which returns
    (logits, targets); the one transformers model in the module. An optimizer that was given an estimator keeps it.
    `SophiaG` gets `GaussNewtonBartlett`, `SophiaH` gets `Hutchinson`.

    Logs the figures of `optim.LogFigures.flush` every `log_every_n_steps`, `sophia/win_rate` in the progress bar too.

    Args:
        model: the submodule that `training_step` calls to get the predictions, or its dotted name.
        readout: where predictions and labels are; with `sophia_logits` only its likelihood and dimensions.
        fraction: share of the rows of the accumulation window that the pass uses on each rank, in (0, 1].
        units: independent units that they form on each rank; the noise of an estimate falls with its square root.
        seed: key of the labels that the pass draws.

    Raises:
        ValueError: at the start of fit, in one sentence: no Sophia optimizer or several, two of these callbacks, no
            predictions found, a strategy that hides the gradients, or `training_step(dataloader_iter)`.
    """

    def __init__(
        self,
        model: str | nn.Module | None = None,
        readout: Readout | None = None,
        fraction: float = 0.0625,
        units: int = 8,
        seed: int = 0,
    ) -> None:
        self.model, self.readout = model, readout
        self.fraction, self.units, self.seed = fraction, units, seed
        self._sophia: SophiaG | None = None
        self._notes_labels = False
        self._batch: Any = None
        self._batch_is_new = False
        self._step_before = 0
        self._figures = LogFigures()
        self._step_hooks: list[Any] = []
        self._unfollow: list[Callable[[], None]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _refuse_unsupported(trainer, pl_module)
            self._leave()
            self._follow(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._figures.restart(self._sophia)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = None
        step = self._sophia.progress.step
        stepped = step > self._step_before or (step > 0 and not pl_module.automatic_optimization)
        if stepped and _is_logged(trainer, pl_module):
            self._log(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the loop through its strategy: tuners take the callbacks out while they try steps."""

        def on_train_start() -> None:
            self._attach(trainer, pl_module)
            # A loop that broke off, for want of memory perhaps, left micro-batches behind.
            self._batch = None
            self._sophia.estimator.arm(self._sophia.hessian_due)

        def on_train_batch_start(batch: Any, batch_idx: int) -> None:
            self._attach(trainer, pl_module)
            self._see(batch)

        self._unfollow = [_before(trainer.strategy, hook) for hook in (on_train_start, on_train_batch_start)]

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the optimizer that is about to step its estimator, unless it has one."""
        sophia = _only_sophia(trainer, pl_module)
        if sophia is self._sophia and sophia.estimator is not None:
            return
        if self._sophia is not None and _is_ours(self._sophia.estimator):
            self._sophia.estimator = None  # or it would remember batches for a step that never comes
        self._remove_step_hooks()
        self._notes_labels = False
        if sophia.estimator is None or _is_ours(sophia.estimator):
            source = find_source(pl_module, self.model, self.readout)
            sophia.estimator = self._build_estimator(sophia, trainer, source)
            self._notes_labels = self.model is None and not source.by_batch
        elif getattr(sophia.estimator, "model", None) is pl_module and trainer.strategy.model is not pl_module:
            raise ValueError(
                f"the estimator watches {type(pl_module).__name__}, which {type(trainer.strategy).__name__} calls with "
                "the arguments of training_step: leave the estimator to SophiaCallback, or give it the submodule."
            )
        if isinstance(sophia.estimator, UnitEstimator):
            sophia.estimator.forward_context = trainer.precision_plugin.forward_context
        self._sophia = sophia
        self._figures.restart(sophia)
        self._step_hooks = [
            sophia.register_step_pre_hook(self._before_step),
            sophia.register_step_post_hook(self._after_step),
        ]

    def _build_estimator(self, sophia: SophiaG, trainer: Trainer, source: Source) -> UnitEstimator:
        options = dict(fraction=self.fraction, units=self.units, seed=self.seed, readout=source.readout)
        options["process_group"] = _data_parallel_group(trainer)
        if isinstance(sophia, SophiaH):
            loss = source.readout.loss if source.by_batch else None
            estimator: UnitEstimator = Hutchinson(source.model, loss=loss, **options)
        else:
            estimator = GaussNewtonBartlett(source.model, **options)
        _ours.add(estimator)
        return estimator

    def _leave(self) -> None:
        """Let go of the strategy and the optimizer; the optimizer keeps its estimator."""
        for unfollow in self._unfollow:
            unfollow()
        self._remove_step_hooks()
        self._unfollow, self._sophia, self._batch = [], None, None

    def _remove_step_hooks(self) -> None:
        for hook in self._step_hooks:
            hook.remove()
        self._step_hooks = []

    @property
    def _takes_batches(self) -> bool:
        return isinstance(getattr(self._sophia.estimator, "model", None), BatchLogits)

    def _see(self, batch: Any) -> None:
        """Before the forward of a micro-batch: remember it, or which of its labels count."""
        self._step_before = self._sophia.progress.step
        if self._takes_batches:
            self._batch, self._batch_is_new = batch, True
            self._remember()
        elif self._notes_labels and isinstance(batch, Mapping):
            self._sophia.estimator.note_labels(batch.get("labels"))

    def _remember(self) -> None:
        estimator = self._sophia.estimator
        with estimator.forward_context():
            estimator.remember(self._batch)

    def _before_step(self, *_: Any) -> None:
        """In manual optimization one batch may serve several steps, and every step forgets what it used."""
        if self._takes_batches and not self._batch_is_new and self._batch is not None:
            self._remember()

    def _after_step(self, *_: Any) -> None:
        self._batch_is_new = False

    def _log(self, pl_module: LightningModule) -> None:
        figures = {name: float(v) if isinstance(v, int) else v for name, v in self._figures.flush(self._sophia).items()}
        pl_module.log("sophia/win_rate", figures.pop("sophia/win_rate"), on_step=True, on_epoch=False, prog_bar=True)
        pl_module.log_dict(figures, on_step=True, on_epoch=False)


def _before(strategy: Strategy, hook: Callable[..., None]) -> Callable[[], None]:
    """Call `hook` before the strategy's own hook of that name; returns what undoes it."""
    name = hook.__name__
    original, own = getattr(strategy, name), name in vars(strategy)

    def both(*args: Any, **kwargs: Any) -> Any:
        hook(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(strategy, name, both)
    return lambda: setattr(strategy, name, original) if own else delattr(strategy, name)


def _is_logged(trainer: Trainer, pl_module: LightningModule) -> bool:
    """At the end of a batch: whether Lightning writes what is logged now."""
    # In manual optimization `global_step` counts the steps of every optimizer; Lightning counts batches there.
    steps = trainer.global_step if pl_module.automatic_optimization else trainer.fit_loop.total_batch_idx + 1
    return trainer.log_every_n_steps > 0 and steps % trainer.log_every_n_steps == 0


def _is_ours(estimator: Any) -> bool:
    return isinstance(estimator, UnitEstimator) and estimator in _ours


def _refuse_unsupported(trainer: Trainer, pl_module: LightningModule) -> None:
    if sum(isinstance(callback, SophiaCallback) for callback in trainer.callbacks) > 1:
        raise ValueError("there are two SophiaCallbacks in this Trainer: keep one.")
    strategies = {cls.__name__ for cls in type(trainer.strategy).__mro__}
    if "DeepSpeedStrategy" in strategies:
        raise ValueError(
            "Sophia does not run under DeepSpeed, which owns the gradients: use DDPStrategy or ModelParallelStrategy."
        )
    if "FSDPStrategy" in strategies:
        raise ValueError(
            "Sophia does not run under FSDPStrategy (FSDP1), which flattens the parameters: use ModelParallelStrategy "
            "with fully_shard (FSDP2), or DDPStrategy."
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise ValueError(
            "Sophia does not run with training_step(dataloader_iter), which hides the batch: use "
            "training_step(batch, batch_idx)."
        )


def _only_sophia(trainer: Trainer, pl_module: LightningModule) -> SophiaG:
    found = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, SophiaG)]
    if not found:
        names = ", ".join(type(o).__name__ for o in trainer.optimizers) or "none"
        raise ValueError(
            f"SophiaCallback found no Sophia optimizer in {type(pl_module).__name__} (its optimizers: {names}): return "
            "SophiaG(self.parameters(), lr=…) from configure_optimizers, or remove the callback."
        )
    if len(found) > 1:
        raise ValueError(
            f"SophiaCallback serves one Sophia optimizer, and {type(pl_module).__name__} has {len(found)}: make them "
            "parameter groups of one."
        )
    return found[0]


def _data_parallel_group(trainer: Trainer) -> Any:
    """The ranks with different rows; None, all of them, unless some share rows for tensor parallelism."""
    mesh = getattr(trainer.strategy, "device_mesh", None)
    if mesh is None or "tensor_parallel" not in (mesh.mesh_dim_names or ()) or mesh["tensor_parallel"].size() == 1:
        return None
    return mesh["data_parallel"].get_group()
