"""One run of a comparison as a process of its own: ``sophia train``, with the rivals known to the Trainer.

    python -m sophia_integrations.reports.compare.child [--flops FILE FROM TO] train RECIPE key=value …

It ends with the process that started it, whose end of standard input it watches: a comparison that was killed leaves
nothing that trains on. With ``--flops`` it counts the floating-point operations of the optimizer steps in [FROM, TO).
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

_ORPHANED = 70


def main(arguments: list[str]) -> None:
    """Runs ``python -m sophia_integrations`` with `arguments`, which ends the process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if arguments[:1] == ["--flops"]:
        _, file, start, end, *arguments = arguments
        _count(Path(file), int(start), int(end))
    know_rivals()
    sys.argv[1:] = arguments
    runpy.run_module(__package__.partition(".")[0], run_name="__main__")


def _end_with_parent() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            pass
    os._exit(_ORPHANED)


def know_rivals() -> None:
    """Makes the rivals known to the Trainers of this process, once and before transformers is imported."""
    from wrapt import wrap_function_wrapper
    from wrapt.importer import when_imported

    from ...hf.registration import register_optimizer
    from .optimizers import TRAINER_NAMES, for_trainer

    for name in TRAINER_NAMES:
        register_optimizer(name, for_trainer(name))

    def keep_graph(trainer: Any) -> None:
        wrap_function_wrapper(trainer, "Trainer.training_step", _with_graph)

    when_imported("transformers.trainer")(keep_graph)


def _with_graph(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    """AdaHessian differentiates the gradient again: its graph is kept, and attention is a kernel that can be."""
    if getattr(instance.args.optim, "value", instance.args.optim) != "compare_adahessian":
        return wrapped(*args, **kwargs)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    accelerator, backward = instance.accelerator, instance.accelerator.backward
    accelerator.backward = lambda loss, **options: backward(loss, create_graph=True, **options)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
            return wrapped(*args, **kwargs)
    finally:
        del accelerator.backward


def _count(file: Path, start: int, end: int) -> None:
    """Writes the operations per step of a window of optimizer steps: all, and those of Hessian passes."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.utils.flop_counter import FlopCounterMode

    from ...curvature import UnitEstimator

    counter = FlopCounterMode(display=False)
    steps, passes, estimate = 0, 0, UnitEstimator.estimate

    def counted(self: UnitEstimator, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        before = counter.get_total_flops()
        found = estimate(self, *args, **kwargs)
        passes += counter.get_total_flops() - before
        return found

    def after_step(optimizer: Any, *_: Any) -> None:
        nonlocal steps
        if getattr(optimizer, "part_of_another", False):
            return
        steps += 1
        if steps == start:
            UnitEstimator.estimate = counted  # type: ignore[method-assign]
            counter.__enter__()
        elif steps == end:
            counter.__exit__(None, None, None)
            UnitEstimator.estimate = estimate  # type: ignore[method-assign]
            window = end - start
            found = {"flops": counter.get_total_flops() / window, "pass_flops": passes / window}
            file.write_text(json.dumps(found) + "\n", encoding="utf-8")

    register_optimizer_step_post_hook(after_step)


if __name__ == "__main__":
    main(sys.argv[1:])
