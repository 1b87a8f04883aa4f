"""The Triton step is the float64 specification: interpreted, or on a GPU with SOPHIA_TEST_DEVICE=cuda."""

import math

import pytest
import torch
from specification import TOLERANCE
from support import DEVICE, peak_bytes, run_worker
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from sophia_integrations.optim import reference_step, triton_step  # noqa: E402
from sophia_integrations.optim.backends import chosen_backend  # noqa: E402
from sophia_integrations.optim.functional import Rule  # noqa: E402
from sophia_integrations.optim.rounding import momentum_seed, rounded_to_bfloat16  # noqa: E402
from sophia_integrations.optim.triton_step import BLOCK, CHUNK, update  # noqa: E402

OPTIONS = dict(lr=1e-2, beta1=0.9, rho=0.05, eps=1e-12, weight_decay=0.1)
SIZES = (1, 7, 0, 15, BLOCK, BLOCK + 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5, 3)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def batch(shapes, dtype=torch.float32):
    """θ, g, m and h for each shape; h is 0 for a tenth of the coordinates, and clips about half of the others."""
    params = [normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
    grads = [normal(*s, seed=100 + i, dtype=dtype) for i, s in enumerate(shapes)]
    exp_avgs = [normal(*s, seed=200 + i, dtype=wide(dtype)) / 4 for i, s in enumerate(shapes)]
    hessians = [(normal(*s, seed=300 + i, dtype=wide(dtype)).abs() * 8 - 1).clamp_min(0) for i, s in enumerate(shapes)]
    return params, grads, exp_avgs, hessians


def counted(params, grads, exp_avgs, hessians, rule):
    """(not finite, unclipped, curved) in float64."""
    found = torch.zeros(3, dtype=torch.int64)
    for g, m, h in zip(grads, exp_avgs, hessians, strict=True):
        g, m, h = (x.detach().cpu().double() for x in (g, m, h))
        usable = g.isfinite()
        g = torch.where(usable, -g if rule.maximize else g, 0)
        m = torch.where(usable, rule.beta1 * m + (1 - rule.beta1) * g, m)
        followed = rule.beta1 * m + (1 - rule.beta1) * g if rule.nesterov else m
        h = h * rule.hessian_scale
        floor = (rule.noise * h.sqrt()).clamp_min(rule.eps)
        unclipped, curved = followed.abs() < torch.maximum(rule.rho * h, floor), rule.rho * h > floor
        found += torch.stack([(~usable).sum(), unclipped.sum(), curved.sum()])
    return found.tolist()


def check(tensors, counting=True, rule=None, **options):
    """One step, held to the specification; returns the counts."""
    exact = Rule(**{**OPTIONS, **options})
    params, grads, exp_avgs, hessians = tensors
    before = [[x.detach().cpu().clone() for x in xs] for xs in tensors]
    counts = update(*tensors, rule or exact, counting)
    assert counts.dtype == torch.int64 and counts.device == params[0].device
    for i, (param, exp_avg) in enumerate(zip(params, exp_avgs, strict=True)):
        theta, g, m, h = (xs[i] for xs in before)
        expected, average, _ = reference_step(
            theta,
            g,
            m,
            h * exact.hessian_scale,
            None,
            beta2=0.9,
            **{k: getattr(exact, k) for k in ("lr", "beta1", "rho", "eps", "weight_decay", "maximize", "nesterov")},
            noise_floor=exact.noise,
            predictions=1,
        )
        torch.testing.assert_close(param.cpu(), expected.to(param.dtype), **TOLERANCE[param.dtype])
        torch.testing.assert_close(exp_avg.cpu(), average.to(exp_avg.dtype), **TOLERANCE[exp_avg.dtype])
        assert torch.equal(grads[i].cpu().nan_to_num(7), g.nan_to_num(7)) and torch.equal(hessians[i].cpu(), h)
    bad, *clip = counted(*before, exact)
    assert counts.tolist() == [bad, *(clip if counting else (0, 0))]
    return counts.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counting", [False, True])
def test_every_size_in_one_launch(dtype, counting, monkeypatch):
    launches = count_launches(monkeypatch)
    _, unclipped, curved = check(batch([(s,) for s in SIZES], dtype), counting)
    assert len(launches) == 1
    if counting:
        assert 0.1 < unclipped / sum(SIZES) < 0.9 and 0.5 < curved / sum(SIZES) < 0.95


CHOICES = {
    "nesterov": dict(nesterov=True),
    "ascent": dict(maximize=True),
    "no decay": dict(weight_decay=0.0),
    "no momentum": dict(beta1=0.0),
    "noise floor": dict(noise=0.5),
    "noise floor alone": dict(noise=1.0, rho=0.0),
    "corrected h": dict(hessian_scale=1.7, noise=0.5),
    "large eps": dict(eps=0.2),
    "smallest eps": dict(eps=1.2e-38),
    "everything": dict(nesterov=True, maximize=True, noise=0.3, hessian_scale=1.3, eps=1e-8),
}


@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_option(options, dtype):
    check(batch([(40, 30), (CHUNK + 3,)], dtype), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_momentum_in_bfloat16_is_the_wide_one_rounded_by_chance(dtype):
    """Beside float32 ones, and with θ that sees what is not rounded."""
    params, grads, exp_avgs, hessians = batch([(CHUNK + 3,), (40, 30)], dtype)
    exp_avgs[0] = exp_avgs[0].bfloat16()
    wide_lists = [[x.clone() for x in xs] for xs in (params, grads, exp_avgs, hessians)]
    wide_lists[2][0] = wide_lists[2][0].float()
    rule = Rule(**OPTIONS, seed=momentum_seed(5))
    assert triton_step.takes(params[0], grads[0], exp_avgs[0], hessians[0])
    assert torch.equal(update(params, grads, exp_avgs, hessians, rule, True), update(*wide_lists, rule, True))
    assert all(torch.equal(p, q) for p, q in zip(params, wide_lists[0], strict=True))
    assert torch.equal(exp_avgs[0], rounded_to_bfloat16(wide_lists[2][0], rule.seed))
    assert torch.equal(exp_avgs[1], wide_lists[2][1])


def test_corrected_momentum():
    """m / (1 − β₁ᵗ) is followed, and m itself is kept."""
    tensors = batch([(500,)])
    theta, m = tensors[0][0].clone(), tensors[2][0].clone()
    update(*tensors, Rule(**{**OPTIONS, "weight_decay": 0.0}, momentum_scale=1.6), False)
    g, h = tensors[1][0], tensors[3][0]
    expected = 0.9 * m + 0.1 * g
    step = (1.6 * expected / (0.05 * h).clamp_min(1e-12)).clamp(-1, 1)
    torch.testing.assert_close(tensors[2][0], expected)
    torch.testing.assert_close(tensors[0][0], theta - 1e-2 * step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counting", [False, True])
def test_non_finite_gradients_leave_their_coordinates_alone(dtype, counting):
    tensors = batch([(CHUNK + 9,), (5,)], dtype)
    at = [0, 3, BLOCK, CHUNK - 1, CHUNK, CHUNK + 8]
    values = torch.tensor([math.nan, math.inf, -math.inf, math.nan, math.inf, math.nan], dtype=dtype, device=DEVICE)
    tensors[1][0][at] = values
    theta, m = tensors[0][0][at].clone(), tensors[2][0][at].clone()
    assert check(tensors, counting)[0] == 6
    assert torch.equal(tensors[0][0][at], theta) and torch.equal(tensors[2][0][at], m)


def test_at_equality_a_coordinate_counts_as_clipped():
    h = torch.rand(1000, device=DEVICE) + 0.1
    tensors = [[torch.zeros(1000, device=DEVICE)], [0.3 * h], [torch.zeros(1000, device=DEVICE)], [h]]
    rule = Rule(**{**OPTIONS, "beta1": 0.0, "rho": 0.3, "eps": 1e-12})
    assert update(*tensors, rule, True).tolist()[1:] == [0, 1000]


LAYOUTS = {
    "transposed": lambda dtype: [x.t() for x in flat_batch(40, 30, dtype)],
    "channels_last": lambda dtype: [
        x.view(4, 5, 6, 10).contiguous(memory_format=torch.channels_last) for x in flat_batch(40, 30, dtype)
    ],
    "transposed gradient": lambda dtype: [
        x.t().contiguous().t() if i == 1 else x for i, x in enumerate(flat_batch(40, 30, dtype))
    ],
    "sliced parameter": lambda dtype: [
        x[:, ::2] if i == 0 else x[:, ::2].contiguous() for i, x in enumerate(flat_batch(40, 60, dtype))
    ],
    "sliced momentum": lambda dtype: [
        x[:, ::2] if i == 2 else x[:, ::2].contiguous() for i, x in enumerate(flat_batch(40, 60, dtype))
    ],
    "expanded gradient": lambda dtype: [
        x[:1].expand(40, 30) if i == 1 else x for i, x in enumerate(flat_batch(40, 30, dtype))
    ],
    "no dimension": lambda dtype: [x[0, 0] for x in flat_batch(1, 1, dtype)],
}


def flat_batch(rows, columns, dtype):
    return [xs[0] for xs in batch([(rows, columns)], dtype)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layout(layout, dtype):
    tensors = LAYOUTS[layout](dtype)
    strides = [x.stride() for x in tensors]
    plain = batch([(9,)], dtype)
    check([[x, y[0]] for x, y in zip(tensors, plain, strict=True)])
    assert [x.stride() for x in tensors] == strides


@pytest.mark.parametrize("which", range(4))
def test_misaligned_addresses_have_a_launch_of_their_own(which, monkeypatch):
    launches = count_launches(monkeypatch)
    tensors = batch([(CHUNK + 30,), (CHUNK + 30,), (7,)], torch.bfloat16)
    for i, xs in enumerate(tensors):
        odd = torch.empty(len(xs[0]) + 1, dtype=xs[0].dtype, device=DEVICE)
        odd[1:] = xs[0]
        xs[0] = odd[1:] if i == which else xs[0]
    check(tensors)
    assert sorted(launch["ALIGNED"] for launch in launches) == [False, True]


def test_gradients_of_another_dtype(monkeypatch):
    launches = count_launches(monkeypatch)
    tensors = batch([(300,), (CHUNK + 1,)], torch.bfloat16)
    tensors[1][0] = tensors[1][0].float()
    check(tensors)
    assert len(launches) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_may_lie_on_the_device(dtype):
    there = {k: torch.tensor(v, dtype=torch.float64, device=DEVICE) for k, v in OPTIONS.items()}
    check(batch([(300,)], dtype), rule=Rule(**{**there, "lr": there["lr"].reshape(1)}))
    check(batch([(300,)], dtype), rule=Rule(**there, noise=torch.tensor(0.5, device=DEVICE)), noise=0.5)


def test_a_new_number_is_no_new_kernel(monkeypatch):
    launches = count_launches(monkeypatch)
    for lr, rho in ((1e-2, 0.05), (3e-3, 0.05), (3e-3, 0.7)):
        check(batch([(300,)]), lr=lr, rho=rho)
    assert all(launch == launches[0] for launch in launches)


def test_offsets_beyond_32_bits():
    """Addresses are moved back and the first program lies far back, so that program 0 is at element 2³¹ + CHUNK."""
    tensors, plain = batch([(2 * CHUNK + 7,)]), batch([(2 * CHUNK + 7,)])
    skipped = 2**31 // CHUNK + 1
    row = [x[0].data_ptr() - skipped * CHUNK * x[0].element_size() for x in tensors]
    table = torch.tensor([-skipped, skipped * CHUNK + 2 * CHUNK + 7, *row], device=DEVICE)
    numbers = triton_step._numbers(Rule(**OPTIONS), table.device)
    counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    types = dict.fromkeys(("PARAM", "GRAD", "MOMENTUM", "STATE"), triton_step.tl.float32)
    flags = dict(ALIGNED=True, MAXIMIZE=False, NESTEROV=False, NOISE=False, COUNTING=True)
    triton_step._update_kernel[(3,)](table, numbers, counts, **types, **flags, DEPTH=0, CHUNK=CHUNK, BLOCK=BLOCK)
    assert torch.equal(update(*plain, Rule(**OPTIONS), True), counts)
    assert torch.equal(plain[0][0], tensors[0][0]) and torch.equal(plain[2][0], tensors[2][0])


def test_many_tensors():
    check(batch([(1 + i % 5,) for i in range(40)]))


def test_a_graph_being_captured_gets_the_same_constants():
    """Addresses use up to 47 bits, and numbers all of float64."""
    device = torch.device(DEVICE)
    for values, dtype in (((3, 2**47 - 1, -(2**62)), torch.int64), ((1e-300, 0.1, 7.0), torch.float64)):
        both = [make(values, dtype, device) for make in (triton_step._uploaded, triton_step._written_by_kernels)]
        assert torch.equal(*both) and both[0].tolist() == list(values)


class Waits(TorchDispatchMode):
    """Refuses whatever reads a value on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    tensors = batch([(300,), (CHUNK + 1,)])
    with Waits():
        update(*tensors, Rule(**{**OPTIONS, "lr": torch.tensor(1e-2, device=DEVICE)}), True)


@pytest.mark.skipif(DEVICE != "cpu", reason="the profiler sees the host's memory")
def test_it_holds_no_copy_of_a_parameter(tmp_path):
    tensors = batch([(128, 1030)], torch.bfloat16)
    assert peak_bytes(lambda: update(*tensors, Rule(**OPTIONS), True), tmp_path) < 4096


def test_compiled_it_moves_16_bytes_at_a_time():
    run_worker("compile_kernel", warm=False, timeout=120)


def count_launches(monkeypatch):
    """The constants of every launch from now on, without the addresses."""
    launches, kernel = [], triton_step._update_kernel

    class Counted:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                launches.append(constants)
                return kernel[grid](*args, **constants)

            return launch

    monkeypatch.setattr(triton_step, "_update_kernel", Counted())
    return launches


def test_a_gpu_gets_it_on_request_only():
    assert chosen_backend("cuda", True) is triton_step
    assert chosen_backend("cuda", None) is chosen_backend("cuda", False) is None


@pytest.mark.parametrize(
    "what, change, taken",
    [
        ("float16", lambda t: [t[0].half(), t[1].half(), *t[2:]], True),
        ("float64", lambda t: [x.double() for x in t], False),
        ("a subclass", lambda t: [t[0].as_subclass(Marked), *t[1:]], False),
    ],
)
def test_what_it_takes(what, change, taken):
    assert triton_step.takes(*change([xs[0] for xs in batch([(3, 4)])])) is taken


class Marked(torch.Tensor):
    pass
