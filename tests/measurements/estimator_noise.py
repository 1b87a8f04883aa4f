"""Noise of one Gauss-Newton-Bartlett estimate against the exact diagonal, per second, over fraction × units.

Trains a small transformer on the Python standard library, computes the exact Gauss-Newton diagonal of one batch in
float64, then makes many estimates with each setting. Run it with `make noise`; takes a few minutes.
"""

import argparse
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from sophia_integrations import GaussNewtonBartlett, SophiaG

CLASSES, LENGTH, ROWS = 128, 32, 16


def text() -> torch.Tensor:
    folder = Path(sysconfig.get_path("stdlib"))
    data = b"".join((folder / name).read_bytes() for name in ("argparse.py", "ast.py", "inspect.py", "typing.py"))
    return torch.tensor([min(byte, CLASSES - 1) for byte in data])


def batches(tokens: torch.Tensor, seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - LENGTH, (ROWS,), generator=generator)
        yield torch.stack([tokens[s : s + LENGTH] for s in starts])


def trained_model(steps: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    size = dict(n_layer=2, n_head=2, n_embd=32, n_positions=LENGTH, vocab_size=CLASSES, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _, ids in zip(range(steps), batches(text(), 0), strict=False):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained {steps} steps to a loss of {loss.item():.3f}")
    return model.double()


def exact_diagonal(model: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    """Σ over predictions and classes of p · (∂ log p)² / N, every class of every prediction in turn."""
    params = list(model.parameters())
    total = [torch.zeros_like(p) for p in params]
    identity = torch.eye(CLASSES, dtype=torch.float64)
    for row in ids:
        log_p = F.log_softmax(model(input_ids=row[None]).logits[0, :-1], -1)
        for position in log_p:
            grads = torch.autograd.grad(position, params, identity, retain_graph=True, is_grads_batched=True)
            p = position.detach().exp()
            for t, g in zip(total, grads, strict=True):
                t += torch.einsum("c,c...->...", p, g.square())
    return torch.cat([t.flatten() for t in total]) / (len(ids) * (LENGTH - 1))


def measure(model, ids, exact, fraction: float, units: int, draws: int) -> tuple[float, float]:
    """Relative L2 error of one estimate (root mean square over draws) and its seconds (median)."""
    errors, seconds = [], []
    for seed in range(draws):
        estimator = GaussNewtonBartlett(model, fraction=fraction, units=units, seed=seed)
        optimizer = SophiaG(model.parameters(), lr=0.0, betas=(0.9, 0.0), estimator=estimator)
        model(input_ids=ids, labels=ids)
        started = time.perf_counter()
        estimate = estimator.estimate(list(model.parameters()), 0)
        seconds.append(time.perf_counter() - started)
        flat = torch.cat([estimate.diagonal[p].flatten() for p in model.parameters()])
        errors.append((torch.linalg.norm(flat - exact) / torch.linalg.norm(exact)).square())
        del optimizer
    return torch.stack(errors).mean().sqrt().item(), sorted(seconds)[draws // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps before the measurement")
    parser.add_argument("--draws", type=int, default=40, help="estimates per setting")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = trained_model(options.steps)
    ids = next(batches(text(), 1))
    exact = exact_diagonal(model, ids)
    model.train()
    print(f"{ROWS} rows × {LENGTH - 1} predictions; noise is ‖ĥ − h‖ / ‖h‖, cost in ms, merit 1 / (noise² · s)")
    print(f"{'fraction':>8} {'units':>5} {'noise':>7} {'ms':>7} {'merit':>7}")
    for fraction in (1.0, 0.5, 0.25, 0.125):
        for units in (1, 2, 4, 8, 16):
            if units <= fraction * ROWS:
                noise, seconds = measure(model, ids, exact, fraction, units, options.draws)
                merit = 1 / (noise**2 * seconds)
                print(f"{fraction:>8} {units:>5} {noise:>7.3f} {1000 * seconds:>7.1f} {merit:>7.1f}", flush=True)


if __name__ == "__main__":
    main()
