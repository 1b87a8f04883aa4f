"""Sophia under LightningCLI: by class path and by short name, with help, and the recipe file."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from support import tiny_model
from workers.lightning_support import FILTERS, TINY, Classifier, sophia_of, token_loader

from sophia_integrations import SophiaG
from sophia_integrations.lightning import CausalLM, cli
from sophia_integrations.lightning.causal_lm import _factor

pytestmark = [
    *[pytest.mark.filterwarnings(f) for f in FILTERS],
    pytest.mark.filterwarnings(
        "ignore:LightningCLI's args parameter",
        "ignore:No seed found",
        "ignore:.*will be overridden by",
        "ignore:.*exists and is not empty",
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:jsonargparse"),
]
RECIPE = Path(__file__).parents[2] / "recipes" / "lightning" / "pretrain-gpt2-stdlib.yaml"
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "max_steps": 6, "callbacks": "sophia_integrations.lightning.SophiaCallback"}


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)


def arguments(**extra):
    trainer = [f"--trainer.{key}={value}" for key, value in QUIET.items()]
    return ["fit", *trainer, *[f"--{key}={value}" for key, value in extra.items()]]


class TinyData(Classifier):
    """A module of the user, with its own loader."""

    def train_dataloader(self):
        from workers.lightning_support import row_loader

        return row_loader()


class TinyLM(CausalLM):
    def __init__(self, warmup_steps: int = 0):
        super().__init__(TINY, warmup_steps=warmup_steps)

    def train_dataloader(self):
        return token_loader()


@pytest.mark.parametrize("name", ["SophiaG", "sophia_integrations.SophiaG"])
def test_optimizer_by_name_for_any_module(name):
    extra = {"optimizer": name, "optimizer.lr": 1e-2, "optimizer.rho": 0.02, "optimizer.hessian_interval": 3}
    run = LightningCLI(TinyData, args=arguments(**extra), save_config_callback=None)
    sophia = sophia_of(run.trainer)
    assert type(sophia) is SophiaG and sophia.param_groups[0]["rho"] == 0.02
    assert sophia.stats()["hessian_updates"] == 2


def test_optimizer_by_name_keeps_groups_and_schedule_of_causal_lm():
    extra = {"optimizer": "SophiaG", "optimizer.lr": 1e-2, "model.warmup_steps": 2}
    run = cli.SophiaCLI(TinyLM, args=arguments(**extra), save_config_callback=None)
    decayed, exempt = sophia_of(run.trainer).param_groups
    assert decayed["weight_decay"] == 0.1 and exempt["weight_decay"] == 0.0
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in exempt["params"]} == {1}
    assert len(run.trainer.lr_scheduler_configs) == 1


def test_decay_groups_are_those_of_the_trainer():
    from transformers import Trainer

    model = tiny_model()
    names = Trainer.get_decay_parameter_names(None, model)
    named = dict(model.named_parameters())  # without the tied lm_head
    assert named.keys() & set(names) == {name for name, p in named.items() if p.ndim >= 2}


def test_help_tells_what_an_argument_is(capsys):
    with pytest.raises(SystemExit):
        LightningCLI(TinyData, args=["fit", "--optimizer.help=SophiaG"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--optimizer.rho" in text and "Larger clips less" in text
    assert "--optimizer.hessian_interval" in text and "steps between two estimates" in text


def test_a_wrong_type_is_refused(capsys):
    with pytest.raises(SystemExit):
        LightningCLI(TinyData, args=arguments(**{"optimizer": "SophiaG", "optimizer.rho": "much"}))
    assert "rho" in capsys.readouterr().err


@pytest.mark.parametrize("command_line", [LightningCLI, cli.SophiaCLI])
def test_the_recipe_trains_and_goes_on(tmp_path, command_line):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"document {number} says hello world, and again. " * 30)
    recipe = yaml.safe_load(RECIPE.read_text())
    config = recipe["model"]["init_args"]["config"]
    config.update(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=300)
    data = recipe["data"]["init_args"]
    data.update(files=[str(tmp_path / "*.txt")], cache_dir=str(tmp_path / "cache"), vocab_size=300, block_size=16)
    data.update(batch_size=2, validation_fraction=0.3)
    trainer = recipe["trainer"]
    trainer.update(
        max_steps=12, val_check_interval=6, limit_val_batches=2, enable_progress_bar=False, accelerator="cpu"
    )
    trainer["callbacks"][1]["init_args"]["every_n_train_steps"] = 6
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = dict(save_config_kwargs={"overwrite": True})
    first = command_line(args=["fit", "--config", str(tmp_path / "recipe.yaml")], **options)
    assert sophia_of(first.trainer).stats()["hessian_updates"] == 2
    assert len(sophia_of(first.trainer).param_groups) == 2
    assert {"train_loss", "val_loss", "sophia/win_rate"} <= first.trainer.callback_metrics.keys()
    more = ["--trainer.max_steps=18", "--ckpt_path=runs/lightning-gpt2-stdlib/checkpoints/last.ckpt"]
    second = command_line(args=["fit", "--config", str(tmp_path / "recipe.yaml"), *more], **options)
    assert sophia_of(second.trainer).param_groups[0]["step"] == 18


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("cosine", [0, 0.5, 1, 0.5, 0]), ("linear", [0, 0.5, 1, 0.5, 0]), ("constant", [0, 0.5, 1, 1, 1])],
)
def test_schedules(schedule, expected):
    assert [_factor(step, 4, 12, schedule) for step in (0, 2, 4, 8, 12)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either config or pretrained"),
        ({"config": {"n_layer": 1}}, "needs a model_type"),
        ({"config": TINY, "schedule": "triangle"}, "schedule must be one of cosine, linear, constant"),
    ],
)
def test_causal_lm_errors(options, message):
    with pytest.raises(ValueError, match=message):
        CausalLM(**options)


def test_pretrained_path(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    module = CausalLM(pretrained=str(tmp_path))
    assert module.model.training
    for a, b in zip(module.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
