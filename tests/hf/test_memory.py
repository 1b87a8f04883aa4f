"""The same Trainer run holds no more with Sophia than with AdamW: same states, and a pass below the step's peak."""

import pytest
import torch
from support import make_trainer, peak_bytes, sophia_of, tiny_model

VOCABULARY, LENGTH, STEPS = 2000, 64, 4


def run(folder, optim, **options):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (8 * STEPS, LENGTH), generator=generator)
    return make_trainer(
        folder,
        model=tiny_model(n_embd=64, n_positions=LENGTH, vocab_size=VOCABULARY),
        data=[{"input_ids": row, "labels": row} for row in ids],
        optim=optim,
        max_steps=STEPS,
        logging_steps=STEPS,
        **options,
    )


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optim", ["sophia", "sophia_h"])
def test_peak_is_that_of_adamw(tmp_path, optim, accumulation):
    size = dict(per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation)
    adamw = run(tmp_path, "adamw_torch", optim_args=None, **size)
    sophia = run(tmp_path, optim, optim_args="hessian_interval=2", **size)
    # AdamW's own peak varies by 3 % from run to run: the step before is sometimes freed a little later.
    assert peak_bytes(sophia.train, tmp_path) <= 1.04 * peak_bytes(adamw.train, tmp_path)
    assert sophia_of(sophia).stats()["hessian_updates"] == 2
    states = [[x for s in sophia_of(t).state.values() for x in s.values() if x.ndim] for t in (adamw, sophia)]
    assert sum(x.nbytes for x in states[0]) == sum(x.nbytes for x in states[1]) > 0
