"""Sophia under LightningCLI: by class path and by short name, with help, and the recipe file."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from support import tiny_model
from tiny_language import save_tiny_chat_model, write_chats
from torch.optim import AdamW
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
        "ignore:.is_gradient_checkpointing. is deprecated",
        "ignore:The dirpath has changed",
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:jsonargparse"),
]
RECIPES = Path(__file__).parents[2] / "recipes" / "lightning"
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "max_steps": 6, "callbacks": "sophia_integrations.lightning.SophiaCallback"}


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # which Lightning leaves in the environment
        monkeypatch.setenv(name, "0")
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


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_decay_groups_are_those_of_the_trainer(kind):
    from transformers import Trainer

    model = tiny_model(kind)
    names = Trainer.get_decay_parameter_names(None, model)
    named = dict(model.named_parameters())  # without the tied lm_head
    assert named.keys() & set(names) == {name for name, p in named.items() if p.ndim >= 2}


def test_help_tells_what_an_argument_is(capsys):
    with pytest.raises(SystemExit):
        LightningCLI(TinyData, args=["fit", "--optimizer.help=SophiaG"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--optimizer.rho" in text and "Larger clips less" in text
    assert "--optimizer.hessian_interval" in text and "steps between two estimates" in text


def test_a_callback_appended_to_one_that_is_there_is_refused():
    """`--trainer.callbacks+=` appends, it does not replace."""
    more = ["--optimizer=SophiaG", "--trainer.callbacks+=sophia_integrations.lightning.SophiaCallback"]
    with pytest.raises(ValueError, match="two SophiaCallbacks in this Trainer"):
        LightningCLI(TinyData, args=[*arguments(), *more], save_config_callback=None)


def test_a_wrong_type_is_refused(capsys):
    with pytest.raises(SystemExit):
        LightningCLI(TinyData, args=arguments(**{"optimizer": "SophiaG", "optimizer.eps": "much"}))
    assert "eps" in capsys.readouterr().err


@pytest.fixture
def base(tmp_path):
    """A small pretrained model with a chat template, and conversations."""
    save_tiny_chat_model(tmp_path / "base")
    (tmp_path / "chats").mkdir()
    write_chats(tmp_path / "chats" / "train.jsonl")
    return str(tmp_path / "base")


def small(file, tmp_path, base):
    """A shipped recipe on text of this test, with a tiny model and few steps."""
    recipe = yaml.safe_load(file.read_text())
    model, data, trainer = recipe["model"]["init_args"], recipe["data"]["init_args"], recipe["trainer"]
    data.update(cache_dir=str(tmp_path / "cache"), batch_size=2, validation_fraction=0.3, block_size=16)
    if "pretrained" in model:
        data.update(hub={"path": str(tmp_path / "chats"), "split": "train"}, tokenizer=base, block_size=32)
        model["pretrained"] = base
    else:
        for number in range(30):
            (tmp_path / f"{number}.txt").write_text(f"document {number} says hello world, and again. " * 30)
        data.update(files=[str(tmp_path / "*.txt")], vocab_size=300)
        model["config"].update(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=300)
    trainer.update(max_steps=12, val_check_interval=6, limit_val_batches=2, accelerator="cpu", precision="32-true")
    trainer.update(enable_progress_bar=False, default_root_dir=str(tmp_path / "runs"), log_every_n_steps=2)
    trainer["callbacks"][-1]["init_args"]["every_n_train_steps"] = 6
    model["warmup_steps"] = 2
    target = tmp_path / "small.yaml"
    target.write_text(yaml.safe_dump(recipe))
    return target


@pytest.mark.parametrize("file", sorted(RECIPES.glob("**/*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("command_line", [LightningCLI, cli.SophiaCLI])
def test_every_recipe_trains_under_plain_lightning_cli_and_goes_on(tmp_path, base, command_line, file):
    config = str(small(file, tmp_path, base))
    options = dict(save_config_kwargs={"overwrite": True})
    first = command_line(args=["fit", "--config", config], **options)
    optimizer = first.trainer.optimizers[0]
    assert type(optimizer) is (AdamW if "adamw" in file.stem else SophiaG)
    assert {"train_loss", "val_loss"} <= first.trainer.callback_metrics.keys()
    if type(optimizer) is SophiaG:
        assert optimizer.stats()["hessian_updates"] == 2 and "sophia/win_rate" in first.trainer.callback_metrics
    trained = [p for p in first.model.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    newest = max(tmp_path.glob("runs/**/*step=12.ckpt"))
    more = ["--trainer.max_steps=18", f"--ckpt_path={newest}"]
    second = command_line(args=["fit", "--config", config, *more], **options)
    assert second.trainer.global_step == 18


def test_a_recipe_runs_without_this_package_being_imported_first(tmp_path, base):
    """As the header says, and with a LightningCLI that knows nothing of us but the class paths."""
    config = small(RECIPES / "pretrain-gpt2-stdlib.yaml", tmp_path, base)
    code = "from lightning.pytorch.cli import LightningCLI; LightningCLI()"
    command = ["timeout", "-k", "5", "120", sys.executable, "-c", code, "fit", "--config", str(config)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert list(tmp_path.glob("runs/**/*step=12.ckpt"))


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
