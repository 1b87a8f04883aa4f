"""Each test has its own folder, a cache of the test run, and no hub."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def quiet_place(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPHIA_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
