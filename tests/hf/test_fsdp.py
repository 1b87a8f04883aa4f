"""FSDP2 through the Trainer and through accelerate, on 2 gloo ranks: first ĥ, checkpoints, and what is refused."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from support import FixedLabels, lora_llama, run_worker, tiny_model, token_rows

from sophia_integrations import GaussNewtonBartlett, SophiaG
from sophia_integrations.hf import parallelism

FIVE = not transformers.__version__.startswith("4.")
SHARDED = "trainer accumulation tied lora no-reshard checkpointing low-memory-loading bf16 compiled loop-fsdp2".split()
if FIVE:  # transformers 4 shards no model at load
    SHARDED.append("at-load")
CHECKPOINTS = ["full-checkpoint", "sharded-checkpoint"]
REFUSED = {
    "fsdp1": "does not run under FSDP1, which flattens the parameters: set fsdp_version: 2",
    "sophia_h": "optim='sophia_h' does not run under FSDP2",
    "plain-fsdp1": "GaussNewtonBartlett does not run under FSDP1 .* use FSDP2",
}
if FIVE:
    REFUSED["tensor"] = "here tensor parallelism gives several ranks the same rows.*process_group="


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks ended with, by name of the run: one launch for all of them."""
    folder = tmp_path_factory.mktemp("fsdp")
    names = [*SHARDED, "loop-ddp", "twice", *CHECKPOINTS, *(f"refused-{name}" for name in REFUSED)]
    run_worker("trainer_fsdp", folder, *names, processes=2, timeout=270)
    first, second = (torch.load(folder / f"rank{rank}.pt") for rank in (0, 1))
    return {name: (first[name], second[name]) for name in names}


def plain_name(name):
    """The parameter's name in the model as it was before compilation and checkpointing."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def in_one_process(model, ids, rows, units):
    """First ĥ of a plain loop whose micro-batch is the rows `ids`, in `units` units of neighbouring rows."""
    labels = {tuple(row["input_ids"].tolist()): row["labels"] for row in rows}
    labels = torch.stack([labels[tuple(row.tolist())] for row in ids])
    estimator = GaussNewtonBartlett(model.train(), fraction=1.0, units=units)
    estimator.readout.likelihood = FixedLabels()
    optimizer = SophiaG(model.parameters(), lr=1e-3, estimator=estimator)
    model(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()
    return {n: optimizer.state[p]["hessian"] for n, p in model.named_parameters() if p.requires_grad}


def model_of(name):
    if name == "lora":
        return lora_llama()
    return tiny_model("gpt2" if name in ("tied", "loop-fsdp2") else "llama")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", SHARDED)
def test_first_estimate_is_that_of_one_process_with_units_of_a_row_of_each_rank(ranks, name):
    first, second = ranks[name]
    assert first["updates"] == second["updates"] == 1
    assert first["type"].startswith("FSDP") and (name == "at-load" or first["kind"] == "FSDP True")
    ids = torch.stack([first["seen"], second["seen"]], 1).flatten(0, 1)
    assert len(ids) == (12 if name == "accumulation" else 4)
    rows = token_rows(16 if name.startswith("loop") else 64)
    expected = in_one_process(model_of(name), ids, rows, units=len(ids) // 2)
    actual = {plain_name(n): h for n, h in first["h"].items()}
    assert actual.keys() == expected.keys()
    for parameter, value in expected.items():
        tolerance = 0.05 if name == "bf16" else 1e-5
        assert (actual[parameter] - value).abs().max() <= tolerance * value.abs().max() > 0, parameter


@pytest.mark.parametrize("name", [*SHARDED, "loop-ddp", "twice"])
def test_ranks_end_with_the_same_weights_state_and_figures(ranks, name):
    first, second = ranks[name]
    for part in ("h", "m", "weights"):
        assert first[part].keys() == second[part].keys()
        for parameter, value in first[part].items():
            assert torch.equal(value, second[part][parameter]) and torch.isfinite(value).all(), parameter
    assert (first["win_rate"], first["norm"]) == (second["win_rate"], second["norm"])


def test_accelerate_loop_under_ddp(ranks):
    """2 micro-batches of 2 rows on 2 ranks, every row a unit of its own: no step is made between the two."""
    first, second = ranks["loop-ddp"]
    assert first["kind"] == "MULTI_CPU False" and len(first["losses"]) == 2
    ids = torch.cat([first["seen"], second["seen"]])
    expected = in_one_process(tiny_model(), ids, token_rows(16), units=len(ids))
    for parameter, value in expected.items():
        assert (first["h"][parameter] - value).abs().max() <= 1e-5 * value.abs().max() > 0, parameter


def test_train_twice_shards_once_and_goes_on(ranks):
    first, _ = ranks["twice"]
    assert first["updates"] == 3 and first["type"].startswith("FSDP")  # 12 steps in all, one estimate every 5


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_run_is_refused_in_one_sentence_on_every_rank(ranks, name):
    first, second = ranks[f"refused-{name}"]
    assert re.search(REFUSED[name], first) and first == second


@pytest.mark.parametrize(
    ("kind", "deepspeed", "message"),
    [
        ("DEEPSPEED", None, "does not run under DeepSpeed, which owns the gradients: use DDP or FSDP2"),
        ("MULTI_GPU", "zero3.json", "does not run under DeepSpeed"),
        ("MEGATRON_LM", None, "does not run under Megatron-LM, which owns the optimizer"),
    ],
)
def test_engines_that_no_test_here_can_start_are_refused(monkeypatch, kind, deepspeed, message):
    monkeypatch.setattr(parallelism, "_accelerate_state", lambda: (kind, SimpleNamespace()))
    with pytest.raises(ValueError, match=message):
        parallelism.check_parallelism(SimpleNamespace(deepspeed=deepspeed), tiny_model(), second_derivatives=False)


@pytest.mark.parametrize("short", ["tp", "cp", "sp"])
def test_rows_shared_by_ranks_are_refused(monkeypatch, short):
    sizes = SimpleNamespace(**{"tp_size": 1, "cp_size": 1, "sp_size": 1, f"{short}_size": 2})
    state = SimpleNamespace(parallelism_config=sizes)
    monkeypatch.setattr(parallelism, "_accelerate_state", lambda: ("MULTI_GPU", state))
    word = {"tp": "tensor", "cp": "context", "sp": "sequence"}[short]
    with pytest.raises(ValueError, match=f"DDP and FSDP2, and here {word} parallelism gives"):
        parallelism.check_parallelism(SimpleNamespace(), tiny_model(), second_derivatives=False)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_resumed_run_is_bit_equal_with_both_kinds_of_checkpoint(ranks, kind):
    for straight, resumed in ranks[kind]:
        assert straight["updates"] == resumed["updates"] == 3
        assert straight["losses"] == resumed["losses"] and len(straight["losses"]) == 8
        for part in ("h", "m", "weights"):
            assert all(torch.equal(value, resumed[part][name]) for name, value in straight[part].items()), part
