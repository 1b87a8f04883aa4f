"""Label sampling: the distribution, the extremes, and the choice of units."""

import math

import pytest
import torch

from sophia_integrations.curvature.sampling import choose_units, keyed_generator, sample_categorical

CPU = torch.device("cpu")


def chi_square(counts, probabilities):
    """Standardised chi-square statistic over the classes that expect at least 5 draws, the rest pooled."""
    expected = probabilities.double() * counts.sum()
    big = expected >= 5
    observed = torch.cat([counts[big].double(), counts[~big].sum().double()[None]])
    expected = torch.cat([expected[big], expected[~big].sum()[None]])
    keep = expected > 0
    statistic = ((observed[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    freedom = int(keep.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(("classes", "rows", "calls"), [(2, 20_000, 1), (7, 20_000, 3), (50_257, 1_000, 5)])
def test_distribution_matches_softmax(classes, rows, calls):
    torch.manual_seed(classes)
    row = torch.randn(classes) * 3
    counts = torch.zeros(classes, dtype=torch.int64)
    for call in range(calls):
        counts += torch.bincount(
            sample_categorical(row.expand(rows, -1), keyed_generator(CPU, 0, call)), minlength=classes
        )
    assert abs(chi_square(counts, torch.softmax(row.double(), -1))) < 4


def test_extreme_logits_never_draw_an_impossible_class():
    logits = torch.full((4000, 6), -math.inf)
    logits[:, 2], logits[:, 4] = 0.0, 0.0
    drawn = sample_categorical(logits, keyed_generator(CPU, 1))
    assert set(drawn.tolist()) == {2, 4} and abs((drawn == 2).float().mean() - 0.5) < 0.05
    logits = torch.tensor([[1e4, -1e4, 0.0]]).expand(1000, -1)
    assert set(sample_categorical(logits, keyed_generator(CPU, 2)).tolist()) == {0}
    ties = torch.full((6000, 3), 1e4)
    assert torch.bincount(sample_categorical(ties, keyed_generator(CPU, 3))).min() > 1800


def test_uniform_extremes_stay_inside_the_support(monkeypatch):
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    for u in (0.0, 1 - 2**-24, 1.0):
        monkeypatch.setattr(torch, "rand", lambda *s, u=u, **k: torch.full(s, u))
        assert int(sample_categorical(logits, keyed_generator(CPU, 0))) in (1, 2)


def test_draws_do_not_depend_on_the_chunking(monkeypatch):
    torch.manual_seed(0)
    logits = torch.randn(50, 30)
    whole = sample_categorical(logits, keyed_generator(CPU, 9))
    monkeypatch.setattr("sophia_integrations.curvature.sampling.CHUNK_ELEMENTS", 70)
    assert torch.equal(sample_categorical(logits, keyed_generator(CPU, 9)), whole)


@pytest.mark.parametrize("counts", [[8], [1, 1, 1, 1], [5, 2, 7], [3, 0, 4]])
@pytest.mark.parametrize(("fraction", "units"), [(1.0, 1), (1.0, 100), (0.5, 2), (0.25, 8), (0.01, 4)])
def test_units_partition_the_chosen_rows(counts, fraction, units):
    chosen = choose_units(counts, fraction, units, keyed_generator(CPU, 0))
    flat = [(b, int(i)) for b, rows in chosen for i in rows]
    exact = fraction * sum(counts)
    assert len(flat) == len(set(flat)) and len(flat) in {max(1, math.floor(exact)), max(1, math.ceil(exact))}
    assert all(0 <= i < counts[b] for b, i in flat)
    assert len(chosen) <= units + len(counts)
    if units >= sum(counts):
        assert all(len(rows) == 1 for _, rows in chosen)


@pytest.mark.parametrize(("rows", "fraction"), [(24, 0.0625), (10, 0.33), (8, 0.9), (7, 1.0)])
def test_the_share_of_rows_is_kept_on_average(rows, fraction):
    numbers = [
        sum(len(part) for _, part in choose_units([rows], fraction, 8, keyed_generator(CPU, draw)))
        for draw in range(400)
    ]
    exact = rows * fraction
    assert {math.floor(exact), math.ceil(exact)} == set(numbers)
    assert abs(sum(numbers) / len(numbers) - exact) <= 4 * 0.5 / math.sqrt(len(numbers))


def test_keys_give_distinct_streams():
    streams = {
        tuple(torch.randint(1 << 30, (4,), generator=keyed_generator(CPU, *key)).tolist())
        for key in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, "rows")]
    }
    assert len(streams) == 6
