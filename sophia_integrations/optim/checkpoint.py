"""Loading a checkpoint without torch's cast of the state to the parameter's dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.optim.optimizer import Optimizer

from .checks import check_loadable, warn_changed_hyperparameters
from .state import restore, state_dtype


@contextlib.contextmanager
def exactly_loaded(optimizer: Optimizer) -> Iterator[None]:
    """Around `Optimizer.load_state_dict`: checks what it loads, and copies the state in its own dtype.

    It looks at the checkpoint after the user's pre-hooks, which may convert it, and restores before the post-hooks.

    Raises:
        ValueError: the checkpoint belongs to another optimizer or another basis.
    """
    loaded: dict[str, Any] = {}

    def check(_: Optimizer, final: dict[str, Any]) -> None:
        check_loadable(final, optimizer.param_groups)
        warn_changed_hyperparameters(optimizer.param_groups, final["param_groups"])
        loaded.update(final)

    def copy(_: Optimizer) -> None:
        for saved, group in zip(loaded["param_groups"], optimizer.param_groups, strict=True):
            for i, param in zip(saved["params"], group["params"], strict=True):
                dtype = state_dtype(param) if group["update"] == "sophia" else param.dtype
                restore(optimizer.state, param, loaded["state"].get(i, {}), dtype)

    hooks = [optimizer.register_load_state_dict_pre_hook(check)]
    hooks.append(optimizer.register_load_state_dict_post_hook(copy, prepend=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
