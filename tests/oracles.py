"""Exact curvature from independent code (BackPACK, curvlinops, torch.func), and statistics of an estimator."""

import copy
import math
import warnings

import torch
from torch import nn


def draws_of(estimator, forward, params, draws):
    """[draws, coordinates]: the ĥ of `draws` passes over the micro-batches that `forward()` runs, each drawn anew."""
    rows = []
    for step in range(draws):
        estimator.arm(True)
        forward()
        estimate = estimator.estimate(params, step)
        rows.append(flat(estimate.diagonal[p] for p in params))
    estimator.arm(False)
    return torch.stack(rows)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def relative_error(actual, exact):
    return float(torch.linalg.norm(actual - exact) / torch.linalg.norm(exact))


def squared_draw_error(draws):
    """Relative L2 error of a mean of `draws` squares of normal variables: each has the relative variance 2."""
    return math.sqrt(2 / draws)


def curvlinops_ggn_diagonal(model, loss, params, x, y):
    """Diagonal of curvlinops' Gauss-Newton matrix of `loss(model(x), y)`."""
    return curvlinops_ggn(model, loss, params, x, y).diagonal()


def curvlinops_ggn(model, loss, params, x, y):
    """[coordinates, coordinates]: curvlinops' Gauss-Newton matrix of `loss(model(x), y)`, column by column."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from curvlinops import GGNLinearOperator

        operator = GGNLinearOperator(model, loss, params, [(x, y)], check_deterministic=False)
        return operator @ torch.eye(operator.shape[1], dtype=params[0].dtype)


def rotated_diagonal(matrix, param, params, left, right):
    """diag(Qᵀ H Q) with Q = Q_L ⊗ Q_R of `param`'s block of a curvature `matrix` over `params`, in its shape."""
    start = sum(p.numel() for p in params[: [p is param for p in params].index(True)])
    block = matrix[start : start + param.numel(), start : start + param.numel()]
    q = torch.kron(left, right).to(block.dtype)
    return (q.T @ block @ q).diagonal().reshape(param.shape)


def backpack_ggn_diagonal(model, terms, count):
    """Diagonal from BackPACK's DiagGGNExact: Σ over terms / count, in the order of `model.parameters()`.

    `terms(model)` lists (layers, x, y, summed loss module): plain chains of layers that share parameters of `model`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from backpack import backpack, extend
        from backpack.extensions import DiagGGNExact

        model = copy.deepcopy(model)
        total = {p: torch.zeros_like(p) for p in model.parameters()}
        for layers, x, y, loss in terms(model):
            chain, loss = extend(nn.Sequential(*layers)), extend(loss)
            with backpack(DiagGGNExact()):
                loss(chain(x), y).backward()
            for p in chain.parameters():
                total[p] += p.diag_ggn_exact
        return flat(total.values()) / count


def softmax_ggn_diagonal(logits_of, params):
    """Gauss-Newton diagonal of the mean cross-entropy over all rows of logits_of() [..., classes], an explicit loop."""
    logits = logits_of().flatten(0, -2)
    total = [torch.zeros_like(p) for p in params]
    for row in logits:
        p = row.softmax(-1).detach()
        columns = [torch.autograd.grad(row[c], params, retain_graph=True) for c in range(len(p))]
        for i, _ in enumerate(params):
            j = torch.stack([column[i] for column in columns])
            total[i] += torch.einsum("c...,cd,d...->...", j, torch.diag(p) - torch.outer(p, p), j)
    return flat(total) / len(logits)


def hessian(model, loss, params):
    """[coordinates, coordinates]: the Hessian of `loss(model)` in `params`, from torch.func."""
    names = {p: n for n, p in model.named_parameters()}
    others = {n: p.detach() for n, p in model.named_parameters()}

    def of_flat(vector):
        parts = vector.split([p.numel() for p in params])
        own = {names[p]: part.view(p.shape) for p, part in zip(params, parts, strict=True)}
        return loss(lambda *a, **k: torch.func.functional_call(model, {**others, **own}, a, k))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.func.hessian(of_flat)(flat(params))


def hutchinson_variance(unit_hessians, weights, probe, probes):
    """[coordinates]: the exact variance of Σ_u w_u mean_v(v ⊙ H_u v) with independent probes for every unit."""
    total = 0
    for h, weight in zip(unit_hessians, weights, strict=True):
        diagonal = h.diagonal().square()
        variance = h.square().sum(1) - diagonal + (2 * diagonal if probe == "gaussian" else 0)
        total = total + weight**2 * variance / probes
    return total
