"""`sophia run`: other people's scripts with Sophia known, and nothing else changed about them."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from tiny_language import save_tiny_language_model, write_jsonl

SOPHIA = [sys.executable, "-m", "sophia_integrations", "run"]
PYTHON = [sys.executable]


def call(command, cwd, timeout=100, **environment):
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = ["timeout", "-k", "5", str(timeout), *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True)


def write(path, code):
    path.write_text(textwrap.dedent(code), encoding="utf-8")
    return path


@pytest.fixture
def scripts(tmp_path):
    """A script and a module that tell how they see the world."""
    (tmp_path / "place").mkdir()
    write(tmp_path / "place" / "beside.py", "VALUE = 7\n")
    code = """
        import json, pickle, sys
        import {beside}
        class Thing: pass
        pickle.loads(pickle.dumps(Thing()))
        print(json.dumps([sys.argv, __name__, sys.path[0], {beside}.VALUE, sys.modules["__main__"].__file__]))
    """
    write(tmp_path / "place" / "tell.py", code.format(beside="beside"))
    write(tmp_path / "here.py", "VALUE = 8\n")
    write(tmp_path / "tell_module.py", code.format(beside="here"))
    return tmp_path


ARGUMENTS = ["--help", "-m", "run", "--version", "a=b", "--", "", "--optim", "sophia", "-h"]


@pytest.mark.parametrize("what", [["place/tell.py"], ["-m", "tell_module"]])
def test_script_and_module_see_what_python_shows_them(scripts, what):
    plain, ours = (call([*start, *what, *ARGUMENTS], scripts) for start in (PYTHON, SOPHIA))
    assert (ours.returncode, ours.stderr) == (0, "") == (plain.returncode, plain.stderr)
    assert json.loads(ours.stdout) == json.loads(plain.stdout)
    assert json.loads(ours.stdout)[0][1:] == ARGUMENTS


def test_the_console_script_puts_the_right_folder_first(scripts):
    code = "import sys; from sophia_integrations.cli import main; sys.argv[0] = 'sophia'; sys.exit(main())"
    ours = call([sys.executable, "-c", code, "run", "place/tell.py"], scripts)
    assert json.loads(ours.stdout)[:3] == [["place/tell.py"], "__main__", str(scripts / "place")]


@pytest.mark.parametrize(
    "body",
    ["raise SystemExit(7)", "import sys; sys.exit('words')", "1 / 0", "import no_such_package", "open('no-such')"],
)
def test_exit_codes_and_tracebacks(tmp_path, body):
    write(tmp_path / "script.py", f"def inner():\n    {body}\ninner()\n")
    plain, ours = (call([*start, "script.py"], tmp_path) for start in (PYTHON, SOPHIA))
    assert ours.returncode == plain.returncode != 0
    assert ours.stderr.endswith(plain.stderr.removeprefix("Traceback (most recent call last):\n"))


def test_signals_reach_the_script(tmp_path):
    handled = "import signal, os, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
    # A process started in the background inherits an ignored SIGINT.
    unhandled = "import signal, os\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    for prologue, number in ((handled, signal.SIGTERM), (unhandled, signal.SIGTERM), (unhandled, signal.SIGINT)):
        script = write(tmp_path / "script.py", f"{prologue}os.kill(os.getpid(), {int(number)})\n")
        plain, ours = (subprocess.run([*s, script], capture_output=True, timeout=60) for s in (PYTHON, SOPHIA))
        assert ours.returncode == plain.returncode != 0


def test_nothing_to_run(tmp_path):
    for words, code in ([], 2), (["-m"], 2), (["missing.py"], 2), (["-m", "missing_package.module"], 1):
        result = call([*SOPHIA, *words], tmp_path)
        assert result.returncode == code and "Traceback" not in result.stderr and "sophia run" in result.stderr
    shown = call([*SOPHIA, "--help"], tmp_path)
    assert shown.returncode == 0 and "SCRIPT.py" in shown.stdout


TRAINING_SCRIPT = """
    import os, sys, torch
    from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments
    assert "sophia_integrations" not in open(__file__).read().split("assert")[0]
    args, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=23, bos_token_id=1, eos_token_id=2))
    ids = torch.arange(48 * 8).reshape(48, 8) % 23
    trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": x, "labels": x} for x in ids])
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    told = (type(optimizer).__name__, optimizer.stats()["hessian_updates"], trainer.args.world_size)
    sys.stdout.flush()
    os.write(1, (" ".join(map(str, told)) + "\\n").encode())  # in one piece, whatever the other rank prints
    os._exit(0)  # the Trainer leaves gloo's threads running, which now and then abort an interpreter that exits
"""
TRAINING = "--optim sophia --optim_args hessian_interval=2 --max_steps 5 --per_device_train_batch_size 2 --use_cpu True"
TRAINING = [*TRAINING.split(), "--report_to", "none", "--save_strategy", "no", "--output_dir", "out"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--cpu",
    "--num_processes",
    "1",
    "--num_machines",
    "1",
]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.mark.parametrize(
    ("launcher", "world"),
    [
        ([*TORCHRUN, "-m", "sophia_integrations", "run"], 2),
        ([*ACCELERATE, "--module", "sophia_integrations", "run"], 1),
    ],
    ids=["torchrun", "accelerate"],
)
def test_a_training_script_under_each_launcher(tmp_path, launcher, world):
    write(tmp_path / "script.py", TRAINING_SCRIPT)
    backend = ["--ddp_backend", "gloo"] if world > 1 else []
    result = call([*launcher, "script.py", *TRAINING, *backend], tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count(f"SophiaG 3 {world}") == world


def test_trl_sft_script(tmp_path):
    """A script that we did not write: TRL's own, on a local model and local data."""
    save_tiny_language_model(tmp_path / "model")
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl")
    words = f"""
        --model_name_or_path {tmp_path}/model --dataset_name {tmp_path}/data --output_dir {tmp_path}/out --max_steps 5
        --optim sophia --optim_args hessian_interval=2 --learning_rate 5e-3 --per_device_train_batch_size 2
        --logging_steps 1 --report_to none --use_cpu --bf16 False --max_length 16 --save_strategy no
    """
    result = call([*SOPHIA, "-m", "trl.scripts.sft", *words.split()], tmp_path, timeout=200, HF_HOME=tmp_path / "hub")
    assert result.returncode == 0, result.stderr[-4000:]
    assert "sophia/win_rate" in result.stdout and (tmp_path / "out" / "model.safetensors").exists()
