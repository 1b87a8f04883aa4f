"""DDP and FSDP2 on two real processes against one process with the same samples and units."""

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
import torch.nn.functional as F
from support import Toy, fixed_labels, run_worker, toy_batches, toy_loss
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from sophia_integrations import GaussNewtonBartlett, Hutchinson, SophiaG


def reference(units, beta2=0.5):
    """(1 − β₂) Σ_u S_u² / N at the initial weights; `units` lists the rows of each unit as (rank, row) pairs."""
    torch.manual_seed(0)
    model = Toy()
    params = dict(model.named_parameters())
    data = {rank: toy_batches(0, rank)[0] for rank in (0, 1)}
    sums, n = {k: torch.zeros_like(p) for k, p in params.items()}, 0
    for unit in units:
        kept = [(data[r][0][i], data[r][1][i]) for r, i in unit if data[r][1][i] != -100]
        n += len(kept)
        if kept:
            loss = sum(F.cross_entropy(model(x), fixed_labels(y)) for x, y in kept)
            for k, g in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
                sums[k] += g.square()
    return {k: (1 - beta2) * s / n for k, s in sums.items()}


DDP = ["ddp", "ddp-views", "ddp-static", "ddp-unused"]
FSDP = ["fsdp", "fsdp-no-reshard", "fsdp-mixed"]
UNSEEN = ["fsdp-one-unseen", "fsdp-one-without-rows", "fsdp-none-seen"]
OTHERS = ["tp:3", "tp:1", "ddp-same-rows:1", "ddp-hutchinson:1", "empty:1", "ddp:7", "ddp-static:7", "fsdp:3", "soak"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def ranks(folder):
    """What both ranks ended with, by layout and number of steps: one launch for all of them."""
    names = [*(f"{name}:1" for name in (*DDP, *FSDP)), *(f"{name}:3" for name in UNSEEN), *OTHERS]
    run_worker("parallel", folder, *names, processes=2, timeout=200)
    first, second = (torch.load(folder / f"rank{r}.pt") for r in (0, 1))
    return {name: (first[name], second[name]) for name in names}


def assert_close(actual, expected, tolerance=1e-5):
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= tolerance * value.abs().max(), name


EACH_ROW = [[(rank, row)] for rank in (0, 1) for row in range(4)]
ROW_PAIRS = [[(0, row), (1, row)] for row in range(4)]


@pytest.mark.parametrize("layout", DDP)
def test_ddp_equals_one_process(ranks, layout):
    first = ranks[f"{layout}:1"]
    assert_close(first[0]["h"], reference(EACH_ROW))
    assert all(torch.equal(first[0]["h"][k], first[1]["h"][k]) for k in first[0]["h"])


@pytest.mark.parametrize("layout", FSDP)
def test_fsdp2_equals_one_process_with_units_across_ranks(ranks, layout):
    first = ranks[f"{layout}:1"]
    assert_close(first[0]["h"], reference(ROW_PAIRS), 0.03 if layout == "fsdp-mixed" else 1e-5)
    assert first[0]["stats"] == first[1]["stats"] and first[0]["stats"]["hessian_updates"] == 1


def test_tensor_parallel_ranks_share_rows_and_labels(ranks):
    assert_close(ranks["tp:1"][0]["h"], reference([[(0, row)] for row in range(4)]))
    for first, second in (ranks["tp:1"], ranks["tp:3"]):
        assert first["stats"] == second["stats"]
        assert all(torch.equal(first["weights"][k], second["weights"][k]) for k in first["weights"])


def test_ranks_draw_their_own_labels(ranks):
    both = ranks["ddp-same-rows:1"][0]["h"]
    torch.manual_seed(0)
    model = Toy()
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=64)
    optimizer = SophiaG(model.parameters(), lr=1e-2, betas=(0.9, 0.5), estimator=estimator)
    x, labels = toy_batches(0, 0)[0]
    F.cross_entropy(model(x, labels=labels), labels).backward()
    optimizer.step()
    for name, param in model.named_parameters():
        alone = optimizer.state[param]["hessian"]
        assert torch.linalg.norm(both[name] - alone) > 0.1 * torch.linalg.norm(alone)
        assert 0.2 < both[name].sum() / alone.sum() < 5


def test_hutchinson_on_two_ranks_pools_what_each_would_estimate(ranks, monkeypatch):
    pooled, n = {}, 0
    for rank in (0, 1):
        monkeypatch.setattr("sophia_integrations.curvature.engine.rank_of", lambda group, rank=rank: rank)
        torch.manual_seed(0)
        model = Toy()
        estimator = Hutchinson(model, fraction=1.0, units=64, loss=toy_loss)
        estimator.arm(True)
        x, labels = toy_batches(0, rank)[0]
        model(x, labels=labels)
        estimate = estimator.estimate(list(model.parameters()), 0)
        assert estimate.num_predictions == int((labels != -100).sum())
        n += estimate.num_predictions
        for name, param in model.named_parameters():
            pooled[name] = pooled.get(name, 0) + estimate.diagonal[param] * estimate.num_predictions
    for rank in ranks["ddp-hutchinson:1"]:
        assert_close(rank["h"], {name: 0.5 * value / n for name, value in pooled.items()})


def test_a_rank_without_a_batch_joins_and_gets_the_others_estimate(ranks):
    for rank in ranks["empty:1"]:
        assert_close(rank["h"], reference([[(0, row)] for row in range(4)]))


@pytest.mark.parametrize("layout", UNSEEN)
def test_sharded_ranks_without_a_batch_drop_the_estimate_together(ranks, layout):
    """The first step is in the wrong mode, or has no rows, on rank 1 or on both; the two after it are as ever."""
    first, second = ranks[f"{layout}:3"]
    assert first["stats"] == second["stats"]
    assert (first["stats"]["hessian_updates"], first["stats"]["hessian_skipped"]) == (2, 1)
    for part in ("h", "m", "weights"):
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())
        assert all(value.isfinite().all() and value.any() for value in first[part].values())
    reason = "FSDPToy was not called in training mode" if layout == "fsdp-none-seen" else "some ranks have no rows"
    for rank in (first, second):
        assert sum(f"made no Hessian estimate at step 0: {reason}" in text for text in rank["said"]) == 1


def test_static_graph_leaves_the_weights_equal_to_plain_ddp(ranks):
    for first, second in (ranks["ddp:7"], ranks["ddp-static:7"]):
        assert first["stats"]["hessian_updates"] == 4
        assert all(torch.equal(first["weights"][k], second["weights"][k]) for k in first["weights"])
    for name, value in ranks["ddp:7"][0]["weights"].items():
        torch.testing.assert_close(ranks["ddp-static:7"][0]["weights"][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch")
def test_checkpoint_of_two_sharded_ranks_opens_in_one_process(ranks, folder):
    saved = ranks["fsdp:3"][0]
    model = Toy()
    optimizer = SophiaG(model.parameters(), lr=1e-2, betas=(0.9, 0.5), rho=0.1, hessian_interval=2)
    optimizer.estimator = GaussNewtonBartlett(model)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "fsdp:3")
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    for name, param in model.named_parameters():
        assert torch.equal(param, saved["weights"][name])
        assert torch.equal(optimizer.state[param]["hessian"], saved["h"][name])
        assert torch.equal(optimizer.state[param]["exp_avg"], saved["m"][name])
    stats = optimizer.stats()
    assert optimizer.progress.step == 3 and stats["hessian_updates"] == 2
    for key in ("win_rate", "hessian_norm", "hessian_zero_fraction", "hessian_age"):
        assert float(stats[key]) == pytest.approx(saved["stats"][key]), key


def test_soak_with_masked_batches_and_nan_losses(ranks):
    first, second = ranks["soak"]
    assert first["counters"] == second["counters"] and first["counters"]["step"] == 300
    assert first["finite"] and second["finite"]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    assert first["seen"]["masked"] + second["seen"]["masked"] > 20 and first["seen"]["nan"] + second["seen"]["nan"] > 5
    assert first["counters"]["hessian_skipped"] > 0 and first["counters"]["hessian_updates"] > 80
    assert first["skipped_coordinates"] == second["skipped_coordinates"] > 0
