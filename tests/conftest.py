"""No test asks the hub, or sees the state that accelerate keeps from the Trainer before it; a tiny corpus for text."""

import gc
import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported
if os.environ.get("SOPHIA_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # so does triton; kernels run on the CPU


def pytest_collection_finish() -> None:
    """What the imports have made stays: no collection of garbage, of which accelerate asks for many, looks at it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def _text(number: int) -> str:
    words = "zero one two three four five six seven eight nine".split()
    return "\n".join(" ".join(words[(line * number + k) % 10] for k in range(6)) for line in range(40)) + "\n"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a corpus")
    for number in range(1, 11):
        (folder / f"text {number}.txt").write_text(_text(number), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")
