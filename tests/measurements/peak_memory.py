"""Peak memory of the same Trainer run with AdamW, Sophia and SophiaH, each in a fresh process, in turn.

Trains a GPT-2 for a few steps on random tokens, with a Hessian pass at every second step, and prints the peak of the
resident memory less what the process held before the model existed. Run it with `make memory`; takes some minutes.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile

OPTIMIZERS = ("adamw_torch", "sophia", "sophia_h")
MIB = 2**20
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc gives freed tensors back at once, so that the peak is what was alive and not what was kept for later."""


def train(optim: str, options: argparse.Namespace) -> dict[str, float]:
    """One run in this process.

    Returns:
        `peak`: the most resident memory above that before the model, in MiB.
        `weights`: the parameters, in MiB.
        `passes`: Hessian passes made.
    """
    import psutil
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    import sophia_integrations.hf  # noqa: F401  (makes optim="sophia" known)

    torch.set_num_threads(1)
    before = psutil.Process().memory_info().rss
    torch.manual_seed(0)
    sizes = dict(n_layer=options.layers, n_embd=options.width, n_head=options.width // 64, n_positions=options.length)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=options.vocabulary, bos_token_id=0, eos_token_id=0, **sizes))
    rows = torch.randint(options.vocabulary, (options.rows * options.steps, options.length))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            optim=optim,
            optim_args="hessian_interval=2" if optim.startswith("sophia") else None,
            max_steps=options.steps,
            per_device_train_batch_size=options.rows // options.accumulation,
            gradient_accumulation_steps=options.accumulation,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in rows])
        trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {
        "peak": (_peak_rss() - before) / MIB,
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()) / MIB,
        "passes": optimizer.progress.hessian_updates if optim.startswith("sophia") else 0,
    }


def _peak_rss() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each optimizer, interleaved")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a run, half of them with a pass")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches that they are split into")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--only", choices=OPTIMIZERS, help="one run in this process, as JSON")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(train(options.only, options)))
        return
    # This process imports nothing large: a child's peak begins with what its parent holds.
    runs: dict[str, list[dict[str, float]]] = {optim: [] for optim in OPTIMIZERS}
    for _ in range(options.repeats):
        for optim in OPTIMIZERS:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", optim]
            environment = {**os.environ, **ALLOCATOR}
            result = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=1800
            )
            runs[optim].append(json.loads(result.stdout.splitlines()[-1]))
    weights = runs["sophia"][0]["weights"]
    tokens = options.rows * options.length // options.accumulation
    print(f"{weights:.0f} MiB of weights, {tokens} tokens a micro-batch, {options.accumulation} of them a step; MiB:")
    print(f"{'optimizer':<12} {'peak':>6} {'least':>6} {'most':>6} {'/ AdamW':>8} {'passes':>6}")
    adamw = statistics.median(run["peak"] for run in runs["adamw_torch"])
    for optim, found in runs.items():
        peaks = sorted(run["peak"] for run in found)
        peak = statistics.median(peaks)
        print(
            f"{optim:<12} {peak:>6.0f} {peaks[0]:>6.0f} {peaks[-1]:>6.0f} {peak / adamw:>8.3f} {found[0]['passes']:>6}"
        )


if __name__ == "__main__":
    main()
