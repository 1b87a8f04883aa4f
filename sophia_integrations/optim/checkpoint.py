"""State dicts that hold all of a run, and their loading without torch's cast to the parameter's dtype."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch.optim.optimizer import Optimizer

from .checks import check_loadable, warn_changed_hyperparameters
from .progress import KEY, Progress, saved_in
from .state import restore


@contextlib.contextmanager
def saved_with(progress: Progress, optimizer: Optimizer) -> Iterator[None]:
    """Around `Optimizer.state_dict`: puts `progress` where the states have its place; the user's hooks see it."""

    def put(_: Optimizer, saved: dict[str, Any]) -> None:
        numbers = functools.cache(progress.as_tensor)
        for i, state in saved["state"].items():
            if KEY in state:
                saved["state"][i] = {**state, KEY: numbers(state["exp_avg"].device)}

    hook = optimizer.register_state_dict_post_hook(put, prepend=True)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def exactly_loaded(optimizer: Optimizer) -> Iterator[None]:
    """Around `Optimizer.load_state_dict`: checks what it loads, and copies the state in its own dtype.

    It looks at the checkpoint after the user's pre-hooks, which may convert it, and restores before the post-hooks.

    Raises:
        ValueError: the checkpoint belongs to another optimizer or another basis, or its progress was lost.
    """
    loaded: dict[str, Any] = {}

    def check(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
        check_loadable(final, optimizer.param_groups)
        warn_changed_hyperparameters(optimizer.param_groups, final["param_groups"])
        groups = [dict(group) for group in final["param_groups"]]
        loaded.update(final, param_groups=groups, progress=saved_in(final["state"].values(), groups))
        return {**final, "param_groups": groups}

    def copy(_: Optimizer) -> None:
        for saved, group in zip(loaded["param_groups"], optimizer.param_groups, strict=True):
            for i, param in zip(saved["params"], group["params"], strict=True):
                restore(optimizer.state, param, loaded["state"].get(i, {}), group)
        optimizer.progress = loaded["progress"]

    hooks = [optimizer.register_load_state_dict_pre_hook(check)]
    hooks.append(optimizer.register_load_state_dict_post_hook(copy, prepend=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
