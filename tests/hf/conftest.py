"""Trainers on two ranks, launched once for all tests that compare them with one process."""

import pytest
import torch
from support import run_worker


@pytest.fixture(scope="session")
def ddp_ranks(tmp_path_factory):
    """What both ranks ended with, by name of the run."""
    folder, names = tmp_path_factory.mktemp("ddp"), ("causal", "masked", "classifier")
    run_worker("trainer_ddp", folder, *names, processes=2)
    first, second = (torch.load(folder / f"rank{rank}.pt") for rank in (0, 1))
    return {name: (first[name], second[name]) for name in names}
