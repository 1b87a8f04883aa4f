"""Two steps in the eigenbasis after the statement given has allowed TF32: off for the factors alone, then as before."""

import sys

import torch

from sophia_integrations import SophiaG

exec(sys.argv[1])
matmul = torch.backends.cuda.matmul
name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
before = getattr(matmul, name)
seen, bmm = [], torch.bmm
torch.bmm = lambda *a: seen.append(getattr(matmul, name)) or bmm(*a)
param = torch.nn.Parameter(torch.zeros(4, 4))
optimizer = SophiaG([param], basis="eigen")
for _ in range(2):
    param.grad = torch.eye(4)
    optimizer.step()
assert set(seen) == {before, "ieee" if name == "fp32_precision" else False}, seen
assert seen[0] != before, "the first product is a factor's"
assert getattr(matmul, name) == before
