"""Plain, replicated and sharded parameters in one optimizer: figures and ρ are those of all coordinates together."""

import pytest
import torch
import torch.distributed as dist
from specification import ScriptedEstimator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sophia_integrations import SophiaG

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(place):
    """Two steps on three matrices of very different curvature, each put where `place` says."""
    params = [torch.nn.Parameter(place(i, normal(30, 20, seed=i))) for i in range(3)]
    scales = (100.0, 1.0, 0.01)

    def supply(step, params):
        return [place(i, s * normal(30, 20, seed=10 + i).exp()) for i, s in enumerate(scales)]

    optimizer = SophiaG(params, lr=1e-3, rho="auto", hessian_interval=2, estimator=ScriptedEstimator(supply))
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = place(i, normal(30, 20, seed=20 + 3 * step + i))
        optimizer.step()
    stats = optimizer.stats()
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in params]
    named = ("win_rate", "curvature_share", "rho", "ratio_quantiles")
    return weights, [stats[k] for k in named], float(stats["hessian_norm"])


def test_mixed_placements_count_together(mesh):
    placements = [None, Shard(0), Replicate()]

    def placed(i, value):
        return value if placements[i] is None else distribute_tensor(value, mesh, [placements[i]])

    (weights, figures, norm), (plain, expected, plain_norm) = run(placed), run(lambda i, value: value)
    assert all(torch.equal(w, p) for w, p in zip(weights, plain, strict=True))
    assert figures == expected and norm == pytest.approx(plain_norm)
