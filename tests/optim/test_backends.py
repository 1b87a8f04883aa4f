"""Every backend is the float64 reference; the compiled one is had, shared or done without on every machine."""

from __future__ import annotations

import copy
import ctypes
import logging
import math
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specification import TOLERANCE, ScriptedEstimator, Specification, random_curvature
from support import peak_bytes

from sophia_integrations import SophiaG, SophiaH
from sophia_integrations.optim import eager, native, native_library, reference_step
from sophia_integrations.optim.native_library import library
from sophia_integrations.optim.rule import Rule

BACKENDS = {"eager": eager, "native": native}
COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="there is no C compiler on this machine")
each_backend = pytest.mark.parametrize(
    "module", [pytest.param(m, id=n, marks=[needs_compiler] if n == "native" else []) for n, m in BACKENDS.items()]
)
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.9), rho=0.05, weight_decay=0.1, hessian_interval=2)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_list(shapes, dtype, grad_dtype, seed=0):
    """θ, g, m and h of each shape; h has zeros and negative values too."""
    lists = [[], [], [], []]
    for i, shape in enumerate(shapes):
        draws = [normal(*shape, seed=seed + 10 * i + k) for k in range(4)]
        draws[3] = 8 * draws[3].mul(1.5).clamp_min(-0.1)
        for held, value, d in zip(lists, draws, (dtype, grad_dtype, torch.float32, torch.float32), strict=True):
            held.append(value.to(d))
    return lists


def flat(tensors):
    return torch.cat([x.detach().double().flatten() for x in tensors])


def assert_is_reference(module, lists, rule, counting=True):
    """One call of `update` is the reference on all coordinates, and counts what it should."""
    params, grads, exp_avgs, hessians = lists
    before = [flat(x) for x in lists]
    read_only = [[x.clone() for x in tensors] for tensors in (grads, hessians)]
    counts = module.update(*lists, rule, counting)
    assert counts.dtype == torch.int64 and counts.shape == (3,) and counts.device == params[0].device
    theta, m, _ = reference_step(
        *before,
        None,
        lr=float(rule.lr),
        beta1=rule.beta1,
        beta2=0.0,
        rho=rule.rho * rule.hessian_scale / rule.momentum_scale,
        eps=rule.eps / rule.momentum_scale,
        weight_decay=rule.weight_decay,
        maximize=rule.maximize,
        nesterov=rule.nesterov,
        noise_floor=rule.noise * math.sqrt(rule.hessian_scale) / rule.momentum_scale,
        predictions=1,
    )
    tolerance = TOLERANCE[params[0].dtype]
    torch.testing.assert_close(flat(params), flat([theta.to(params[0].dtype)]), **tolerance)
    torch.testing.assert_close(flat(exp_avgs), m, rtol=2e-6, atol=1e-6)
    for tensors, kept in zip((grads, hessians), read_only, strict=True):
        for tensor, old in zip(tensors, kept, strict=True):
            assert torch.equal(tensor.nan_to_num(), old.nan_to_num())
    assert int(counts[0]) == int((~before[1].isfinite()).sum())
    low, high = bounds_of_counts(before, m, rule)
    if counting:
        assert all(a <= int(c) <= b for a, c, b in zip(low, counts[1:], high, strict=True))
    else:
        assert counts[1:].tolist() == [0, 0]


def bounds_of_counts(before, m, rule):
    """(unclipped, curved) at least and at most, as far as float64 can tell what float32 decides."""
    g = torch.where(before[1].isfinite(), before[1], 0) * (-1 if rule.maximize else 1)
    followed = (rule.beta1 * m + (1 - rule.beta1) * g if rule.nesterov else m) * rule.momentum_scale
    h = before[3] * rule.hessian_scale
    curvature, floor = rule.rho * h, (rule.noise * h.clamp_min(0).sqrt()).clamp_min(rule.eps)
    ratio = followed.abs() / torch.maximum(curvature, floor)
    bounds = []
    for slack in (1 - 1e-5, 1 + 1e-5):
        bounds.append((int((ratio < slack).sum()), int((curvature * slack > floor / slack).sum())))
    return bounds


RULES = {
    "paper": Rule(lr=1e-2, beta1=0.9, rho=0.05, eps=1e-12, weight_decay=0.1),
    "upwards, no decay": Rule(lr=1e-2, beta1=0.9, rho=0.05, eps=1e-3, weight_decay=0.0, maximize=True),
    "full": Rule(
        lr=torch.tensor(3e-3),
        beta1=0.8,
        rho=0.02,
        eps=1e-8,
        weight_decay=0.3,
        nesterov=True,
        momentum_scale=1.7,
        hessian_scale=1.2,
        noise=0.05,
    ),
}
SHAPES = [(300, 401), (7,), (0,), (), (3, 0), (1,), (65_537,), (5, 3, 2)]


@each_backend
@pytest.mark.parametrize("counting", [False, True])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_list_is_the_reference(module, dtype, grad_dtype, rule, counting):
    lists = make_list(SHAPES, dtype, grad_dtype)
    for i, bad in enumerate((math.nan, math.inf, -math.inf)):
        lists[1][0].view(-1)[[0, 17 + i, 4096 * (i + 1), -1 - i]] = bad
    lists[1][3].fill_(math.nan)
    assert_is_reference(module, lists, rule, counting)


unit = st.floats(0, 0.99)
rules = st.builds(
    Rule,
    lr=st.floats(0, 0.1),
    beta1=unit,
    rho=st.floats(0, 3),
    eps=st.floats(2.0**-100, 1),
    weight_decay=unit,
    maximize=st.booleans(),
    nesterov=st.booleans(),
    momentum_scale=st.floats(1, 30),
    hessian_scale=st.floats(1, 30),
    noise=st.sampled_from([0.0, 0.01, 1.0]),
)
shapes = st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=6)
floats = st.sampled_from([torch.float32, torch.bfloat16])


@each_backend
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shapes=shapes, dtype=floats, grad_dtype=floats, rule=rules, counting=st.booleans(), seed=st.integers(0, 999))
def test_any_group_is_the_reference(module, shapes, dtype, grad_dtype, rule, counting, seed):
    lists = make_list(shapes, dtype, grad_dtype, seed)
    for grad in lists[1]:
        grad.view(-1)[seed % 7 :: 7] *= 10.0 ** (seed % 30)
        grad.view(-1)[seed % 11 :: 11] = (math.nan, math.inf, -math.inf, 0.0)[seed % 4]
    assert_is_reference(module, lists, rule, counting)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", [0, 2, 3], ids=["θ", "m", "h"])
def test_a_nan_in_the_state_is_not_hidden(module, place, dtype):
    lists = make_list([(40,)], dtype, dtype)
    lists[place][0][5] = math.nan
    module.update(*lists, RULES["full"], True)
    assert lists[0][0].isnan().nonzero().tolist() == [[5]]


@needs_compiler
def test_bfloat16_is_rounded_as_torch_rounds():
    every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    theta = every[every.isfinite()].clone()
    lists = [[theta.clone()], *([torch.zeros(theta.shape)] for _ in range(3))]
    decay = 0.3701
    native.update(*lists, Rule(lr=1.0, beta1=0.9, rho=0.05, eps=1.0, weight_decay=decay), False)
    assert torch.equal(lists[0][0], (theta.float() * torch.tensor(1 - decay)).to(torch.bfloat16))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("team", ["torch's", "new"])
def test_threads_change_no_bit_and_no_count(dtype, team, monkeypatch):
    threads, found = torch.get_num_threads(), []
    if team == "new":
        monkeypatch.setattr(native, "threads_of_torch", ctypes.c_void_p)
    try:
        for count in (1, 2, 3, 7, 200):
            torch.set_num_threads(count)
            lists = make_list([(1001, 257), (3,), (0,), (70_001,), (513, 3)], dtype, dtype)
            counts = native.update(*lists, RULES["full"], True)
            found.append([*lists[0], *lists[2], counts])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def train(params, steps, fused, options=OPTIONS, first=0):
    optimizer = SophiaG(params, **options, fused=fused, estimator=ScriptedEstimator(random_curvature))
    advance(optimizer, params, steps, first)
    return optimizer


def advance(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        for i, p in enumerate(params):
            p.grad = normal(*p.shape, seed=100 * step + i, dtype=p.dtype)
        optimizer.step()


def some_params(dtype=torch.float32):
    return [torch.nn.Parameter(normal(*s, seed=i, dtype=dtype)) for i, s in enumerate([(30, 40), (17,), (), (5, 0)])]


@needs_compiler
def test_both_backends_train_the_same_weights():
    options = {**OPTIONS, "rho": "auto", "nesterov": True, "bias_correction": True, "noise_floor": 0.03}
    ours, plain = some_params(), some_params()
    a, b = train(ours, 12, True, options), train(plain, 12, False, options)
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert a.stats()["win_rate"] == pytest.approx(b.stats()["win_rate"], abs=2e-3)
    assert 0.1 < a.stats()["win_rate"] < 0.9


@needs_compiler
def test_what_the_kernel_cannot_take_is_updated_in_torch_operations_beside_it(monkeypatch):
    calls = []
    for name, module in BACKENDS.items():
        update = module.update
        monkeypatch.setattr(
            module, "update", lambda *a, n=name, u=update: calls.append((n, [x.dtype for x in a[0]])) or u(*a)
        )
    other = normal(24, 10, seed=5)[:, ::2]
    params = [torch.nn.Parameter(normal(*s, dtype=d)) for s, d in
              [((9, 7), torch.float32), ((8,), torch.float64), ((6, 5), torch.bfloat16), ((4,), torch.float16),
               ((), torch.float32), ((0,), torch.bfloat16)]] + [torch.nn.Parameter(other)]  # fmt: skip
    optimizer = SophiaG(params, **OPTIONS, estimator=ScriptedEstimator(random_curvature))
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = normal(*p.shape, seed=100 * step + i, dtype=p.dtype)
        calls.clear()
        Specification().step(optimizer)
        assert sorted((n, len(d)) for n, d in calls) == [
            ("eager", 1), ("eager", 1), ("eager", 1), ("native", 2), ("native", 2)
        ]  # fmt: skip
        assert {d for n, dtypes in calls if n == "native" for d in dtypes} == {torch.float32, torch.bfloat16}


@needs_compiler
def test_a_dense_tensor_in_another_order_is_the_kernels_too():
    make = [lambda: normal(8, 6, 5, 3).contiguous(memory_format=torch.channels_last), lambda: normal(40, 30).t()]
    for dense in make:
        tensors = [dense() for _ in range(4)]
        assert native.takes(*tensors)
        assert not native.takes(tensors[0], *(x.contiguous() for x in tensors[1:]))
    assert not native.takes(*[normal(30).expand(4, 30)] * 4)
    assert not native.takes(*[normal(40, 60)[:, ::2]] * 4)


@needs_compiler
@pytest.mark.parametrize("options", [{}, dict(nesterov=True, bias_correction=True, noise_floor=0.5)])
def test_the_compiled_step_holds_next_to_nothing(options, tmp_path):
    params = [torch.nn.Parameter(torch.zeros(1000, 500)) for _ in range(4)]
    optimizer = SophiaG(params, **OPTIONS, **options, fused=True, estimator=ScriptedEstimator(random_curvature))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not optimizer.hessian_due
    assert peak_bytes(optimizer.step, tmp_path) < 1000


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_parameter_that_backward_still_needs_is_not_changed_silently(dtype):
    weight = torch.nn.Parameter(normal(4, 4, dtype=dtype))
    optimizer = SophiaG([weight], fused=True)
    loss = (normal(4, 4, dtype=dtype).requires_grad_() @ weight).square().sum()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
def test_a_checkpoint_moves_between_machines_with_and_without_the_kernel():
    for first, second in ((True, False), (False, True)):
        params = some_params()
        optimizer = train(params, 3, first)
        saved = copy.deepcopy(optimizer.state_dict())
        assert not any("fused" in group for group in saved["param_groups"])
        resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = SophiaG(resumed, **OPTIONS, fused=second, estimator=ScriptedEstimator(random_curvature))
        other.load_state_dict(saved)
        advance(other, resumed, 4, first=3)
        advance(optimizer, params, 4, first=3)
        for p, q in zip(params, resumed, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# What is asked for


@needs_compiler
def test_fused_insists():
    doubles = {"params": [torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))]}
    for optimizer in (SophiaG, SophiaH):
        with pytest.raises(ValueError, match="fused=True updates float32 and bfloat16 parameters on cpu, got torch.fl"):
            optimizer([dict(doubles)], fused=True)
    with pytest.raises(ValueError, match="fused=True: there is no fused step for meta. Leave fused out"):
        SophiaG([torch.nn.Parameter(torch.zeros(3, device="meta"))], fused=True)
    optimizer = SophiaG([torch.nn.Parameter(torch.zeros(3))], fused=True)
    with pytest.raises(ValueError, match="got torch.float64"):
        optimizer.add_param_group(dict(doubles))
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({**doubles, "update": "adamw"})  # torch's own rule, which is always fused


def test_fused_without_a_compiler_says_what_is_missing(no_compiler):
    with pytest.raises(ValueError, match=r"fused=True: no C compiler was found \(cc, gcc or clang\). Leave fused out"):
        SophiaG([torch.nn.Parameter(torch.zeros(3))], fused=True)


@needs_compiler
@pytest.mark.parametrize("fused", [None, True, False])
def test_what_was_asked_for_survives_copies(fused, monkeypatch):
    optimizer = SophiaG([torch.nn.Parameter(torch.zeros(3))], fused=fused)
    used = []
    for name, module in BACKENDS.items():
        monkeypatch.setattr(module, "update", lambda *a, n=name: used.append(n) or torch.zeros(3, dtype=torch.int64))
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        one.param_groups[0]["params"][0].grad = torch.ones(3)
        one.step()
    assert used == ["eager" if fused is False else "native"] * 3


# How the kernel is had


def debug_lines(caplog):
    return [r.getMessage() for r in caplog.records if r.name.endswith("native_library")]


def assert_eager(caplog, why):
    """Two steps run and are right, and one debug line says why they are torch's."""
    caplog.set_level(logging.DEBUG, logger="sophia_integrations")
    params = some_params()
    train(params, 2, None)
    expected = some_params()
    train(expected, 2, False)
    assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))
    (line,) = debug_lines(caplog)
    assert "Sophia's step runs in torch operations: " in line and why in line


def test_without_a_compiler(no_compiler, caplog):
    assert_eager(caplog, "no C compiler was found")


@pytest.fixture
def empty_cache(monkeypatch, tmp_path, fresh_library):
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


def compiler(folder, script):
    path = folder / "some cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_with_a_broken_compiler(no_compiler, empty_cache, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CC", f"'{compiler(tmp_path, 'echo no room on device >&2; exit 1')}'")
    assert_eager(caplog, "failed (no room on device)")
    assert not list(empty_cache.rglob("*.so"))


@needs_compiler
def test_with_a_compiler_that_makes_no_library(empty_cache, monkeypatch, tmp_path, caplog):
    script = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo nonsense > "$2"; shift; done'
    path = str(compiler(tmp_path, script))
    monkeypatch.setattr("sophia_integrations.optim.native_library._compilers", lambda: [[path]])
    assert_eager(caplog, "could not be kept or loaded")


@needs_compiler
def test_with_a_cache_that_cannot_be_written(monkeypatch, tmp_path, fresh_library, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "file" / "cache"))
    assert_eager(caplog, "could not be kept or loaded")


@needs_compiler
def test_a_compiler_that_does_not_know_this_processor(empty_cache, monkeypatch, tmp_path):
    """Then the step is compiled for any processor of its kind."""
    real = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    script = f'for word in "$@"; do [ "$word" = -march=native ] && exit 1; done; exec {real} "$@"'
    monkeypatch.setenv("CC", f"'{compiler(tmp_path, script)}'")
    assert library()[0] is not None
    (made,) = empty_cache.glob("*")
    train(some_params(), 2, True)
    assert made.suffix == ".so"


@needs_compiler
def test_what_is_in_the_cache_is_used_without_a_write(empty_cache):
    assert library()[0] is not None
    before = [(p.name, p.stat().st_mtime_ns, p.stat().st_ino) for p in empty_cache.iterdir()]
    folder = empty_cache.stat().st_mtime_ns
    library.cache_clear()
    assert library()[0] is not None
    assert before == [(p.name, p.stat().st_mtime_ns, p.stat().st_ino) for p in empty_cache.iterdir()]
    assert len(before) == 1 and empty_cache.stat().st_mtime_ns == folder


@needs_compiler
@pytest.mark.parametrize("kept", [0, 100, 5000], ids="{} bytes".format)
def test_a_truncated_library_is_made_again(kept, empty_cache, monkeypatch, tmp_path):
    assert library()[0] is not None
    (made,) = empty_cache.iterdir()
    whole = made.read_bytes()
    monkeypatch.setenv("SOPHIA_CACHE", str(tmp_path / "other"))
    damaged = tmp_path / "other" / "native" / made.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(whole[:kept])
    library.cache_clear()
    assert library()[0] is not None
    assert damaged.read_bytes() == whole


@needs_compiler
def test_several_processes_build_at_once(tmp_path):
    program = (
        "import torch; from sophia_integrations import SophiaG; p = torch.nn.Parameter(torch.ones(9));"
        "o = SophiaG([p], fused=True); p.grad = torch.ones(9); o.step(); print(p.sum().item())"
    )
    environment = {**os.environ, "SOPHIA_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", program], env=environment, stdout=-1, stderr=-1)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert all(process.returncode == 0 for process in started), said
    assert len({out for out, _ in said}) == 1
    assert [path.suffix for path in (tmp_path / "native").iterdir()] == [".so"]


@needs_compiler
@pytest.mark.skipif(not torch.backends.openmp.is_available() or os.uname().sysname != "Linux", reason="another OpenMP")
def test_the_step_computes_on_the_threads_of_torch():
    assert native_library.threads_of_torch().value


@needs_compiler
def test_a_fork_of_a_process_that_has_stepped_can_step():
    """As the workers of a data loader are, where the threads of the parent's team do not exist."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        lists = make_list([(400, 500)], torch.float32, torch.float32)
        native.update(*lists, RULES["paper"], True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = multiprocessing.get_context("fork").Process(
                target=native.update, args=(*lists, RULES["paper"], True)
            )
            child.start()
        child.join(30)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(threads)


def test_the_source_is_beside_the_module():
    assert Path(native.__file__).with_name("native_step.c").is_file()
