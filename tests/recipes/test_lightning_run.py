"""Whole runs of a tiny LightningCLI config by ``sophia train``: the folder, going on exactly, what is refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_language import save_tiny_chat_model, write_chats
from workers.lightning_support import FILTERS, causal_lm, make_trainer, token_loader

from sophia_integrations.cli import main
from sophia_integrations.errors import UserError
from sophia_integrations.recipes.running.events import read_metrics
from sophia_integrations.recipes.running.lightning_callback import RunFolderCallback
from sophia_integrations.recipes.running.lightning_run import newest_checkpoint
from sophia_integrations.recipes.running.processes import Processes
from sophia_integrations.recipes.running.run_folder import RunFolder
from sophia_integrations.recipes.running.signals import StopRequest
from sophia_integrations.recipes.running.train import train

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.timeout(300),
    *[pytest.mark.filterwarnings(f) for f in FILTERS],
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(tensorboard|jsonargparse).*"),
    pytest.mark.filterwarnings("ignore:No seed found"),
]

RECIPE = """\
# dropout stays at its default of 0.1, so that exactness covers the random state
model:
  class_path: sophia_integrations.lightning.CausalLM
  init_args:
    config: {{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 32, n_positions: 32, vocab_size: 300, bos_token_id: 0,
              eos_token_id: 0}}
    optimizer:
      class_path: sophia_integrations.SophiaG
      init_args: {{lr: 5e-3, betas: [0.9, 0.9], rho: 0.1, hessian_interval: 4}}
    warmup_steps: 5
data:
  class_path: sophia_integrations.lightning.TextDataModule
  init_args: {{files: ["{corpus}/*.txt"], vocab_size: 300, block_size: 32, batch_size: 2, validation_fraction: 0.3}}
trainer:
  accelerator: cpu
  max_steps: 60
  accumulate_grad_batches: 2
  gradient_clip_val: 1.0
  log_every_n_steps: 5
  val_check_interval: 40
  check_val_every_n_epoch: null
  callbacks:
    - class_path: sophia_integrations.lightning.SophiaCallback
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{every_n_train_steps: 10, monitor: step, mode: max, save_top_k: 3}}
"""
STEPS, FIELDS = 60, {"step", "epoch", "seconds", "loss", "lr", "grad_norm", "sophia/win_rate", "sophia/hessian_norm"}


def losses(folder: Path) -> list[tuple[int, str, float]]:
    """Every logged loss in order, as (step, name, value)."""
    return [
        (event["step"], name, event[name])
        for event in read_metrics(folder / "metrics.jsonl")
        for name in ("loss", "eval_loss")
        if name in event
    ]


def last_step(folder: Path) -> int:
    return max((event["step"] for event in read_metrics(folder / "metrics.jsonl")), default=0)


def step_of(path: Path) -> int:
    return int(re.search(r"(?:step=|stopped-)(\d+)", path.name)[1])


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("*.ckpt"), key=step_of)


@pytest.fixture(autouse=True)
def no_seed_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning puts it into the environment, from where other tests' processes would take it."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")


@pytest.fixture(scope="session")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("Lightning recipe") / "tiny.yaml"
    path.write_text(RECIPE.format(corpus=corpus), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def whole_run(config: Path, sophia: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """An uninterrupted run through the real command line, and what it printed."""
    place = tmp_path_factory.mktemp("work place")
    code, out, err = sophia.finish(sophia.start("train", config, cwd=place))
    assert code == 0, err
    return place / "runs" / "tiny", out, err


@pytest.fixture
def copy(whole_run: tuple[Path, str, str], tmp_path: Path) -> Path:
    """A copy of the whole run that a test may damage."""
    return shutil.copytree(whole_run[0], tmp_path / "runs" / "tiny", symlinks=True)


def make_incomplete(folder: Path, keep: int) -> None:
    """Takes a complete run back to what a crash after the checkpoint of step `keep` leaves."""
    (folder / "summary.json").unlink()
    for path in checkpoints(folder):
        if step_of(path) > keep:
            path.unlink()


def test_a_run_learns_and_leaves_everything(whole_run: tuple[Path, str, str]) -> None:
    folder, out, err = whole_run
    events = read_metrics(folder / "metrics.jsonl")
    trained = [event for event in events if "loss" in event]
    assert [event["step"] for event in trained] == list(range(5, STEPS + 1, 5))
    assert [event["step"] for event in events if "eval_loss" in event] == [20, 40, 60]
    assert trained[-1]["loss"] < 0.8 * trained[0]["loss"]
    assert all(FIELDS <= event.keys() for event in trained)
    assert trained[0]["lr"] == pytest.approx(5e-3 * 4 / 5) and trained[0]["grad_norm"] > 0
    for name in ("recipe.yaml", "data.json", "summary.json", "loss.png", "model/tokenizer.json"):
        assert (folder / name).stat().st_size > 0
    assert (folder / "model" / "model.safetensors").is_file()
    assert [step_of(path) for path in checkpoints(folder)] == [40, 50, 60]
    assert list((folder / "tensorboard").glob("events*"))

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["optimizer"] == "SophiaG" and summary["model"] == "gpt2" and summary["steps"] == STEPS
    assert summary["hessian_updates"] == 15 and 0 < summary["hessian_time_fraction"] < 1
    assert summary["tokens"] == STEPS * 2 * 2 * 32
    assert summary["validation_loss"] == events[-1]["eval_loss"]
    assert "lightning" in summary["versions"]

    lines = out.strip().splitlines()
    assert lines[-1].startswith(f"Everything is in {Path('runs/tiny')}: model, checkpoints, metrics.jsonl, loss.png")
    assert re.search(r"^model: gpt2, [\d,]+ parameters, optimizer SophiaG$", out, re.M)
    assert re.search(r"^step 30/60  loss [\d.]+  win rate [\d.]+  \d+:\d\d left$", out, re.M)
    assert "Warning" not in err and "GPU available" not in out + err


def test_the_model_opens_as_any_other(whole_run: tuple[Path, str, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole_run[0] / "model")
    tokenizer = AutoTokenizer.from_pretrained(whole_run[0] / "model")
    assert model.config.vocab_size >= len(tokenizer)
    assert tokenizer.decode(tokenizer("one two").input_ids) == "one two"


@pytest.mark.parametrize("source", ["the recipe", "the resolved one"])
def test_plain_lightning_cli_trains_the_same(
    source: str, config: Path, whole_run: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr("sys.argv", ["fit.py"])
    file = config if source == "the recipe" else whole_run[0] / "recipe.yaml"
    quiet = ["logger=false", "enable_progress_bar=false", "enable_model_summary=false", "max_steps=20"]
    full_schedule = "--trainer.min_steps=1"
    cli = LightningCLI(args=["fit", "--config", str(file), full_schedule, *[f"--trainer.{word}" for word in quiet]])
    assert cli.trainer.global_step == 20
    twin = train(file, ["trainer.max_steps=20", f"trainer.default_root_dir={tmp_path / 'twin'}"], say=lambda line: None)
    assert losses(twin.folder)[-1] == (20, "eval_loss", float(cli.trainer.callback_metrics["val_loss"]))


def test_a_complete_run_says_so_and_a_changed_recipe_is_refused(copy: Path, config: Path) -> None:
    said: list[str] = []
    for file in (config, copy / "recipe.yaml"):
        assert not train(file, say=said.append).trained
    assert all(re.fullmatch(r".*tiny is complete: validation loss \d\.\d{4}\. To train .*", line) for line in said)
    with pytest.raises(UserError) as error:
        train(config, ["model.init_args.optimizer.init_args.lr=1e-4"])
    assert str(error.value) == (
        f"{Path('runs/tiny')} holds a run of another recipe: model.init_args.optimizer.init_args.lr (there 0.005, "
        "asked 0.0001). Use --fresh to start in a new numbered folder, or trainer.default_root_dir=PATH to choose one"
    )


def test_fresh_never_overwrites(copy: Path, config: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    outcome = train(config, ["trainer.max_steps=2"], fresh=True, say=lambda line: None)
    assert outcome.folder == Path("runs/tiny-2")
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_exactly(
    number: signal.Signals, config: Path, sophia: Any, whole_run: tuple[Path, str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "tiny"
    process = sophia.start("train", config, cwd=tmp_path)
    sophia.wait_for(lambda: last_step(folder) >= 25, process)
    process.send_signal(number)
    code, out, err = sophia.finish(process)
    assert not (folder / "summary.json").exists() and "Traceback" not in err
    if number != signal.SIGKILL:
        assert code == 128 + number, err
        stop = re.search(r"^Stopped at step (\d+) of 60, checkpoint saved in .*the same command again\.$", out, re.M)
        assert stop and (folder / "checkpoints" / f"stopped-{stop[1]}.ckpt").is_file()
    said: list[str] = []
    assert train(config, say=said.append).trained
    assert any(line.startswith("resuming from") for line in said)
    assert losses(folder) == losses(whole_run[0])
    assert json.loads((folder / "summary.json").read_text())["tokens"] == STEPS * 2 * 2 * 32
    assert [step_of(path) for path in checkpoints(folder)][-1] == STEPS
    assert not list((folder / "checkpoints").glob("stopped-*"))


@pytest.mark.parametrize("damage", ["torn", "nothing in it"])
def test_a_damaged_checkpoint_is_passed_over(copy: Path, config: Path, damage: str) -> None:
    expected = losses(copy)
    make_incomplete(copy, keep=60)
    newest = checkpoints(copy)[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2] if damage == "torn" else b"")
    said: list[str] = []
    train(config, say=said.append)
    assert any(f"{newest.name}, which is not whole" in line for line in said)
    assert any(re.fullmatch(r"resuming from .*step=50\.ckpt", line) for line in said)
    assert (copy / "checkpoints" / "broken" / newest.name).is_file()
    assert losses(copy) == expected


def test_a_crash_after_the_last_step_only_finishes(copy: Path, config: Path) -> None:
    before, summary = losses(copy), json.loads((copy / "summary.json").read_text())
    make_incomplete(copy, keep=60)
    shutil.rmtree(copy / "model")
    train(config, say=lambda line: None)
    again = json.loads((copy / "summary.json").read_text())
    assert losses(copy) == before and (copy / "model" / "model.safetensors").is_file()
    for name in ("validation_loss", "train_loss", "steps", "tokens", "hessian_updates"):
        assert again[name] == summary[name]


def test_an_evaluation_that_a_crash_cut_off_is_made_up_for(copy: Path, config: Path) -> None:
    """Lightning saves before it evaluates, and does not evaluate the same step again."""
    expected = losses(copy)
    make_incomplete(copy, keep=40)
    metrics = copy / "metrics.jsonl"
    lines = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= 40]
    assert "eval_loss" in lines[-1]
    metrics.write_text("\n".join(lines[:-1]) + "\n")
    train(config, say=lambda line: None)
    assert losses(copy) == expected


def test_changed_text_is_refused(copy: Path, config: Path) -> None:
    make_incomplete(copy, keep=50)
    data: dict[str, Any] = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps({**data, "digest": "of other text"}))
    with pytest.raises(UserError, match="the text or the tokenizer changed since the run in"):
        train(config, say=lambda line: None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.callbacks=[{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {dirpath: x}}]",
            "leave dirpath out of ModelCheckpoint",
        ),
        ("trainer.devices=2", "asks for 2 devices, and this is one of 1 process.es. here; start it with --nproc 2"),
        ("data.init_args.block_size=64", "^block_size 64 is longer than the model's context of 32 tokens"),
        ("model.init_args.config.vocab_size=100", "the tokenizer has 298 tokens, and the model's vocab_size is only"),
        ("data.init_args.files=['nothing/*.txt']", "no file matches"),
        ("model.init_args.pretrained=/nowhere", "^CausalLM needs either config or pretrained"),
        (
            "model.init_args={pretrained: /nowhere, peft: {r: 2}}",
            "^CausalLM's pretrained: '/nowhere' cannot be loaded: ",
        ),
        ("model.init_args={pretrained: /nowhere, peft: {q: 2}}", "model.init_args.peft.q: unknown key"),
        ("trainer.strategy=deepspeed", "(?i)deepspeed"),
        (
            "trainer.callbacks=[{class_path: lightning.pytorch.Trainer}]",
            "^trainer.callbacks: .* lightning.pytorch.Trainer ",
        ),
        ("model.init_args.optimizer={class_path: SophiaX}", "^model.optimizer: .*SophiaX"),
        ("model={class_path: sophia_integrations.Model}", "^module 'sophia_integrations' has no attribute 'Model'"),
    ],
)
def test_what_cannot_run_is_one_sentence(config: Path, override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(config, [override], say=lambda line: None)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("runs/*/checkpoints/*"))


def test_a_disk_that_fills_up_ends_in_one_sentence(config: Path, sophia: Any, tmp_path: Path) -> None:
    import resource

    limits = [(resource.RLIMIT_FSIZE, 70_000)]
    code, _, err = sophia.finish(sophia.start("train", config, cwd=tmp_path, limits=limits))
    assert code == 2 and "Traceback" not in err, err
    assert err.strip().splitlines()[-1].endswith("it goes on from the last whole checkpoint")


MINE = '''
import torch
from lightning.pytorch import LightningModule
from sophia_integrations import SophiaG


class Mine(LightningModule):
    """Two optimizers by hand, one of them Sophia, and no transformers model."""

    def __init__(self, width: int = 8, fails: bool = False):
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters()
        self.body, self.head = torch.nn.Linear(4, width), torch.nn.Linear(width, 3)

    def sophia_logits(self, batch):
        return self.head(self.body(batch[0]).tanh()), batch[1]

    def training_step(self, batch, batch_idx):
        if self.hparams.fails:
            raise ValueError("a mistake of mine")
        first, second = self.optimizers()
        loss = torch.nn.functional.cross_entropy(*self.sophia_logits(batch))
        first.zero_grad(), second.zero_grad()
        self.manual_backward(loss)
        first.step(), second.step()
        return loss

    def configure_optimizers(self):
        return [torch.optim.SGD(self.body.parameters(), lr=0.1), SophiaG(self.head.parameters(), lr=1e-2)]

    def train_dataloader(self):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        rows = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
        return torch.utils.data.DataLoader(rows, batch_size=8)
'''


def test_a_module_of_the_user_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    callbacks = [{"class_path": "sophia_integrations.lightning.SophiaCallback"}]
    recipe = {
        "model": {"class_path": "mine.Mine", "init_args": {"width": 6}},
        "trainer": {"max_epochs": 4, "accelerator": "cpu", "log_every_n_steps": 8, "callbacks": callbacks},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "own.yaml"]) == 0
    folder = Path("runs/own")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"Everything is in {folder}: checkpoints, metrics.jsonl, loss.png, summary.json, tensorboard"
    assert [step for step, *_ in losses(folder)] == [8, 16, 24, 32, 40, 48, 56, 64]  # of both optimizers
    assert losses(folder)[-1][2] < losses(folder)[0][2]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["model"] == "Mine" and summary["validation_loss"] is None and not (folder / "model").exists()
    assert summary["hessian_updates"] == 4 and checkpoints(folder)
    for words, message in (
        ("width=x", "model.width: Expected a"),
        ("widht=3", "model: Option 'widht' is not accepted"),
    ):
        assert main(["train", "own.yaml", f"model.init_args.{words}", "--fresh"]) == 2
        assert capsys.readouterr().err.startswith(message)
    with pytest.raises(ValueError, match="^a mistake of mine$"):  # with its traceback: it is no mistake of the recipe
        train("own.yaml", ["model.init_args.fails=true"], fresh=True, say=lambda line: None)


def test_a_module_without_logits_is_told_what_to_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bare.py").write_text(MINE.replace("sophia_logits", "logits_of_mine"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    recipe = {
        "model": {"class_path": "bare.Mine"},
        "trainer": {"max_steps": 4, "accelerator": "cpu", "callbacks": "sophia_integrations.lightning.SophiaCallback"},
    }
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="found no logits in Mine. Add this method to it") as error:
        train("bare.yaml", say=lambda line: None)
    assert "\n    def sophia_logits(self, batch):\n" in str(error.value)


def test_a_checkpoint_that_would_run_code_is_refused_and_kept(tmp_path: Path) -> None:
    torch.save({"global_step": 3, "hyper_parameters": {"path": tmp_path}}, tmp_path / "step=3.ckpt")
    with pytest.raises(UserError, match="step=3.ckpt holds objects that are not plain numbers, text and tensors"):
        newest_checkpoint(tmp_path, Processes(), print)
    assert (tmp_path / "step=3.ckpt").is_file()


def test_a_checkpoint_of_other_processes_is_refused(copy: Path) -> None:
    make_incomplete(copy, keep=60)
    two = Processes()
    two.count = 2
    with pytest.raises(UserError, match="trains with one process, and this is 2: .* Go on with --nproc 1, or use"):
        newest_checkpoint(copy / "checkpoints", two, print)


def test_the_logged_loss_is_the_mean_of_all_micro_batches(tmp_path: Path) -> None:
    """Also of a window that an epoch's end cuts short; gradients are measured before they are clipped."""
    module, raw, norms = causal_lm(), [], []
    training_step = module.training_step

    def recording_step(batch: Any, batch_idx: int) -> Any:
        loss = training_step(batch, batch_idx)
        raw.append(float(loss.detach()))
        return loss

    module.training_step = recording_step
    module.on_before_optimizer_step = lambda optimizer: norms.append(
        float(torch.stack([p.grad.norm() for p in module.parameters()]).norm())
    )
    metrics = RunFolderCallback(RunFolder(tmp_path), StopRequest(Processes()))
    options = dict(accumulate_grad_batches=2, log_every_n_steps=3, gradient_clip_val=1e-3)
    make_trainer(metrics, max_steps=6, **options).fit(module, token_loader(rows=20))  # 5 batches make 3 steps
    events = read_metrics(tmp_path / "metrics.jsonl")
    assert [event["step"] for event in events] == [3, 6] and len(raw) == 10
    for number, event in enumerate(events):
        assert event["loss"] == pytest.approx(sum(raw[5 * number : 5 * number + 5]) / 5, rel=1e-6)
        assert event["grad_norm"] == pytest.approx(norms[3 * number + 2], rel=1e-5)
        assert event["epoch"] == number + 1


def test_two_processes_make_one_run(config: Path, sophia: Any, tmp_path: Path) -> None:
    """The same as one process with batches twice as large."""
    words = ["trainer.max_steps=12", "trainer.val_check_interval=12"]
    words += [f"model.init_args.config.{part}_pdrop=0.0" for part in ("resid", "embd", "attn")]
    code, out, err = sophia.finish(sophia.start("train", config, *words, cwd=tmp_path, processes=2))
    assert code == 0, err
    folder = tmp_path / "runs" / "tiny"
    one = train(config, [*words, "data.init_args.batch_size=4"], fresh=True, say=lambda line: None).folder
    assert [event[:2] for event in losses(folder)] == [(5, "loss"), (6, "eval_loss"), (10, "loss"), (12, "eval_loss")]
    for ours, theirs in zip(losses(folder), losses(one), strict=True):
        assert ours[2] == pytest.approx(theirs[2], rel=2e-3)  # the labels drawn for the passes are others
    summaries = [json.loads((place / "summary.json").read_text()) for place in (folder, one)]
    for name in ("tokens", "hessian_updates", "steps", "parameters"):
        assert summaries[0][name] == summaries[1][name]
    assert out.count("training in") == 1 and out.count("step 10/12") == 1


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "lightning").glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_trains(file: Path, corpus: Path, tmp_path: Path) -> None:
    words = ["trainer.max_steps=12", "trainer.accumulate_grad_batches=1", "trainer.log_every_n_steps=1"]
    words += ["trainer.val_check_interval=12", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    words += ["data.init_args.batch_size=4", "data.init_args.validation_fraction=0.3", "model.init_args.warmup_steps=0"]
    if "finetune" in file.stem:
        save_tiny_chat_model(tmp_path / "base")
        write_chats(tmp_path / "chats.jsonl")
        words += [f"model.init_args.pretrained={tmp_path / 'base'}", f"data.init_args.tokenizer={tmp_path / 'base'}"]
        words += ["data.init_args.hub=null", f"data.init_args.files=[{tmp_path / 'chats.jsonl'}]"]
        words += ["data.init_args.block_size=32"]
    else:
        words += [f"data.init_args.files=['{corpus}/*.txt']"]
    outcome = train(file, words, say=lambda line: None)
    logged = losses(outcome.folder)
    assert outcome.folder == Path("runs") / f"{file.stem}-lightning"
    assert logged[0][:2] == (1, "loss") and logged[-1][:2] == (12, "eval_loss") and logged[-1][2] < logged[0][2]
    summary = json.loads((outcome.folder / "summary.json").read_text())
    assert summary["optimizer"] == ("AdamW" if "adamw" in file.stem else "SophiaG")
    assert ("trained_parameters" in summary) == ("lora" in file.stem)


def test_bad_rows_are_an_error_or_skipped(config: Path, corpus: Path, tmp_path: Path) -> None:
    texts = [json.dumps({"text": path.read_text(encoding="utf-8")}) for path in sorted(corpus.glob("*.txt"))]
    (tmp_path / "rows.jsonl").write_text("\n".join([*texts, '{"text": 3}', "{"]), encoding="utf-8")
    rows = ["trainer.max_steps=2", f"data.init_args.files=['{tmp_path}/rows.jsonl']"]
    with pytest.raises(UserError, match=f"^2 of {len(texts) + 2} rows are bad: .*; data.bad_rows: skip "):
        train(config, rows, say=lambda line: None)
    said: list[str] = []
    folder = train(config, [*rows, "data.init_args.bad_rows=skip"], say=said.append).folder
    assert json.loads((folder / "summary.json").read_text())["skipped_rows"] == 2
    assert f"bad rows: 2 of {len(texts) + 2} skipped: " in "\n".join(said)
