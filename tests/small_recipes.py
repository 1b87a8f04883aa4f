"""Any shipped recipe of the Hugging Face Trainer as one that trains in seconds: the same keys, small sides, own rows.

Nothing comes from a hub: rows of the recipe's format, a tokenizer and small random weights are made on the spot.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STEPS, INTERVAL = 6, 3
SIZES = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64},
    "llama": {
        "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48,
        "max_position_embeddings": 64,
    },
    "bert": {
        "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48,
        "max_position_embeddings": 64,
    },
    "distilbert": {"n_layers": 2, "n_heads": 2, "dim": 32, "hidden_dim": 48, "max_position_embeddings": 64},
    "t5": {"num_layers": 2, "num_heads": 2, "d_model": 32, "d_kv": 16, "d_ff": 48},
}  # fmt: skip
FAMILIES = {"SmolLM2": "llama", "distilbert": "distilbert", "t5-small": "t5"}
FORMATS = {"finetune": "chat", "classify": "classification", "seq2seq": "prompt-completion"}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GPU_ONLY = ("bf16", "dataloader_num_workers")


def shrink(settings: dict[str, Any], place: Path) -> list[str]:
    """Overrides that make a recipe small; its files are written into `place`.

    Args:
        settings: the recipe, defaults filled in.
        place: an empty folder.
    """
    task, data = settings["task"], settings["data"]
    form = data.get("format") or FORMATS.get(task, "text")
    for name, first, count in (("train", 0, 60), ("held", 60, 12)):
        lines = [json.dumps(row(form, number)) for number in range(first, first + count)]
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    kept = {key: value for key, value in data.items() if key not in ("source", "hub", "columns", "validation_fraction")}
    kept.update(files=[f"{place}/train.jsonl"], validation_files=[f"{place}/held.jsonl"], block_size=48)
    sections = {"data": kept, "model": small_model(settings, place), "training": small_training(settings["training"])}
    if settings.get("tokenizer") and "train" in settings["tokenizer"]:
        sections["tokenizer"] = {"train": {**settings["tokenizer"]["train"], "vocab_size": 300}}
    else:
        save_tokenizer(place / "tokenizer")
        sections["tokenizer"] = {"pretrained": str(place / "tokenizer")}
    return [f"{name}={json.dumps(section)}" for name, section in sections.items()]


def row(form: str, number: int) -> dict[str, Any]:
    """A row of a format; different for each number."""
    ask, answer = f"what is {number} and one?", f"{number + 1}"
    if form == "chat":
        return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
    if form == "prompt-completion":
        return {"prompt": ask, "completion": f" {answer}"}
    if form == "classification":
        return {"text": ask, "label": ("even", "odd")[number % 2]}
    return {"text": f"{ask} it is {answer}. " * 8}


def small_model(settings: dict[str, Any], place: Path) -> dict[str, Any]:
    """The model section: a small config, or small weights of the same family with the section's other keys."""
    import transformers

    from sophia_integrations.tasks import TASKS

    model = dict(settings["model"])
    if "config" in model:
        kept = {key: value for key, value in model["config"].items() if key != "vocab_size"}
        return {**model, "config": {**kept, **SIZES[kept["model_type"]]}}
    family = next(family for name, family in FAMILIES.items() if name in model["pretrained"])
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=320,
        pad_token_id=1,
        eos_token_id=0,
        bos_token_id=0,
        decoder_start_token_id=1,
        **SIZES[family],
    )
    auto_class = getattr(transformers, TASKS[settings["task"]].auto_class)
    auto_class.from_config(config).save_pretrained(place / "model")
    return {**model, "pretrained": str(place / "model")}


def small_training(training: dict[str, Any]) -> dict[str, Any]:
    """The training section: few steps on the CPU, with several Hessian passes, evaluations and checkpoints."""
    small = {key: value for key, value in training.items() if key not in GPU_ONLY}
    small.update(
        use_cpu=True, max_steps=STEPS, warmup_steps=0, logging_steps=1, eval_steps=INTERVAL, save_steps=INTERVAL
    )
    small.update(per_device_train_batch_size=4, per_device_eval_batch_size=4)
    if "gradient_accumulation_steps" in small:
        small["gradient_accumulation_steps"] = 2
    if "sophia" in small["optim"]:
        given = [word for word in small.get("optim_args", "").split(",") if word and "interval" not in word]
        small["optim_args"] = ",".join([*given, f"hessian_interval={INTERVAL}"])
    return small


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 300 tokens with every special token and a chat template, in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = "<|endoftext|>"
    others = {f"{name}_token": f"<|{name}|>" for name in ("pad", "cls", "sep", "mask")}
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[end, *others.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(["ask answer user assistant what is and one"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, bos_token=end, **others)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
