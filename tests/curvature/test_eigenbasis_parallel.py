"""The eigenbasis on two real processes: one basis for all, and the estimate of one process with the same units."""

import pytest
import torch
import torch.nn.functional as F
from specification import Pieces
from support import VOCABULARY, Toy, fixed_labels, run_worker, toy_batches

PIECES = {"net.0.weight": Pieces(1, 10, 6, 10, 6), "net.2.weight": Pieces(1, VOCABULARY, 10, VOCABULARY, 10)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eigenbasis")
    run_worker("eigenbasis", folder, processes=2, timeout=150)
    return [torch.load(folder / f"rank{r}.pt") for r in (0, 1)]


def test_first_h_equals_that_of_one_process_with_the_same_units(ranks):
    torch.manual_seed(0)
    model = Toy()
    sums, n = {name: 0.0 for name in PIECES}, 0
    params = dict(model.named_parameters())
    q = {name: pieces.whole(ranks[0]["first"]["state"][name])[0] for name, pieces in PIECES.items()}
    for rank in (0, 1):
        for row, label in zip(*toy_batches(0, rank)[0], strict=True):
            if label != -100:
                n += 1
                loss = F.cross_entropy(model(row), fixed_labels(label))
                for name, (left, right) in q.items():
                    (s,) = torch.autograd.grad(loss, params[name], retain_graph=True)
                    sums[name] = sums[name] + (left.T @ s.double() @ right).square()
    for rank in ranks:
        assert rank["first"]["batch_predictions"] == n == 4
        for name, total in sums.items():
            h = rank["first"]["state"][name]["hessian"].double()
            assert (h - total / n).abs().max() <= 1e-5 * (total / n).max(), name


def test_the_basis_is_that_of_the_gradient_of_both_ranks(ranks):
    torch.manual_seed(0)
    model = Toy()
    for rank in (0, 1):
        x, labels = toy_batches(0, rank)[0]
        (F.cross_entropy(model(x), labels, reduction="sum") / 2).backward()
    g = model.net[0].weight.grad.double()
    state = ranks[0]["first"]["state"]["net.0.weight"]
    torch.testing.assert_close(state["left_factor"][0].double(), g @ g.T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state["right_factor"][0].double(), g.T @ g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["together", "perturbed", "perturbed group"])
def test_ranks_end_with_one_basis_and_one_set_of_weights(way, ranks):
    first, second = (rank[way] for rank in ranks)
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
        for key, state in first["state"][name].items():
            assert torch.equal(state, second["state"][name][key]), (name, key)
    assert first["stats"] == second["stats"]
    assert first["sent"] == second["sent"]


def test_eigenvectors_are_sent_only_where_they_differ(ranks):
    assert [rank["together"]["sent"] for rank in ranks] == [0, 0]
    # steps 0, 1, 3 and 6 turn the basis; there are sides of three lengths: 6, 10 (twice) and 61
    assert [rank["perturbed"]["sent"] for rank in ranks] == [12, 12]


def test_the_first_ranks_eigenvectors_are_everybodys(ranks):
    """So a rank that computes others trains as if it had computed the first rank's."""
    for name, value in ranks[0]["together"]["weights"].items():
        for way in ("perturbed", "perturbed group"):
            assert torch.equal(value, ranks[1][way]["weights"][name]), name


@pytest.mark.parametrize("when", ["sharded, then built", "built, then sharded"])
def test_sharded_matrices_are_refused_in_one_sentence(ranks, when):
    assert [rank[when] for rank in ranks] == [
        "basis='eigen' rotates whole matrices, and these are sharded over ranks (FSDP2 or tensor parallelism): "
        "use DDP, or basis=None."
    ] * 2
