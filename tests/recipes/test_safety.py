"""A recipe, a checkpoint or a model folder of somebody else runs no code, unless the recipe allows the model to."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch

import sophia_integrations
from sophia_integrations.cli import main
from sophia_integrations.errors import UserError
from sophia_integrations.recipes.running.train import train

PACKAGE = Path(sophia_integrations.__file__).parent
UNSAFE = {"pickle.load", "pickle.loads", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "eval", "joblib.load"}


def calls() -> list[tuple[str, str, ast.Call]]:
    return [
        (str(file.relative_to(PACKAGE)), ast.unparse(node.func), node)
        for file in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


def test_nothing_is_loaded_in_a_way_that_runs_code() -> None:
    found = calls()
    assert not [(file, name) for file, name, _ in found if name in UNSAFE]
    loads = [(file, node) for file, name, node in found if name == "torch.load"]
    assert loads
    for file, node in loads:
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert options.get("weights_only") == "True", file
    loaders = [options for _, name, node in found if name == "yaml.compose" for options in node.keywords]
    assert [ast.unparse(option.value) for option in loaders if option.arg == "Loader"] == ["_CoreLoader"]


class Evil:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.file,)


def test_a_checkpoint_with_code_in_it_is_left_out(recipe: Path, tmp_path: Path) -> None:
    said: list[str] = []
    words = ["training.max_steps=4", "training.save_steps=2", "training.eval_steps=4", "run_dir=run"]
    train(recipe, words, say=said.append)
    Path("run/summary.json").unlink()
    shutil.rmtree("run/model")
    sign = tmp_path / "sign"
    torch.save({"state": {}, "param_groups": [], "evil": Evil(sign)}, "run/checkpoint-4/optimizer.pt")
    said.clear()
    assert train(recipe, words, say=said.append).trained
    assert not sign.exists()
    assert any("checkpoint-4" in line for line in said) and any("checkpoint-2" in line for line in said), said


MODEL = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel

Path({sign!r}).touch()


class OwnConfig(GPT2Config):
    model_type = "own_gpt2"


class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig
"""


@pytest.fixture
def model_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder, sign = tmp_path / "model_with_code", tmp_path / "sign"
    backend = Tokenizer(models.WordLevel({"<end>": 0, "one": 1, "two": 2}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
    config = GPT2Config(vocab_size=3, n_layer=1, n_head=1, n_embd=8, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    (folder / "own.py").write_text(MODEL.format(sign=str(sign)))
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "own_gpt2"}))
    return folder, sign


def test_the_code_of_a_model_runs_only_where_the_recipe_says_so(
    recipe: Path, model_with_code: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sign = model_with_code
    words = [f"model={{pretrained: '{folder}'}}", "tokenizer=null", "training.max_steps=2"]
    assert main(["train", str(recipe), *words, "--dry-run"]) == 2
    assert "trust_remote_code" in capsys.readouterr().err and not sign.exists()
    with pytest.raises(UserError, match="trust_remote_code"):
        train(recipe, words)
    assert not sign.exists()
    assert main(["train", str(recipe), *words, "model.trust_remote_code=true", "--dry-run"]) == 0
    assert sign.exists()
