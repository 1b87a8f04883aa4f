"""Float16 in a pass: how to tell that a forward ran in it, and the loss scales to try."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .tap import MicroBatch

FLOAT16_LOSS_SCALES = (2.0**10, 2.0**5, 1.0, 2.0**-5, 2.0**-10)
"""Tried in turn, because small gradients vanish in float16 and large ones overflow; what comes out is scaled back."""

_NODES = 64


def runs_in_float16(model: nn.Module, batch: MicroBatch, output: Any) -> bool:
    """Whether gradients of `output` go through float16.

    Parameters and the autocast around the training forward tell. An autocast inside the forward does not show there
    (accelerate puts one into `model.forward`, with a cast of the output to float32; FSDP2's mixed precision casts the
    parameters): it shows in the operations that made the output.

    Args:
        output: tensors of one forward, with their graph.
    """
    if batch.autocast_dtype == torch.float16 or any(p.dtype == torch.float16 for p in model.parameters()):
        return True
    nodes = deque(t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None)
    for _ in range(_NODES):
        if not nodes:
            return False
        node = nodes.popleft()
        dtypes = [metadata.dtype for metadata in node._input_metadata]
        if torch.float16 in dtypes or torch.bfloat16 in dtypes:
            return torch.float16 in dtypes
        nodes.extend(following for following, _ in node.next_functions if following is not None)
    return False
