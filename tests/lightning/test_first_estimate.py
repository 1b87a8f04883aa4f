"""The first ĥ of a Lightning run equals the one computed by hand, row by row, however the batch is split."""

import copy

import pytest
import torch
from support import hand_estimate, run_worker, token_rows
from workers.lightning_support import (
    FILTERS,
    Classifier,
    Draw,
    LanguageModel,
    Rows,
    hand_rows,
    hessian_of,
    make_trainer,
    row_gradients,
    row_loader,
    token_loader,
)

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]


def assert_equal(h, expected, prefix):
    assert h.keys() == {prefix + name for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(h[prefix + name], value, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_transformers_model(accumulation):
    module = LanguageModel()
    expected = hand_estimate(module.model, token_rows()[:8])
    trainer = make_trainer(Draw(), accumulate_grad_batches=accumulation)
    trainer.fit(module, token_loader(8 // accumulation))
    assert_equal(hessian_of(trainer, module), expected, "model.")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sophia_logits(accumulation):
    module = Classifier()
    rows = Rows()
    expected = hand_rows(copy.deepcopy(module.net), rows.x[:8], rows.y[:8])
    trainer = make_trainer(Draw(), accumulate_grad_batches=accumulation)
    trainer.fit(module, row_loader(8 // accumulation))
    assert_equal(hessian_of(trainer, module), expected, "net.")


def test_partial_last_window():
    """Three micro-batches, windows of two: the second window is one micro-batch long."""
    module = Classifier(hessian_interval=1, lr=0.0, betas=(0.9, 0.0))
    rows = Rows(12)
    expected = hand_rows(copy.deepcopy(module.net), rows.x[8:], rows.y[8:])
    trainer = make_trainer(Draw(), accumulate_grad_batches=2, max_steps=2)
    trainer.fit(module, row_loader(4, 12))
    assert_equal(hessian_of(trainer, module), expected, "net.")


KINDS = ("model", "logits")
LAYOUTS = ("ddp", "static", "views", "unused")
SHARDED = ("sharded:fsdp2:12", "split:tensor:12", "causal:fsdp2:12")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each rank ended with, for every run on two ranks: one launch for all of them."""
    out = tmp_path_factory.mktemp("ranks")
    runs = [f"{kind}:{layout}:12" for kind in KINDS for layout in LAYOUTS]
    run_worker("lightning_parallel", out, *runs, *SHARDED, processes=2)
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks(two_ranks, kind, layout):
    first, second = (rank[f"{kind}:{layout}:12"] for rank in two_ranks)
    if kind == "model":
        expected, prefix = hand_estimate(LanguageModel().model, token_rows()[:8]), "model."
    else:
        rows = Rows()
        expected, prefix = hand_rows(Classifier().net, rows.x[:8], rows.y[:8]), "net."
    assert_equal(first["h"], expected, prefix)
    assert first["updates"] == second["updates"] == 3
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts_of_ddp_end_with_the_same_weights(two_ranks, layout):
    plain, other = (two_ranks[0][f"model:{name}:12"] for name in ("ddp", layout))
    for name, weight in plain["weights"].items():
        assert torch.equal(weight, other["weights"][name])


def test_fsdp2(two_ranks):
    """One unit spans the ranks: here one row of each."""
    net, rows = Classifier().net, Rows()
    counted = int((rows.y[:8] != -100).sum())
    pairs = [row_gradients(net, rows.x[i : i + 2], rows.y[i : i + 2]) for i in range(0, 8, 2)]
    names = [name for name, _ in net.named_parameters()]
    expected = {n: sum(g[i].square() for g in pairs) / counted for i, n in enumerate(names)}
    assert_equal(two_ranks[0]["sharded:fsdp2:12"]["h"], expected, "net.")


def test_tensor_parallel(two_ranks):
    """Both ranks see the same rows, which count once."""
    rows = Rows()
    expected = hand_rows(Classifier().net, rows.x[:4], rows.y[:4])
    assert_equal(two_ranks[0]["split:tensor:12"]["h"], expected, "net.")


def test_causal_lm_shards_itself(two_ranks):
    saved = two_ranks[0]["causal:fsdp2:12"]
    assert saved["updates"] == 3
    assert all(weight.isfinite().all() for weight in saved["weights"].values())
    assert all(h.isfinite().all() for h in saved["h"].values())
