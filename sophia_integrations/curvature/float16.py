"""Float16 in a pass: how to tell that a forward ran in it, and the loss scales to try."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from .graph import nodes_of
from .tap import MicroBatch

LOSS_SCALES = (2.0**10, 2.0**5, 1.0, 2.0**-5, 2.0**-10)
"""Tried in turn, because small gradients vanish in float16 and large ones overflow; what comes out is scaled back."""

_NODES = 64

Output = TypeVar("Output")
Result = TypeVar("Result")


def at_fitting_scale(
    forward: Callable[[], tuple[Output, bool]],
    backward: Callable[[Output, float | None], Result],
    is_finite: Callable[[Result], bool],
) -> Result:
    """What `backward` makes of a forward: in float16 with the first of `LOSS_SCALES` under which all is finite.

    Args:
        forward: runs the model, anew for each scale, and says whether it `runs_in_float16`.
        backward: gets what it returned and a scale for the loss; None without float16, and the result is not judged.
        is_finite: whether a result is; under the last scale it is taken as it is.
    """
    for scale in LOSS_SCALES:
        output, half = forward()
        if not half:
            return backward(output, None)
        result = backward(output, scale)
        if is_finite(result):
            break
    return result


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
    for node in itertools.islice(nodes_of(output), _NODES):
        dtypes = [metadata.dtype for metadata in node._input_metadata]
        if torch.float16 in dtypes or torch.bfloat16 in dtypes:
            return torch.float16 in dtypes
    return False
