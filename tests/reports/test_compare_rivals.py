"""What each rival changes in a recipe, and that its optimizer trains."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from support import run_worker, tiny_model

from sophia_integrations.errors import UserError
from sophia_integrations.hf.registration import register_optimizer
from sophia_integrations.reports.compare.dials import dials_of, load
from sophia_integrations.reports.compare.names import NAMES
from sophia_integrations.reports.compare.optimizers import Muon, for_trainer
from sophia_integrations.reports.compare.plan import finals
from sophia_integrations.reports.compare.protocol import read_protocol
from sophia_integrations.reports.compare.rivals import RIVALS, sides_of

EXTRA = {name for name, rival in RIVALS.items() if rival.package}


@pytest.fixture
def with_extra(monkeypatch):
    """As if pytorch_optimizer were installed: what a recipe becomes does not need it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json" if name == "pytorch_optimizer" else name))


def test_the_command_line_names_the_rivals_that_there_are():
    assert set(NAMES) == set(RIVALS)


def test_every_rival_of_an_hf_recipe_reads_as_a_recipe(hf_recipe, with_extra):
    own, *others = sides_of(hf_recipe, NAMES)
    assert "sample" not in own.settings and "run_dir" not in own.settings
    for side in others:
        training = side.settings["training"]
        assert training["optim"] == RIVALS[side.name].optim
        assert training["learning_rate"] == pytest.approx(4e-3 * RIVALS[side.name].rate)
        assert training["weight_decay"] == 0.1 and training["max_steps"] == 120
        assert ("adam_beta1" in training) == (side.name in ("adamw", "soap", "muon", "sophia_eigen"))
        for key in ("task", "model", "tokenizer", "data"):
            assert side.settings[key] == own.settings[key]
    sign = next(side for side in others if side.name == "sign")
    assert "rho=0.0" in sign.settings["training"]["optim_args"]


def test_every_rival_of_a_lightning_recipe_reads_as_a_recipe(lightning_recipe, with_extra, tmp_path):
    _, *others = sides_of(lightning_recipe, [name for name in NAMES if name != "adahessian"])
    for side in others:
        arguments = side.settings["model"]["init_args"]
        assert arguments["optimizer"]["class_path"] == RIVALS[side.name].class_path
        assert arguments["optimizer"]["init_args"]["lr"] == pytest.approx(4e-3 * RIVALS[side.name].rate)
        callbacks = [entry["class_path"] for entry in side.settings["trainer"]["callbacks"]]
        assert bool(callbacks) == side.name.startswith(("sophia", "sign"))
        if side.name not in EXTRA:
            Path("side.yaml").write_text(yaml.safe_dump(side.settings), encoding="utf-8")
            assert load("side.yaml") == side.settings
    by_name = {side.name: side.settings["model"]["init_args"] for side in others}
    assert by_name["adamw"]["optimizer"]["init_args"]["betas"] == [0.8, 0.98]
    assert by_name["muon"]["groups"] == {"adamw": {"betas": [0.8, 0.98]}}
    assert "groups" not in by_name["lion"]


@pytest.mark.parametrize("framework", ["hf_recipe", "lightning_recipe"])
def test_dials_turn_and_turn_back(framework, request, with_extra):
    recipe = request.getfixturevalue(framework)
    names = [name for name in NAMES if framework == "hf_recipe" or name != "adahessian"]
    for side in sides_of(recipe, names):
        dials = dials_of(side.settings)
        for dial, value in (("rate", 0.125), ("weight_decay", 0.25), ("beta1", 0.75)):
            assert dials.get(dials.set(side.settings, dial, value), dial) == value
        half = dials.with_horizon(side.settings, 0.5)
        assert dials.length(half) == (60, None)
        warmup = half["training"] if framework == "hf_recipe" else half["model"]["init_args"]
        assert warmup["warmup_steps"] == 10
        assert dials.with_seed(side.settings, 7) != dials.with_seed(side.settings, 8)
        short = dials.measured(side.settings, 70, 10)
        assert dials.length(short) == (70, None) and dials.evaluations(short, 70) == 1


@pytest.mark.parametrize("framework", ["hf_recipe", "lightning_recipe"])
def test_all_begin_with_the_same_weights_and_see_the_same_text_in_the_same_order(framework, request, with_extra):
    """A seed's runs differ in nothing but the optimizer and its settings."""
    names = [name for name in NAMES if framework == "hf_recipe" or name != "adahessian"]
    protocol = read_protocol(budget=0, seeds=[7])
    seen = []
    for side in sides_of(request.getfixturevalue(framework), names):
        (settings,) = finals(side, protocol, "adamw")[1.0]
        assert 7 in (settings.get("seed_everything"), settings.get("training", {}).get("seed"))
        own = (settings.get("training") or settings["model"]["init_args"], settings.get("trainer", {}))
        for key in ("optim", "optim_args", "learning_rate", "adam_beta1", "optimizer", "groups", "callbacks"):
            for place in own:
                place.pop(key, None)
        seen.append(settings)
    assert len(seen) == len(names) + 1 and all(settings == seen[0] for settings in seen)


def test_epochs_and_the_steps_of_a_schedule_shrink_with_the_horizon(hf_recipe):
    text = Path(hf_recipe).read_text().replace("max_steps: 120", "num_train_epochs: 2")
    text = text.replace("cosine", "warmup_stable_decay\n  lr_scheduler_kwargs: {num_decay_steps: 40}")
    Path("epochs.yaml").write_text(text)
    own, _ = sides_of("epochs.yaml", ["adamw"])
    half = dials_of(own.settings).with_horizon(own.settings, 0.5)
    assert dials_of(half).length(half) == (None, 1.0)
    assert half["training"]["lr_scheduler_kwargs"] == {"num_decay_steps": 20}


def test_an_unknown_rival_is_answered_with_the_nearest(hf_recipe):
    with pytest.raises(UserError, match=r"--against sofia: did you mean sophia.*Known: adamw, lion"):
        sides_of(hf_recipe, ["sofia"])


def test_a_missing_package_is_named_with_its_extra(hf_recipe, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--against soap needs pytorch-optimizer.*pip install .*\[compare\]"):
        sides_of(hf_recipe, ["soap"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("lr_scheduler_type: cosine", "lr_scheduler_type: constant"), "does not decay to an end"),
        (("learning_rate: 4e-3", "max_grad_norm: 1.0"), r"training\.learning_rate: give one"),
    ],
)
def test_hf_recipes_that_cannot_be_compared(change, sentence, hf_recipe):
    Path(hf_recipe).write_text(Path(hf_recipe).read_text().replace(*change))
    with pytest.raises(UserError, match=sentence):
        sides_of(hf_recipe, ["adamw"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("devices: 1", "limit_val_batches: 0"), "leaves no validation loss to judge by"),
        (("max_steps: 120", "max_epochs: 2"), r"trainer\.max_steps: give the number of steps"),
        (("warmup_steps: 20", "schedule: constant"), "does not decay"),
        (("lr: 4.0e-3, ", ""), r"init_args\.lr: give one"),
    ],
)
def test_lightning_recipes_that_cannot_be_compared(change, sentence, lightning_recipe):
    Path(lightning_recipe).write_text(Path(lightning_recipe).read_text().replace(*change))
    with pytest.raises(UserError, match=sentence):
        sides_of(lightning_recipe, ["adamw"])


def test_adahessian_is_refused_in_lightning(lightning_recipe, with_extra):
    with pytest.raises(UserError, match="--against adahessian: .* compare an hf recipe with it"):
        sides_of(lightning_recipe, ["adahessian"])


def test_recipes_must_train_the_same(hf_recipe):
    text = Path(hf_recipe).read_text()
    for name, before, after in (("text", "block_size: 16", "block_size: 8"), ("steps", "steps: 120", "steps: 300")):
        Path(f"{name}.yaml").write_text(text.replace(before, after))
    with pytest.raises(UserError, match="its data is not the recipe's"):
        sides_of(hf_recipe, ["text.yaml"])
    with pytest.raises(UserError, match="it trains 300 steps, and the recipe 120"):
        sides_of(hf_recipe, ["steps.yaml"])
    Path("other.yaml").write_text(text.replace("4e-3", "5e-3"))
    assert [side.name for side in sides_of(hf_recipe, ["other.yaml", "tiny.yaml"])] == ["tiny", "other", "tiny#2"]


def test_the_trainer_trains_with_every_rival_that_is_installed(tmp_path):
    """Muon always, the others with the extra compare."""
    extra = ["lion", "soap", "adahessian"] if importlib.util.find_spec("pytorch_optimizer") else []
    out = run_worker("compare_rivals", tmp_path, "muon", *extra).stdout
    losses = json.loads(out.partition("losses ")[2])
    assert set(losses) == {"muon", *extra}
    for name, curve in losses.items():
        assert all(map(math.isfinite, curve)) and curve[-1] < curve[0] - 0.01, (name, curve)


def test_muon_trains_matrices_and_leaves_the_rest_to_adamw_and_goes_on_from_its_state():
    def trained(steps: int, state: dict | None = None, model=None):
        model = model or tiny_model()
        optimizer = Muon(model.parameters(), lr=1e-2, weight_decay=0.0)
        if state is not None:
            optimizer.load_state_dict(state)
        for step in range(steps):
            ids = torch.arange(12).remainder(7 + step).unsqueeze(0)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    model, optimizer = trained(2)
    for parameter in model.parameters():
        assert ("momentum_buffer" in optimizer.state[parameter]) == (parameter.ndim == 2)
        assert ("exp_avg_sq" in optimizer.state[parameter]) == (parameter.ndim != 2)
    again, resumed = trained(2, optimizer.state_dict(), tiny_model())
    assert {len(resumed.state[p]) for p in again.parameters()} == {1, 3}
    for group in resumed.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in again.parameters()]
    again(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(before, again.parameters(), strict=True))


def test_an_optimizer_argument_that_a_rival_does_not_know():
    class Arguments:
        optim_args, learning_rate, weight_decay = "momentum=0.9", 1e-3, 0.1

    with pytest.raises(ValueError, match="only beta1 is known to lion, not momentum"):
        for_trainer("compare_lion")(Arguments(), torch.nn.Linear(2, 2))


def test_the_names_of_rivals_are_known_in_the_runs_of_a_comparison_alone(hf_recipe):
    Path("muon.yaml").write_text(yaml.safe_dump(sides_of(hf_recipe, ["muon"])[1].settings), encoding="utf-8")
    with pytest.raises(UserError, match="training.optim: .*compare_muon"):
        load("muon.yaml")
    with pytest.raises(ValueError, match="optim='sophia' is Sophia's own"):
        register_optimizer("sophia", for_trainer("compare_muon"))
