"""Importing the package: light, in either order, harmless to processes that never import it."""

import subprocess
import sys

import pytest
import torch
from support import make_trainer


def python(code, timeout=100):
    return subprocess.run(
        ["timeout", "-k", "5", str(timeout), sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
    )


def check(code):
    result = python(code)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_import_is_light():
    """In seconds of this process, because another one may have the core."""
    out = check(
        "import sys, time; t = time.process_time(); import sophia_integrations\n"
        "print(time.process_time() - t)\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'lightning') if m in sys.modules])"
    )
    seconds, loaded = out.splitlines()
    assert loaded == "[]" and float(seconds) < 0.2


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import TrainingArguments, Trainer; import sophia_integrations",
        "from transformers import TrainingArguments; import sophia_integrations; from transformers import Trainer",
    ],
)
def test_imported_after_transformers(imports, tmp_path):
    """Every other test here imports this package first."""
    check(
        f"{imports}\n"
        "from transformers import Trainer, HfArgumentParser\n"
        "import transformers.trainer as t\n"
        f"args = TrainingArguments({str(tmp_path)!r}, optim='sophia', use_cpu=True)\n"
        "import sophia_integrations.hf as hf; hf.register(); hf.register()\n"
        "assert t.DEFAULT_CALLBACKS.count(hf.SophiaCallback) == 1\n"
        "parser = HfArgumentParser(TrainingArguments)\n"
        f"parsed, = parser.parse_args_into_dataclasses(['--output_dir', {str(tmp_path)!r}, '--optim', 'sophia_g',"
        " '--use_cpu', 'True'])\n"
        "assert parsed.optim == 'sophia_g' and args.to_dict()['optim'] == 'sophia'\n"
        "assert '\"sophia\"' in args.to_json_string()\n"
        "import copy; assert copy.deepcopy(args).optim is args.optim"
    )


def test_training_arguments_open_where_the_package_was_never_imported(tmp_path):
    path = tmp_path / "training_args.bin"
    torch.save(make_trainer(tmp_path).args, path)
    check(
        f"import sys, torch; args = torch.load({str(path)!r}, weights_only=False)\n"
        "assert args.optim == 'sophia' and 'sophia_integrations' not in sys.modules"
    )
    assert torch.load(path, weights_only=False).optim == "sophia"
