"""What a pass holds: less than the training step, one gradient at a time, and the same numbers when parts come late."""

import pytest
import torch
import torch.nn.functional as F
from support import peak_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint

from sophia_integrations import GaussNewtonBartlett, SophiaG


def test_pass_stays_below_the_memory_of_the_training_step_at_a_large_vocabulary(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    size = dict(n_layer=1, n_head=2, n_embd=16, n_positions=64, vocab_size=50_257, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(**size))
    optimizer = SophiaG(model.parameters(), lr=0.0, estimator=GaussNewtonBartlett(model), hessian_interval=1)
    ids = torch.randint(50_257, (8, 64))

    def train():
        model(input_ids=ids, labels=ids).loss.backward()

    train()
    optimizer.step()
    optimizer.zero_grad()
    training = peak_bytes(train, tmp_path)
    hessian_pass = peak_bytes(optimizer.step, tmp_path)
    assert hessian_pass < 0.5 * training


def test_a_pass_holds_one_gradient_at_a_time(tmp_path):
    layers, width = 12, 256
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    optimizer = SophiaG(model.parameters(), lr=0.0, estimator=GaussNewtonBartlett(model, units=1), hessian_interval=1)
    x, labels = torch.randn(8, width), torch.randint(width, (8,))

    def train():
        F.cross_entropy(model(x), labels).backward()

    train()
    optimizer.step()  # makes the state
    train()
    layer = 4 * width**2
    sums = layers * layer
    assert peak_bytes(optimizer.step, tmp_path) < sums + 3.5 * layer < 1.5 * sums
    assert optimizer.stats()["hessian_updates"] == 2


class Shared(nn.Module):
    """A weight that reentrant checkpointing meets again, before or after its last use outside."""

    def __init__(self, recompute, outside):
        super().__init__()
        self.recompute, self.outside = recompute, outside
        self.inner, self.shared = nn.Linear(6, 6), nn.Linear(6, 6)

    def block(self, x):
        return torch.tanh(self.shared(torch.tanh(self.inner(x))))

    def forward(self, x):
        x = x.requires_grad_()
        if "before" in self.outside:
            x = self.shared(x)
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=True) if self.recompute else self.block(x)
        return self.shared(x) if "after" in self.outside else x


@pytest.mark.parametrize("outside", ["never", "before", "after", "before and after"])
def test_a_weight_shared_with_reentrant_checkpointing_is_squared_once_as_a_sum(outside):
    def first_h(recompute):
        torch.manual_seed(0)
        model = Shared(recompute, outside)
        estimator = GaussNewtonBartlett(model, fraction=1.0, units=2)
        optimizer = SophiaG(model.parameters(), lr=0.0, estimator=estimator, hessian_interval=1)
        x, labels = torch.randn(8, 6), torch.randint(6, (8,))
        for _ in range(2):
            F.cross_entropy(model(x), labels).backward()
            grads = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
            optimizer.zero_grad()
        assert optimizer.stats()["hessian_updates"] == 2
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        return [optimizer.state[p]["hessian"] for p in model.parameters()]

    for checkpointed, plain in zip(first_h(True), first_h(False), strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-9)
