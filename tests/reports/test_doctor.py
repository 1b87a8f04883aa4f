"""`sophia doctor` on runs that were really trained, well and badly; `record.py` beside this file made them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import make_trainer

from sophia_integrations.errors import UserError
from sophia_integrations.reports.checks import examine
from sophia_integrations.reports.checks.sophia import proposed_rho
from sophia_integrations.reports.doctor import doctor
from sophia_integrations.reports.run_folder import read_run

HERE = Path(__file__).parent
RUNS = HERE / "recorded"
GOOD = ("good-paper", "good-eigen", "good-adamw", "trainer-good", "tensorboard-good")
# name of a recording → the checks that find something, in order, and what the first of them proposes
BAD = {
    "rho-too-small": (["win-rate"], ["rho=0.0001 → rho=0.097", "rho=0.0001 → rho=auto"]),
    "rho-too-large": (["win-rate"], ["rho=100 → rho=0.29", "rho=100 → rho=auto"]),
    "eps-too-large": (["curvature-share"], ["eps=0.01 → eps=1e-12"]),
    "unclipped-too-small": (["win-rate", "win-rate"], ["unclipped_start=0.05 → unclipped_start=0.8"]),
    "lr-too-high": (["learning-rate"], ["training.learning_rate: 0.8 → 0.008"]),
    "lr-too-low": (["learning-rate"], ["training.learning_rate: 8e-05 → 0.008"]),
    "always-clipped": (["gradient-clipping"], ["training.max_grad_norm: 0.0001 → 2"]),
    "no-warmup": (["warm-up"], ["training.warmup_steps: 0 → 20"]),
    "pass-too-dear": (["pass-time"], ["hessian_fraction=1 → ", "hessian_units=64 → ", "hessian_interval=2 → "]),
    "nan": (["not-finite"], ["training.learning_rate: 1e+30 → 0.008"]),
    "interrupted": (["interrupted"], []),
    "trainer-masked": (["estimates"], []),
    "spike-at-the-peak": (["spike"], ["training.max_grad_norm: 0 → 0.6", "training.learning_rate: 0.07 → 0.03"]),
    "trainer-spike": (["spike"], []),
    "trainer-spike-of-the-gradient": (["spike"], []),
}


@pytest.fixture
def copied(tmp_path):
    """Copies a recording to change it."""

    def copy(name):
        return Path(shutil.copytree(RUNS / name, tmp_path / "run"))

    return copy


def change(folder, edit):
    """Rewrites each event of a metrics file with `edit`."""
    metrics = folder / "metrics.jsonl"
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(edit(event)) + "\n" for event in events))
    return folder


def said_of(folder):
    lines = []
    return doctor(folder, say=lines.append), lines


@pytest.mark.parametrize("name", GOOD)
def test_a_good_run_has_nothing_off(name):
    code, lines = said_of(RUNS / name)
    assert code == 0 and len(lines) == 2
    assert lines[1].startswith("nothing off; looked at loss, ")
    assert ("adamw_torch, not Sophia" in lines[0]) == (name == "good-adamw")
    assert ("sophia/win_rate" in lines[1]) == (name != "good-adamw")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_run_has_its_own_finding_first(name):
    checks, edits = BAD[name]
    code, lines = said_of(RUNS / name)
    findings = examine(read_run(RUNS / name))
    assert code == 1 and [finding.check for finding in findings] == checks
    assert len(findings[0].edits) == len(edits)
    for edit, expected in zip(findings[0].edits, edits, strict=True):
        assert expected in str(edit)
        file, line = edit.place.rsplit(":", 1)
        key = edit.key.rpartition(".")[2]
        assert key in Path(file).read_text().splitlines()[int(line) - 1]
        assert any(str(edit) in said for said in lines)


def test_every_recording_is_used():
    assert {path.name for path in RUNS.iterdir()} == {*GOOD, *BAD}


def test_errors_come_first_and_say_where():
    (finding,) = examine(read_run(RUNS / "nan"))
    assert finding.severity == "error" and finding.steps == (10, 200)
    (spike,) = examine(read_run(RUNS / "trainer-spike"))
    assert spike.steps == (110,) and "look at the batches of steps 101 to 110" in spike.sentence
    (peak,) = examine(read_run(RUNS / "spike-at-the-peak"))
    assert peak.steps == (125,) and peak.sentence.endswith("(4.23 → 4.53): the learning rate was at its peak of 0.0697")
    (gradient,) = examine(read_run(RUNS / "trainer-spike-of-the-gradient"))
    assert gradient.steps == (110,) and gradient.sentence.endswith("the gradient norm went from 0.51 to 6.2")
    (masked,) = examine(read_run(RUNS / "trainer-masked"))
    assert masked.severity == "warning" and masked.steps[0] == 50 and "8 of about 20" in masked.sentence


@pytest.mark.parametrize("name", ["good-paper", "rho-too-small", "rho-too-large"])
def test_the_proposed_rho_agrees_with_the_measured_win_rate(name):
    """At the ρ of good-paper, 0.1, a share w was left alone: the quantiles must give that ρ back for w."""
    run = read_run(RUNS / "good-paper")
    rates = sorted(run.over(run.middle, "sophia/win_rate"))
    share = rates[len(rates) // 2]
    assert proposed_rho(run, share) == pytest.approx(0.1, rel=0.25)
    assert 0.03 < proposed_rho(read_run(RUNS / name), 0.3) < 0.5


def test_a_learning_rate_that_destroys_the_run_is_an_error(copied):
    (finding,) = examine(read_run(RUNS / "lr-too-high"))
    assert finding.severity == "error" and "the loss rose from 8.6" in finding.sentence

    def rising(event):
        return {**event, "loss": event["loss"] + 2.2 * (event["step"] / 200) ** 4} if "loss" in event else event

    finding = examine(read_run(change(copied("good-eigen"), rising)))[0]
    assert (finding.check, finding.severity) == ("learning-rate", "error") and "rose to" in finding.sentence
    (edit,) = finding.edits
    assert (edit.key, edit.now, edit.proposed) == ("training.learning_rate", "0.008", "0.0008")


def test_an_absurd_learning_rate_is_answered_with_the_rule_or_with_why_there_is_none(copied):
    """Nothing says how large a model is whose run was killed, and the rule is AdamW's."""
    folder = copied("nan")
    (folder / "summary.json").unlink()
    unknown = next(line for line in said_of(folder)[1] if "→ training.learning_rate" in line)
    assert "1e+30 → by the model's size, which is not known here: AdamW's rule gives 0.008 at 0.131M, " in unknown
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("optim: adamw_torch", "optim: adafactor"))
    other = next(line for line in said_of(folder)[1] if "→ training.learning_rate" in line)
    assert "1e+30 → lower; how much is not known here: " in other and "says nothing of adafactor" in other


def test_curvature_that_is_zero_or_never_renewed_is_an_error(copied):
    folder = change(copied("good-paper"), lambda e: {**e, "sophia/hessian_norm": 0.0})
    assert [f.check for f in examine(read_run(folder))] == ["zero-curvature"]
    change(folder, lambda e: {**e, "sophia/hessian_norm": 0.5})
    (finding,) = examine(read_run(folder))
    assert (finding.check, finding.severity) == ("estimates", "error")
    assert "h stays the same from step 10 to 40" in finding.sentence
    change(folder, lambda e: {**e, "sophia/hessian_norm": e["step"] / 2})
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "hessian_updates": 3}))
    (finding,) = examine(read_run(folder))
    assert finding.severity == "error" and "only 3 Hessian estimates" in finding.sentence


def test_sophia_that_never_logged_a_figure_is_an_error(copied):
    folder = change(copied("good-paper"), lambda e: {k: v for k, v in e.items() if not k.startswith("sophia/")})
    (finding,) = examine(read_run(folder))
    assert (finding.check, finding.severity) == ("no-figures", "error")


def test_a_run_in_progress_is_not_interrupted(copied):
    fcntl = pytest.importorskip("fcntl")
    folder = copied("interrupted")
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, lines = said_of(folder)
    assert code == 0 and " of 200 steps so far" in lines[0]
    assert said_of(folder)[0] == 1


def test_edits_of_a_lightning_recipe(copied):
    folder = copied("pass-too-dear")
    callback = "    - class_path: sophia_integrations.lightning.SophiaCallback\n"
    text = (HERE / "tiny-lightning.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace(callback, callback + "      init_args: {fraction: 0.25}\n"))
    (finding,) = examine(read_run(folder))
    fraction, units, interval = finding.edits
    assert fraction.key == "trainer.callbacks.0.init_args.fraction" and (fraction.now, units.now) == ("0.25", "8")
    assert interval.key == "model.init_args.optimizer.init_args.hessian_interval" and interval.now == "10"
    lines = (folder / "recipe.yaml").read_text().splitlines()
    assert "fraction: 0.25" in lines[int(fraction.place.rsplit(":")[-1]) - 1]
    assert "hessian_interval: 10" in lines[int(interval.place.rsplit(":")[-1]) - 1]


def test_the_place_of_rho_follows_the_lightning_recipe(copied):
    folder = copied("rho-too-small")
    text = (HERE / "tiny-lightning.yaml").read_text()
    for groups, key in (("{basis: eigen, rho: 0.3}", "groups.rho"), ("null", "optimizer.init_args.rho")):
        (folder / "recipe.yaml").write_text(text.replace("{basis: eigen}", groups))
        (finding,) = examine(read_run(folder))
        assert [edit.key for edit in finding.edits] == [f"model.init_args.{key}"] * 2
        assert finding.edits[0].proposed == ("auto" if "eigen" in groups else "0.097")


def test_without_a_recipe_the_edit_is_a_bare_name(copied):
    folder = copied("rho-too-small")
    (folder / "recipe.yaml").unlink()
    (finding,) = examine(read_run(folder))
    assert [str(edit) for edit in finding.edits] == ["rho: 0.097", "rho: auto"]


def test_without_a_recipe_no_default_is_taken_for_what_was_set(copied):
    folder = copied("pass-too-dear")
    (folder / "recipe.yaml").unlink()
    (finding,) = examine(read_run(folder))
    (edit,) = finding.edits
    assert re.fullmatch(r"hessian_interval: 26\.7 times as many steps as now", str(edit))
    masked = examine(read_run(RUNS / "trainer-masked"))[0].sentence
    assert "8 of about 20 Hessian estimates (at hessian_interval 10, its default) were dropped" in masked
    folder = change(folder, lambda e: {**e, "sophia/hessian_skipped": 30, "sophia/hessian_time_fraction": 0.01})
    assert examine(read_run(folder))[0].sentence.startswith("30 Hessian estimates were dropped: h is mostly missing")


def test_a_torn_state_of_the_newest_checkpoint_names_the_one_before(copied):
    folder = copied("trainer-good")
    whole = folder / "checkpoint-200" / "trainer_state.json"
    (folder / "checkpoint-90").mkdir()
    shutil.copy(whole, folder / "checkpoint-90")
    whole.write_text(whole.read_text()[:900])
    with pytest.raises(UserError, match="200/trainer_state.json is damaged: .*checkpoint-90 can be read in its place"):
        read_run(folder)
    assert read_run(folder / "checkpoint-90").last_step == 200


def test_the_newest_checkpoint_speaks(copied):
    folder = copied("trainer-good")
    state = json.loads((folder / "checkpoint-200" / "trainer_state.json").read_text())
    state["log_history"] = [entry for entry in state["log_history"] if entry["step"] <= 90]
    state["global_step"] = 90
    control = state["stateful_callbacks"]["TrainerControl"]["args"]
    control["should_training_stop"] = False
    (folder / "checkpoint-90").mkdir()
    (folder / "checkpoint-90" / "trainer_state.json").write_text(json.dumps(state))
    run = read_run(folder)
    assert (run.last_step, run.max_steps, run.complete) == (200, 200, True)
    shutil.rmtree(folder / "checkpoint-200")
    assert [f.check for f in examine(read_run(folder))] == ["interrupted"]
    control["should_training_stop"] = True  # as EarlyStoppingCallback leaves it
    (folder / "checkpoint-90" / "trainer_state.json").write_text(json.dumps(state))
    assert not examine(read_run(folder))


def test_a_state_with_nan_as_the_trainer_writes_it(copied):
    folder = copied("trainer-good")
    file = folder / "checkpoint-200" / "trainer_state.json"
    state = json.loads(file.read_text())
    for entry in state["log_history"][12:]:
        entry["grad_norm"] = float("nan")
    file.write_text(json.dumps(state))
    finding = examine(read_run(folder))[0]
    assert finding.check == "not-finite" and finding.steps == (130, 200) and "gradient norm" in finding.sentence


def test_tensorboard_files_of_a_trainer_give_the_same_findings(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    logged = read_run(RUNS / "rho-too-large")
    with SummaryWriter(str(tmp_path / "runs" / "one")) as writer:
        for step, row in logged.rows.items():
            for name, value in row.items():
                known = {"lr": "train/learning_rate", "eval_loss": "eval/loss"}
                writer.add_scalar(known.get(name, f"train/{name}"), value, step)
    run = read_run(tmp_path)
    assert run.last_step == 200 and run.optimizer is None and run.sophia
    assert run.series("lr") == pytest.approx(logged.series("lr"), rel=1e-6)
    assert run.series("eval_loss") == pytest.approx(logged.series("eval_loss"), rel=1e-6)
    (finding,) = examine(run)
    assert finding.check == "win-rate" and [str(edit) for edit in finding.edits] == ["rho: 0.29", "rho: auto"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is not there; give a run folder"),
        ({}, "is no run folder: it has no metrics.jsonl, no trainer_state.json"),
        ({"metrics.jsonl": ""}, "metrics.jsonl holds no logged loss"),
        ({"metrics.jsonl": '{"step": 1, "lo\n\x00\x01[]\n"a"\n'}, "metrics.jsonl holds no logged loss"),
        ({"trainer_state.json": "{"}, "trainer_state.json is damaged: it is not JSON"),
        ({"trainer_state.json": "[]"}, "trainer_state.json is damaged: it holds no JSON object"),
        ({"trainer_state.json": "{}"}, "trainer_state.json is damaged: it holds no log_history"),
        ({"events.out.tfevents.0": "nothing"}, "events.out.tfevents.0 holds no logged loss"),
        ({"metrics.jsonl": '{"step": 1, "loss": 2}', "recipe.yaml": "a: [1"}, "recipe.yaml is damaged"),
        ({"metrics.jsonl": '{"step": 1, "loss": 2}', "summary.json": "{"}, "summary.json is damaged"),
    ],
)
def test_a_folder_that_cannot_be_read_gets_one_sentence(tmp_path, files, message):
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError) as error:
        doctor(folder)
    assert message in str(error.value) and str(folder) in str(error.value)


def test_a_folder_of_runs_is_not_taken_for_one_of_them(tmp_path):
    """As that of a comparison, whose runs have TensorBoard files too."""
    for name in ("good-paper", "good-eigen"):
        shutil.copytree(RUNS / name, tmp_path / "runs" / name)
        shutil.copytree(RUNS / "tensorboard-good", tmp_path / "runs" / name / "tensorboard")
    with pytest.raises(UserError, match="is no run folder but holds 2 run folders: give one, such as .*runs/good-"):
        doctor(tmp_path)


def test_a_torn_last_line_is_left_out(copied):
    folder = copied("good-paper")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 210, "lo')
    assert said_of(folder)[0] == 0


def test_json(capsys):
    assert doctor(RUNS / "pass-too-dear", as_json=True) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["optimizer"], said["last_step"], said["max_steps"], said["sophia"]) == ("sophia", 200, 200, True)
    (finding,) = said["findings"]
    assert (finding["check"], finding["severity"]) == ("pass-time", "warning")
    assert finding["edits"][1]["now"] == "hessian_units=64"
    assert finding["edits"][1]["place"].endswith("recipe.yaml:26")


def test_it_imports_no_training_code():
    code = (
        "import sys\nfrom sophia_integrations.reports.doctor import doctor\n"
        f"doctor({str(RUNS / 'good-eigen')!r})\n"
        "print(sorted({'torch', 'transformers', 'lightning', 'tensorboard', 'pydantic'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("rho", "ratios"), [("0.05", True), ("auto", False)])
def test_a_trainer_logs_what_a_rho_is_proposed_from(tmp_path, rho, ratios):
    trainer = make_trainer(tmp_path, optim_args=f"rho={rho},hessian_interval=2", logging_steps=1)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 20
    for entry in logged:
        assert {"sophia/ratio_q10", "sophia/ratio_q50"} <= entry.keys() if ratios else "sophia/rho" in entry
        assert ("sophia/ratio_q10" in entry) == ratios and ("sophia/rho" in entry) != ratios
    if ratios:
        assert all(0 < entry["sophia/ratio_q10"] < entry["sophia/ratio_q50"] for entry in logged)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_lightning_logs_the_same():
    from workers.lightning_support import LanguageModel, token_loader
    from workers.lightning_support import make_trainer as make_lightning

    trainer = make_lightning(max_steps=4, log_every_n_steps=1)
    trainer.fit(LanguageModel(), token_loader())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert 0 < logged["sophia/ratio_q10"] < logged["sophia/ratio_q50"] and "sophia/rho" not in logged
    assert not {"sophia/ratio_q10", "sophia/ratio_q50"} & trainer.progress_bar_metrics.keys()
