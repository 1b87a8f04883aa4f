"""Every test starts without the process-wide state that accelerate keeps from the Trainer before it."""

import os
import sys

import pytest


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
