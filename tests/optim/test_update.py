"""The update is the float64 specification, for every shape, layout, dtype and option, without large temporaries."""

import pytest
import torch
from support import peak_bytes

from sophia_integrations import SophiaG
from sophia_integrations.optim import Estimate
from sophia_integrations.optim.eager import CPU_CHUNK

pytestmark = pytest.mark.usefixtures("backend")

OPTIONS = dict(lr=1e-2, betas=(0.9, 0.9), rho=0.05, eps=1e-12, weight_decay=0.1, hessian_interval=2)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def train(optimizer, reference, steps, grad=lambda p, seed: normal(*p.shape, seed=seed, dtype=p.dtype)):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = grad(p, 100 * step + i)
        reference(optimizer)


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (3, 0), (1,), (7,), (1, 5), (5, 1), (3, 4, 5), (CPU_CHUNK,), (CPU_CHUNK + 1,), (333, 401)],
    ids=str,
)
def test_every_shape(shape, curvature, reference):
    optimizer = SophiaG([torch.nn.Parameter(normal(*shape))], **OPTIONS, estimator=curvature)
    train(optimizer, reference, 3)


def test_tests_cross_chunks():
    assert CPU_CHUNK < 333 * 401 and (333 * 401) % CPU_CHUNK, "the largest shape above must end in a partial chunk"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0, 0.3])
def test_every_dtype(dtype, maximize, weight_decay, curvature, reference):
    param = torch.nn.Parameter(normal(300, 250, dtype=dtype))
    options = {**OPTIONS, "weight_decay": weight_decay, "maximize": maximize}
    train(SophiaG([param], **options, estimator=curvature), reference, 4)
    assert param.dtype == dtype


@pytest.mark.parametrize("lr", [torch.tensor(1e-2), torch.tensor([1e-2]), torch.tensor(1e-2, dtype=torch.float64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensor_lr(lr, dtype, curvature, reference):
    param = torch.nn.Parameter(normal(20, 30, dtype=dtype))
    optimizer = SophiaG([param], **{**OPTIONS, "lr": lr}, estimator=curvature)
    train(optimizer, reference, 3)
    assert float(lr.sum()) == pytest.approx(1e-2)


def test_tensor_lr_equals_float_lr(curvature):
    both = []
    for lr in (2**-7, torch.tensor(2**-7)):
        param = torch.nn.Parameter(normal(1000))
        optimizer = SophiaG([param], **{**OPTIONS, "lr": lr}, estimator=curvature)
        for step in range(3):
            param.grad = normal(1000, seed=step)
            optimizer.step()
        both.append(param.detach())
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-7)


LAYOUTS = {
    "transposed parameter": (lambda: normal(40, 30).t(), lambda p, s: normal(*p.shape, seed=s)),
    "transposed gradient": (lambda: normal(40, 30), lambda p, s: normal(30, 40, seed=s).t()),
    "transposed both": (lambda: normal(40, 30).t(), lambda p, s: normal(40, 30, seed=s).t()),
    "expanded gradient": (lambda: normal(40, 30), lambda p, s: normal(30, seed=s).expand(40, 30)),
    "scalar gradient": (lambda: normal(40, 30), lambda p, s: normal(1, seed=s).expand(40, 30)),
    "sliced gradient": (lambda: normal(40, 30), lambda p, s: normal(40, 60, seed=s)[:, ::2]),
    "sliced parameter": (lambda: normal(40, 60)[:, ::2], lambda p, s: normal(*p.shape, seed=s)),
    "permuted parameter": (lambda: normal(4, 5, 6).permute(2, 0, 1), lambda p, s: normal(*p.shape, seed=s)),
    "channels_last": (
        lambda: normal(8, 6, 5, 3).contiguous(memory_format=torch.channels_last),
        lambda p, s: normal(*p.shape, seed=s).contiguous(memory_format=torch.channels_last),
    ),
    "channels_last parameter": (
        lambda: normal(8, 6, 5, 3).contiguous(memory_format=torch.channels_last),
        lambda p, s: normal(*p.shape, seed=s),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, curvature, reference):
    make_param, make_grad = LAYOUTS[layout]
    param = torch.nn.Parameter(make_param())
    strides = param.stride()
    train(SophiaG([param], **OPTIONS, estimator=curvature), reference, 3, make_grad)
    assert param.stride() == strides


def test_the_gradient_is_only_read(curvature):
    for dtype in (torch.float32, torch.bfloat16):
        param = torch.nn.Parameter(normal(100, dtype=dtype))
        optimizer = SophiaG([param], **OPTIONS, maximize=True, estimator=curvature)
        param.grad = normal(100, seed=1, dtype=dtype)
        optimizer.step()
        assert torch.equal(param.grad, normal(100, seed=1, dtype=dtype))


def test_eps_is_the_floor_of_rho_times_hessian(constant_curvature, reference):
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = SophiaG(
        [param], lr=0.1, betas=(0, 0), rho=0.05, eps=2.0, weight_decay=0, estimator=constant_curvature(1)
    )
    param.grad = torch.tensor([1.0, -3.0, 0.0])
    reference(optimizer)
    torch.testing.assert_close(param.detach(), torch.tensor([-0.05, 0.1, 0.0]))


@pytest.mark.parametrize("eps", [1e-12, 1.2e-38])
def test_no_curvature_and_no_gradient_is_no_step(eps, constant_curvature):
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = SophiaG([param], eps=eps, weight_decay=0, estimator=constant_curvature(0))
    param.grad = torch.zeros(5)
    optimizer.step()
    assert torch.equal(param.detach(), torch.ones(5))


def test_every_option_may_differ_by_group(curvature, reference):
    groups = [
        dict(params=[torch.nn.Parameter(normal(50, seed=1))], lr=1e-3, betas=(0.5, 0.7), weight_decay=0),
        dict(params=[torch.nn.Parameter(normal(60, seed=2))], rho=0.5, eps=0.2, weight_decay=0.5),
        dict(params=[torch.nn.Parameter(normal(70, seed=3)), torch.nn.Parameter(normal(8, seed=4))], maximize=True),
    ]
    train(SophiaG(groups, **OPTIONS, estimator=curvature), reference, 5)


def test_a_parameter_without_gradient_stays_but_its_hessian_is_kept_fresh(curvature, reference):
    used, unused, frozen = (torch.nn.Parameter(normal(9, seed=i)) for i in range(3))
    frozen.requires_grad_(False)
    optimizer = SophiaG([used, unused, frozen], **OPTIONS, estimator=curvature)
    for step in range(3):
        used.grad = normal(9, seed=10 + step)
        reference(optimizer)
    assert torch.equal(unused.detach(), normal(9, seed=1)) and torch.equal(frozen, normal(9, seed=2))
    assert (optimizer.state[unused]["hessian"] > 0).all()
    assert frozen not in optimizer.state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_non_finite_gradients_leave_their_coordinates_alone(dtype, maximize, curvature, reference):
    param = torch.nn.Parameter(normal(2 * CPU_CHUNK + 5, dtype=dtype))
    optimizer = SophiaG([param], **OPTIONS, maximize=maximize, estimator=curvature)
    bad = [0, 3, CPU_CHUNK - 1, 2 * CPU_CHUNK, 2 * CPU_CHUNK + 4]
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), float("inf"), float("nan")], dtype=dtype)
    param.grad = normal(param.numel(), seed=1, dtype=dtype)
    reference(optimizer)
    theta, m = param.detach().clone(), optimizer.state[param]["exp_avg"].clone()
    param.grad[bad] = values
    with pytest.warns(UserWarning, match="5 gradient coordinates were not finite by step 2") as caught:
        reference(optimizer)
    assert len(caught) == 1
    good = torch.ones_like(param, dtype=torch.bool).index_fill_(0, torch.tensor(bad), False)
    assert torch.equal(param.detach()[bad], theta[bad])
    assert torch.equal(optimizer.state[param]["exp_avg"][bad], m[bad])
    assert (optimizer.state[param]["exp_avg"] != m)[good].float().mean() > 0.99
    reference(optimizer)
    assert optimizer.stats()["nonfinite_gradients"] == 10
    assert torch.isfinite(param).all() and torch.isfinite(optimizer.state[param]["hessian"]).all()


def test_large_finite_gradients_are_not_taken_for_non_finite_ones(curvature):
    param = torch.nn.Parameter(torch.zeros(100))
    optimizer = SophiaG([param], **OPTIONS, estimator=curvature)
    param.grad = torch.full((100,), 1e37)
    optimizer.step()
    assert optimizer.stats()["nonfinite_gradients"] == 0
    torch.testing.assert_close(param.detach(), torch.full((100,), -OPTIONS["lr"]))


class Given:
    """Returns one and the same ĥ of ones, and holds nothing else."""

    def __init__(self, param):
        self.given = Estimate({param: torch.ones(param.shape)}, 1)

    def arm(self, due):
        pass

    def estimate(self, params, step):
        return self.given


FULL = dict(nesterov=True, bias_correction=True, noise_floor=0.5, rho="auto")


@pytest.mark.parametrize("options", [{}, FULL], ids=["paper", "full"])
@pytest.mark.parametrize("due", [False, True], ids=["not due", "due"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_allocates_no_parameter_sized_temporary(dtype, due, options, tmp_path):
    param = torch.nn.Parameter(torch.zeros(2048, 2050, dtype=dtype))
    optimizer = SophiaG([param], hessian_interval=1 if due else 10, estimator=Given(param), **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert peak_bytes(optimizer.step, tmp_path) < 0.12 * 4 * param.numel()
    assert optimizer.stats()["hessian_updates"] == 1 + due
