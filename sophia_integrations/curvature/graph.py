"""The graph that autograd keeps of a forward."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves


def nodes_of(output: Any) -> Iterator[Node]:
    """The operations that made the tensors of `output`, each once, the last ones first."""
    found = [t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]
    waiting, met = deque(found), set(found)
    while waiting:
        node = waiting.popleft()
        yield node
        new = [following for following, _ in node.next_functions if following is not None and following not in met]
        met.update(new)
        waiting.extend(new)


def shows_all_weights(output: Any) -> bool:
    """Whether every weight that has a gradient is in the graph of `output`, so that a backward may be for some alone.

    A function of Python's may start a backward of its own, as reentrant checkpointing does, whose weights do not show.
    """
    return not any(isinstance(node, FunctionCtx) for node in nodes_of(output))
