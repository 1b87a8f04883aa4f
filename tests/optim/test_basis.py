"""The update in the eigenbasis is the float64 specification, for every shape, layout, dtype and option."""

import dataclasses

import pytest
import torch
from specification import Pieces, ScriptedEstimator, Specification, random_curvature

from sophia_integrations import SophiaG
from sophia_integrations.optim import Estimate

OPTIONS = dict(
    lr=1e-2,
    betas=(0.9, 0.9),
    rho=0.02,
    weight_decay=0.1,
    hessian_interval=2,
    basis="eigen",
    basis_interval=3,
    basis_warmup=2,
    basis_beta=0.8,
)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def follow(params, pieces, steps=8, grad=lambda p, seed: normal(*p.shape, seed=seed, dtype=p.dtype), **options):
    """Train `params`, of which `pieces` are rotated, held to the specification at every step."""
    estimator = ScriptedEstimator(random_curvature, predictions=50)
    optimizer = SophiaG(params, **{**OPTIONS, **options}, estimator=estimator)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    specification = Specification(pieces)
    shares = []
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = grad(p, 100 * step + i)
        specification.step(optimizer)
        shares.append(optimizer.stats()["win_rate"])
    assert 0.02 < sum(shares) / steps < 0.98, "both branches of the clip must be exercised"
    return optimizer


SHAPES = {
    "square": ((7, 7), None, Pieces(1, 7, 7, 7, 7)),
    "wide": ((5, 12), None, Pieces(1, 5, 12, 5, 12)),
    "tall": ((12, 5), None, Pieces(1, 12, 5, 12, 5)),
    "two by many": ((2, 30), None, Pieces(1, 2, 30, 2, 30)),
    "cut right": ((4, 12), 4, Pieces(1, 4, 12, 4, 4)),
    "cut left": ((12, 4), 4, Pieces(1, 12, 4, 4, 4)),
    "cut both": ((6, 8), 4, Pieces(1, 6, 8, 3, 4)),
    "left that cannot be cut": ((7, 4), 6, Pieces(1, 7, 4, 0, 4)),
    "right that cannot be cut": ((4, 7), 6, Pieces(1, 4, 7, 4, 0)),
    "pieces that would be short": ((14, 4), 6, Pieces(1, 14, 4, 0, 4)),
    "pieces of half the cap": ((9, 4), 6, Pieces(1, 9, 4, 0, 4)),
    "experts": ((3, 4, 6), None, Pieces(3, 4, 6, 4, 6)),
    "experts, cut": ((3, 4, 6), 3, Pieces(3, 4, 6, 2, 3)),
    "experts, one side": ((2, 7, 4), 6, Pieces(2, 7, 4, 0, 4)),
    "one expert": ((1, 4, 6), None, Pieces(1, 4, 6, 4, 6)),
    "a batch of vectors": ((4, 1, 6), None, Pieces(1, 4, 6, 4, 6)),
    "a row for each": ((4, 6, 1), None, Pieces(1, 4, 6, 4, 6)),
    "image kernels": ((5, 2, 3, 3), None, Pieces(1, 5, 18, 5, 18)),
    "volume kernels": ((4, 2, 2, 1, 3), None, Pieces(1, 4, 12, 4, 12)),
}


@pytest.mark.parametrize(("shape", "cap", "pieces"), SHAPES.values(), ids=SHAPES)
def test_every_shape(shape, cap, pieces):
    param = torch.nn.Parameter(normal(*shape))
    optimizer = follow([param], {param: pieces}, basis_max_dim=cap)
    expected = {"exp_avg", "hessian", "progress"}
    expected |= {f"left_{x}" for x in ("factor", "basis") if pieces.left}
    expected |= {f"right_{x}" for x in ("factor", "basis") if pieces.right}
    assert set(optimizer.state[param]) == expected


def test_three_dimensions_of_a_convolution_are_flattened():
    param = torch.nn.Parameter(normal(4, 3, 5))
    follow([param], {param: Pieces(1, 4, 15, 4, 15)}, basis_flatten=True)


def test_a_long_side_is_cut_at_the_shorter_one_and_never_below_128():
    lora, hidden = torch.nn.Parameter(normal(4, 384)), torch.nn.Parameter(normal(130, 260))
    optimizer = SophiaG([lora, hidden], basis="eigen", estimator=ScriptedEstimator(random_curvature))
    for p in (lora, hidden):
        p.grad = normal(*p.shape, seed=1)
    optimizer.step()
    shapes = [{k: tuple(v.shape) for k, v in optimizer.state[p].items() if "basis" in k} for p in (lora, hidden)]
    assert shapes == [
        {"left_basis": (1, 4, 4), "right_basis": (3, 128, 128)},
        {"left_basis": (1, 130, 130), "right_basis": (2, 130, 130)},
    ]


def test_a_thin_matrix_has_short_pieces_whatever_the_cap():
    lora = torch.nn.Parameter(normal(4, 512))
    optimizer = SophiaG([lora], basis="eigen", basis_max_dim=512, estimator=ScriptedEstimator(random_curvature))
    lora.grad = normal(4, 512, seed=1)
    optimizer.step()
    assert optimizer.state[lora]["right_basis"].shape == (4, 128, 128)


def test_what_is_no_matrix_stays_in_its_own_coordinates():
    shapes = [(), (1,), (9,), (1, 9), (9, 1), (1, 1, 9), (0, 4), (3, 0)]
    others = [torch.nn.Parameter(normal(*s, seed=i)) for i, s in enumerate(shapes)]
    long = torch.nn.Parameter(normal(131, 137))
    matrix = torch.nn.Parameter(normal(4, 5))
    params = [*others, long, matrix]
    optimizer = follow(params, {matrix: Pieces(1, 4, 5, 4, 5)}, basis_max_dim=100, steps=4)
    for p in [*others, long]:
        assert set(optimizer.state[p]) == {"exp_avg", "hessian", "progress"}


CHOICES = {
    "nesterov": dict(nesterov=True),
    "bias correction": dict(bias_correction=True),
    "noise floor": dict(noise_floor=0.5),
    "noise floor alone": dict(noise_floor=1.0, rho=0.0),
    "noise floor, corrected": dict(noise_floor=0.5, rho=0.0, bias_correction=True),
    "ascent": dict(maximize=True),
    "no decay": dict(weight_decay=0.0),
    "a tensor as lr": dict(lr=torch.tensor(1e-2)),
    "one element as lr": dict(lr=torch.tensor([1e-2])),
    "float64 lr": dict(lr=torch.tensor(1e-2, dtype=torch.float64)),
    "every step": dict(basis_interval=1),
    "never again": dict(basis_interval=1000, basis_warmup=0),
    "from every second gradient": dict(basis_factor_interval=2, basis_warmup=1),
    "from every fourth gradient, refreshed oftener": dict(basis_factor_interval=4, basis_warmup=0),
    "rho by itself": dict(rho="auto"),
    "large eps": dict(eps=0.05),
    "everything": dict(nesterov=True, bias_correction=True, noise_floor=0.3, maximize=True, rho="auto", eps=1e-8),
}


@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
def test_every_option(options):
    square, cut = torch.nn.Parameter(normal(5, 5)), torch.nn.Parameter(normal(4, 9, seed=1))
    bias = torch.nn.Parameter(normal(5, seed=2))
    pieces = {square: Pieces(1, 5, 5, 5, 5), cut: Pieces(1, 4, 9, 4, 3)}
    follow([square, cut, bias], pieces, basis_max_dim=5, **options)


@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
def test_every_option_in_weight_coordinates(options):
    param, transposed = torch.nn.Parameter(normal(300, 250)), torch.nn.Parameter(normal(6, 5, seed=2).t())
    follow([param, transposed], {}, **{**options, "basis": None}, steps=5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_every_dtype(dtype, maximize):
    param = torch.nn.Parameter(normal(6, 8, dtype=dtype))
    optimizer = follow([param], {param: Pieces(1, 6, 8, 6, 8)}, maximize=maximize, nesterov=True)
    wide = torch.promote_types(dtype, torch.float32)
    assert param.dtype == dtype and {v.dtype for k, v in optimizer.state[param].items() if k != "progress"} == {wide}


LAYOUTS = {
    "transposed parameter": (lambda: normal(8, 6).t(), lambda p, s: normal(*p.shape, seed=s)),
    "transposed gradient": (lambda: normal(6, 8), lambda p, s: normal(8, 6, seed=s).t()),
    "transposed both": (lambda: normal(8, 6).t(), lambda p, s: normal(8, 6, seed=s).t()),
    "sliced gradient": (lambda: normal(6, 8), lambda p, s: normal(6, 16, seed=s)[:, ::2]),
    "sliced parameter": (lambda: normal(6, 16)[:, ::2], lambda p, s: normal(*p.shape, seed=s)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    make_param, grad = LAYOUTS[layout]
    param = torch.nn.Parameter(make_param())
    strides = param.stride()
    follow([param], {param: Pieces(1, 6, 8, 6, 4)}, grad=grad, basis_max_dim=6, nesterov=True)
    assert param.stride() == strides


def test_channels_last():
    param = torch.nn.Parameter(normal(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    pieces = Pieces(1, 4, 12, 4, 12)
    follow(
        [param],
        {param: pieces},
        grad=lambda p, s: normal(*p.shape, seed=s).contiguous(memory_format=torch.channels_last),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_non_finite_gradients_leave_their_coordinates_alone(dtype, maximize):
    param = torch.nn.Parameter(normal(6, 8, dtype=dtype))
    before = []

    def grad(p, seed):
        g = normal(*p.shape, seed=seed, dtype=dtype)
        if seed == 300:
            before.append(p.detach().clone())
            g[0, 0], g[2, 3], g[5, 7] = float("nan"), float("inf"), -float("inf")
        return g

    with pytest.warns(UserWarning, match="3 gradient coordinates were not finite by step 4"):
        optimizer = follow(
            [param], {param: Pieces(1, 6, 8, 6, 8)}, grad=grad, steps=4, maximize=maximize, nesterov=True
        )
    same = param.detach() == before[0]
    assert same[0, 0] and same[2, 3] and same[5, 7] and not same.all()
    assert optimizer.stats()["nonfinite_gradients"] == 3


def test_the_gradient_is_only_read():
    for dtype in (torch.float32, torch.bfloat16):
        param = torch.nn.Parameter(normal(6, 5, dtype=dtype))
        optimizer = SophiaG([param], **OPTIONS, maximize=True, estimator=ScriptedEstimator(random_curvature))
        param.grad = normal(6, 5, seed=1, dtype=dtype)
        optimizer.step()
        assert torch.equal(param.grad, normal(6, 5, seed=1, dtype=dtype))


def test_a_matrix_without_gradient_waits_for_its_first_one():
    used, late = torch.nn.Parameter(normal(4, 4)), torch.nn.Parameter(normal(5, 3, seed=1))
    optimizer = SophiaG([used, late], **OPTIONS, estimator=ScriptedEstimator(random_curvature))
    for step in range(2):
        used.grad = normal(4, 4, seed=step)
        optimizer.step()
    assert torch.equal(late.detach(), normal(5, 3, seed=1)) and "left_basis" not in optimizer.state[late]
    assert "hessian" not in optimizer.state[late], (
        "an estimate in weight coordinates would be taken for one in the basis"
    )
    specification = Specification({late: Pieces(1, 5, 3, 5, 3)})
    optimizer.param_groups[0]["params"] = [late]
    for step in range(3, 7):
        late.grad = normal(5, 3, seed=step)
        specification.step(optimizer)


def test_autocast_around_the_step_changes_nothing():
    def run(context):
        param = torch.nn.Parameter(normal(6, 5))
        optimizer = SophiaG([param], **OPTIONS, estimator=ScriptedEstimator(random_curvature))
        for step in range(3):
            param.grad = normal(6, 5, seed=step)
            with context:
                if step == 1:
                    optimizer.update_hessian(3)
                optimizer.step()
        return param, optimizer.state[param]

    (plain, state), (param, under) = run(torch.enable_grad()), run(torch.autocast("cpu", dtype=torch.bfloat16))
    assert torch.equal(plain, param)
    assert all(torch.equal(state[k], under[k]) and state[k].dtype == under[k].dtype for k in state)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_with_the_weights_own_basis_it_is_sophia_bit_for_bit(nesterov, dtype, monkeypatch):
    """Diagonal factors have the coordinate axes as eigenvectors, up to their order: here they are made I."""
    monkeypatch.setattr(
        "sophia_integrations.optim.eigenvectors._eigenvectors", lambda f: torch.eye(f.shape[-1]).to(f).expand_as(f)
    )
    monkeypatch.setattr("sophia_integrations.optim.eigenvectors._power_iteration", lambda f, q: q.clone())

    def run(basis):
        options = {**OPTIONS, "rho": "auto", "basis": basis, "nesterov": nesterov, "bias_correction": True}
        params = [torch.nn.Parameter(normal(*s, dtype=dtype)) for s in [(6, 5), (3, 4, 8), (4, 2, 3, 3)]]
        options.update(noise_floor=0.1, fused=False)  # both in the same torch operations
        optimizer = SophiaG(params, **options, estimator=ScriptedEstimator(random_curvature))
        for step in range(7):
            for p in params:
                p.grad = normal(*p.shape, seed=step, dtype=dtype)
            optimizer.step()
        return params, optimizer

    (params, rotated), (others, plain) = run("eigen"), run(None)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(rotated.state[p][k], plain.state[q][k]) for k in ("exp_avg", "hessian"))
    same = ("win_rate", "curvature_share", "rho", "ratio_quantiles", "hessian_updates")
    assert all(rotated.stats()[k] == plain.stats()[k] for k in same)


def test_diagonal_factors_give_sophia_with_its_coordinates_in_another_order():
    """Without the patch: G is diagonal, so Q is a signed permutation and the update that of plain Sophia."""
    scale = torch.tensor([3.0, 1.0, 2.0, 0.5])

    def run(basis):
        param = torch.nn.Parameter(torch.zeros(4, 4))
        options = {**OPTIONS, "basis": basis, "weight_decay": 0.0, "rho": 0.05}
        estimator = ScriptedEstimator(lambda step, params: [torch.full((4, 4), 8.0)])
        optimizer = SophiaG([param], **options, estimator=estimator)
        for step in range(6):
            param.grad = torch.diag(scale * (1 + step))
            optimizer.step()
        return param.detach()

    torch.testing.assert_close(run("eigen"), run(None), rtol=1e-5, atol=1e-7)


def test_updates_by_hand_are_folded_in_the_basis():
    param = torch.nn.Parameter(normal(4, 5))
    optimizer = SophiaG([param], **{**OPTIONS, "hessian_interval": 4, "basis_warmup": 0})
    param.grad = normal(4, 5, seed=9)
    with pytest.warns(UserWarning, match=r"at step 0: the eigenbasis is known after the first step\(\): call it after"):
        optimizer.update_hessian(8)
    assert optimizer.stats()["hessian_updates"] == 0
    optimizer.step()
    (left, right), sampled = Pieces(1, 4, 5, 4, 5).whole(optimizer.state[param])[0], normal(4, 5, seed=10)
    param.grad = sampled.clone()
    optimizer.update_hessian(8)
    expected = 0.1 * 8 * (left.T @ sampled.double() @ right).square()
    torch.testing.assert_close(optimizer.state[param]["hessian"].double(), expected, rtol=1e-5, atol=1e-8)
    for seed in range(3):
        param.grad = normal(4, 5, seed=seed)
        optimizer.step()
    assert optimizer.stats()["hessian_updates"] == 1


@pytest.mark.parametrize("fresh", [True, False], ids=["no estimate ever", "an old one"])
@pytest.mark.filterwarnings("ignore:Sophia made no Hessian estimate")
def test_a_refused_step_changes_nothing_and_an_estimate_at_the_last_moment_saves_the_run(fresh):
    """Factors, eigenvectors and h in them as well, though h is due and the basis turns at every step."""
    param, bias = torch.nn.Parameter(normal(4, 6)), torch.nn.Parameter(normal(4))
    answers = []

    def supply(step, params):
        return answers.pop() if answers else Estimate(None, dropped="there was no batch")

    if not fresh:
        answers.append([torch.ones(4, 6), torch.ones(4)])
    groups = [{"params": [param], "basis": "eigen"}, {"params": [bias], "update": "sophia"}]
    optimizer = SophiaG(groups, lr=0.1, rho="auto", hessian_interval=2, estimator=ScriptedEstimator(supply))

    def step(seed):
        generator = torch.Generator().manual_seed(seed)
        for p in (param, bias):
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    lasts = 2 if fresh else 10
    for seed in range(lasts):
        step(seed)

    def everything():
        states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in (param, bias)]
        progress = dataclasses.replace(optimizer.progress, hessian_skipped=0)
        return [param.detach().clone(), bias.detach().clone()], states, progress

    thetas, states, progress = everything()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Cause: there was no batch"):
            step(lasts)
        again = everything()
        assert all(map(torch.equal, thetas, again[0])) and again[2] == progress
        for before, after in zip(states, again[1], strict=True):
            assert before.keys() == after.keys() and all(torch.equal(after[k], v) for k, v in before.items())
    answers.append([torch.ones(4, 6), torch.ones(4)])
    step(lasts)
    assert optimizer.progress.step == lasts + 1 and optimizer.stats()["hessian_age"] == 0
    assert not torch.equal(optimizer.state[param]["left_factor"], states[0]["left_factor"])
