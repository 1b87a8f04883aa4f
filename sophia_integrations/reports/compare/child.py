"""One run of a comparison as a process of its own: ``sophia train``, with the rivals known to the Trainer.

    python -m sophia_integrations.reports.compare.child [--turns TURNS PERIOD REPLY FILE] train RECIPE key=value …

It ends with the process that started it, whose end of standard input it watches: a comparison that was killed leaves
nothing that trains on. With ``--turns`` every byte of that input is a turn of PERIOD optimizer steps: `_take_turns`.
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
    turns = threading.Semaphore(0)
    threading.Thread(target=_listen, args=(turns,), daemon=True).start()
    if arguments[:1] == ["--turns"]:
        _, timed, period, reply, file, *arguments = arguments
        _take_turns(turns, int(timed), int(period), int(reply), Path(file))
    know_rivals()
    sys.argv[1:] = arguments
    runpy.run_module(__package__.partition(".")[0], run_name="__main__")


def _listen(turns: threading.Semaphore) -> None:
    with contextlib.suppress(OSError):
        while told := os.read(0, 1024):
            turns.release(len(told))
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


def _take_turns(turns: threading.Semaphore, timed: int, period: int, reply: int, file: Path) -> None:
    """Makes the first `period` optimizer steps freely and waits after them for the next turn; `timed` turns so, each
    answered by a byte to `reply`. In one more, operations are counted; then `file` is written and training goes on.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from ..bench.timing import machine

    operations, steps = _Operations(), 0

    def after_step(optimizer: Any, *_: Any) -> None:
        nonlocal steps
        if getattr(optimizer, "part_of_another", False):
            return
        steps += 1
        turn, more = divmod(steps, period)
        if more or turn > timed + 2:
            return
        if turn == timed + 2:
            device = next(param.device.type for group in optimizer.param_groups for param in group["params"])
            costs = {**operations.end(period), "state_bytes": _state_bytes(optimizer), "machine": machine(device)}
            file.write_text(json.dumps(costs) + "\n", encoding="utf-8")
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        os.write(reply, b".")
        turns.acquire()
        if turn == timed + 1:
            operations.begin()

    register_optimizer_step_post_hook(after_step)


class _Operations:
    """Counts floating-point operations, those of Hessian passes also apart."""

    def begin(self) -> None:
        """From here on."""
        from torch.utils.flop_counter import FlopCounterMode

        from ...curvature import UnitEstimator

        self._counter, self._passes = FlopCounterMode(display=False), 0
        self._estimator, self._estimate = UnitEstimator, UnitEstimator.estimate

        def counted(estimator: UnitEstimator, *args: Any, **kwargs: Any) -> Any:
            before = self._counter.get_total_flops()
            found = self._estimate(estimator, *args, **kwargs)
            self._passes += self._counter.get_total_flops() - before
            return found

        UnitEstimator.estimate = counted  # type: ignore[method-assign]
        self._counter.__enter__()

    def end(self, steps: int) -> dict[str, float]:
        """Those of each of `steps`."""
        self._counter.__exit__(None, None, None)
        self._estimator.estimate = self._estimate  # type: ignore[method-assign]
        return {"flops": self._counter.get_total_flops() / steps, "pass_flops": self._passes / steps}


def _state_bytes(optimizer: Any) -> float:
    """Of an optimizer's state, for each parameter that it trains."""
    from torch.utils._pytree import tree_leaves

    tensors = {id(leaf): leaf for leaf in tree_leaves(list(optimizer.state.values())) if hasattr(leaf, "element_size")}
    trained = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / trained


if __name__ == "__main__":
    main(sys.argv[1:])
