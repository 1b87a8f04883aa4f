"""The noise of an estimate and the cost of drawing its labels: what units and the sampler are for."""

import statistics
import time

import pytest
import torch
from oracles import draws_of
from support import peak_bytes
from torch import nn

from sophia_integrations import GaussNewtonBartlett
from sophia_integrations.curvature.sampling import keyed_generator, sample_categorical

CPU = torch.device("cpu")


@pytest.mark.parametrize(("units", "draws"), [(1, 1000), (4, 300), (16, 120)])
def test_relative_noise_is_the_square_root_of_two_over_the_units(units, draws):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    x = torch.randn(64 * units, 4, dtype=torch.float64)
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=units)
    samples = draws_of(estimator, lambda: model(x), list(model.parameters()), draws)
    noise = (samples.var(0) / samples.mean(0).square()).mean().sqrt()
    expected = (2 / units) ** 0.5
    assert abs(noise / expected - 1) < 0.15, (float(noise), expected)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_sampler_takes_a_fifth_of_the_time_and_a_quarter_of_the_memory(one_thread, tmp_path):
    logits = torch.randn(2048, 8192)

    def ours():
        sample_categorical(logits, keyed_generator(CPU, 0))

    def torchs():
        torch.distributions.Categorical(logits=logits).sample()

    seconds = {ours: [], torchs: []}
    for _ in range(3):
        for call, times in seconds.items():
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    assert statistics.median(seconds[ours]) < 0.2 * statistics.median(seconds[torchs])
    assert peak_bytes(ours, tmp_path) < 0.25 * peak_bytes(torchs, tmp_path)
