"""A scripted estimator, and the float64 specification as a one-step oracle for a whole optimizer."""

from __future__ import annotations

import importlib
import shutil
import sys
import sysconfig

import pytest
import torch
from specification import ScriptedEstimator, Specification, random_curvature

from sophia_integrations.optim.native_library import library


@pytest.fixture
def fresh_library():
    """The compiled step is looked for anew, in this test and after it."""
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch, fresh_library, tmp_path_factory):
    """There is no C compiler for this process and its children, only the `timeout` of `run_worker`."""
    tools = tmp_path_factory.mktemp("bin")
    (tools / "timeout").symlink_to(shutil.which("timeout"))
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setitem(sysconfig.get_config_vars(), "CC", None)


@pytest.fixture(params=["native", "eager"])
def backend(request):
    """Everything in the module runs with a compiler and without one."""
    if request.param == "eager":
        request.getfixturevalue("no_compiler")
    elif not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("there is no C compiler on this machine")
    else:
        assert library()[0] is not None, library()[1]
    return request.param


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
