"""A scripted estimator, and the float64 specification as a one-step oracle for a whole optimizer."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from specification import ScriptedEstimator, Specification, random_curvature


@pytest.fixture
def scripted():
    """The class: `scripted(supply)`."""
    return ScriptedEstimator


@pytest.fixture
def curvature():
    """A new estimator with random ĥ that depends on the step alone."""
    return ScriptedEstimator(random_curvature)


@pytest.fixture
def constant_curvature():
    """`constant_curvature(value)`: an estimator whose every ĥ is `value`."""
    return lambda value: ScriptedEstimator(
        lambda step, params: [torch.full(p.shape, float(value), dtype=p.dtype) for p in params]
    )


@pytest.fixture
def reference():
    """`reference(optimizer)` takes a step that must be that of `reference_step`."""
    return Specification().step


@pytest.fixture
def official():
    """The official package, forgotten afterwards: LightningCLI finds classes by name, and its class has ours."""
    module = importlib.import_module("sophia_opt")
    yield module
    module.SophiaG.__module__ = "__main__"
    del sys.modules["sophia_opt"]
