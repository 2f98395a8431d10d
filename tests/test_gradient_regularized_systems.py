"""Gradient-regularized Newton: its linear systems and the matrices of a batch."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from optimizers import Objective, OracleError
from optimizers.linalg.shifted import DenseShifted, KrylovShifted, Metric
from optimizers.second_order import GradientRegularizedNewton
from optimizers.second_order.matrices import gauss_newton, sample_gradients
from tests.convex import Newton, logistic, random
from tests.newton import EPS, D, gradient, hessian, quadratic

# ------------------------------------------------------------------ the systems


def spd(n, condition, seed=0):
    return quadratic(np.geomspace(1 / condition, 1, n), seed)[1]


@pytest.mark.parametrize("form", [None, "diagonal", "dense"])
@pytest.mark.parametrize("condition", [1e3, 1e12])
def test_dense_systems_are_solved_backward_stably(form, condition):
    """Cholesky: |residual| <= c n eps (|A| |d| + |g|), so the error is at most that times cond."""
    n = 20
    H, g = spd(n, condition), random(n, seed=1)
    B = {None: None, "diagonal": spd(n, 10.0, 2).diagonal(), "dense": spd(n, 10.0, 2)}[form]
    whole = torch.eye(n, dtype=D) if B is None else B.diag() if B.ndim == 1 else B
    shift = 1 / condition
    metric = Metric(B)
    d = DenseShifted(H, g, metric).solve(shift)
    A = H + shift * whole
    residual = A @ d + g
    assert float(residual.norm()) <= n * EPS * (2 * float(d.norm()) + float(g.norm()))
    exact = torch.linalg.solve(A, -g)
    assert float((d - exact).norm()) <= n * EPS * condition * float(exact.norm())
    assert metric.dual_norm(g) == pytest.approx(float((g @ torch.linalg.solve(whole, g)).sqrt()))


@pytest.mark.parametrize("form", [None, "diagonal"])
@pytest.mark.parametrize(
    ("dtype", "condition", "shift"),
    [(D, 1e3, 1e-3), (D, 1e12, 1e-6), (D, 1e12, 1e-12), (torch.float32, 1e6, 1e-3)],
)
def test_krylov_systems_leave_the_residual_that_was_asked_for(form, dtype, condition, shift):
    n = 40
    H, g = spd(n, condition).to(dtype), random(n, seed=1).to(dtype)
    B = None if form is None else spd(n, 10.0, 2).diagonal().to(dtype)
    calls = 0

    def product(v):
        nonlocal calls
        calls += 1
        return H @ v

    metric = Metric(B)
    systems = KrylovShifted(product, g, metric, n, 1e-8)
    d = systems.solve(shift)
    made = calls
    assert systems.dimension == made <= n
    whole = torch.eye(n, dtype=D) if B is None else B.double().diag()
    for factor in (1.0, 2.0, 64.0, 1e6):
        d = systems.solve(factor * shift).double()
        residual = (H.double() + factor * shift * whole) @ d + g.double()
        # The space of the first shift serves all larger ones; it may end at 1e-10 |H| |d|.
        size, length = metric.dual_norm(g), float(d.norm())
        rounding = n * torch.finfo(dtype).eps * ((3 + 10 * factor * shift) * length + size)
        error = float(metric.whiten(residual.to(dtype)).norm())
        assert error <= 1e-8 * size + rounding + 1e-10 * length
    assert calls == made
    systems.solve(shift / 8)  # a smaller one needs another space
    assert calls > made or condition > 1e6 or dtype != D


def test_indefinite_systems_have_no_solution():
    _, H = quadratic([-1.0, 2.0, 3.0], 3)
    g = torch.ones(3, dtype=D)
    for systems in (
        DenseShifted(H, g, Metric(None)),
        KrylovShifted(lambda v: H @ v, g, Metric(None), 3, 1e-12),
    ):
        assert systems.solve(0.999) is None
        d = systems.solve(1.001)
        A = H + 1.001 * torch.eye(3, dtype=D)
        torch.testing.assert_close(A @ d, -g, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("max_dim", [512, 1])
def test_a_singular_hessian_leaves_its_null_space_alone(max_dim):
    f, H = quadratic([0.0, 0.0, 1e-3, 1.0, 10.0], 5)
    run = Newton(f, (1.0, 2.0, 3.0, 4.0, 5.0), max_dim=max_dim)
    null = torch.linalg.eigh(H)[1][:, :2]
    start, allowed = null.T @ run.w, 0.0
    while run.value() > 1e-12:
        x, size = run.w, float(gradient(f, run.w).norm())
        run.step()
        # The rounding of the gradient, n eps |H| |x|, is divided by lambda there.
        allowed += 5 * EPS * 10 * float(x.norm()) * run.found["last_gamma"] / size
    assert allowed < 1e-4
    assert float((null.T @ run.w - start).norm()) < allowed


def test_the_matrix_free_form_takes_the_steps_of_the_dense_one():
    f, _ = logistic(40, 9, 2)
    for metric in (None, torch.linspace(0.5, 2, 9, dtype=D)):
        options = {"metric": metric, "gamma0": 50.0}
        dense = Newton(f, random(9, seed=3), 2, **options)
        free = Newton(f, random(9, seed=3), 2, max_dim=1, **options)
        rejected = 0
        for _ in range(9):
            dense.step(), free.step()
            # Residuals of 1e-10 at condition numbers up to 1e3.
            torch.testing.assert_close(free.w, dense.w, rtol=1e-7, atol=1e-7)
            assert free.found["gamma"] == dense.found["gamma"]
            rejected += dense.found["last_trials"] > 1
        assert rejected


def test_a_further_trial_costs_no_product():
    model = nn.Linear(6, 3).double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(random(*p.shape, seed=k))
    x, y = 3 * random(30, 6, seed=4), torch.arange(30) % 3
    objective = Objective(model, functional.cross_entropy).on(x, y)
    found = {}
    for gamma0 in (0.25, 64.0):
        twin = copy.deepcopy(model)
        ask = Objective(twin, functional.cross_entropy).on(x, y)
        optimizer = GradientRegularizedNewton(
            twin.parameters(), max_dim=1, gamma0=gamma0, krylov_tol=0.0, krylov_dim=8
        )
        optimizer.step(ask)
        trials = optimizer.param_groups[0]["last_trials"]
        counts = ask.counts.as_dict()
        assert counts["hvp"] == 8
        assert counts["gradient"] == 1 + trials
        assert counts["loss"] == 0
        found[gamma0] = trials
    assert found[0.25] == 1
    assert found[64.0] >= 4
    assert objective.counts.gradient == 0


# ------------------------------------------------------------------ the matrices of a batch


def network(seed=0):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(random(*p.shape, seed=seed + k))
    return model


LOSSES = {
    "cross_entropy": (functional.cross_entropy, lambda b: torch.arange(b) % 2),
    "mse": (functional.mse_loss, lambda b: random(b, 2, seed=9)),
    "quartic": (lambda f, y: ((f - y) ** 4).sum(1).mean(), lambda b: random(b, 2, seed=9)),
    "linear": (lambda f, y: (f * y).mean(), lambda b: random(b, 2, seed=9)),
}


def flat(tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("batch", [1, 5, 40])  # fewer outputs than the 26 parameters, and more
def test_gauss_newton_and_fisher_matrices_are_the_dense_ones(loss, batch):
    model, (loss_fn, targets) = network(), LOSSES[loss]
    x, y = random(batch, 3, seed=8), targets(batch)
    objective = Objective(model, loss_fn).on(x, y)
    params = list(model.parameters())
    f = model(x)
    J = torch.stack([flat(torch.autograd.grad(e, params, retain_graph=True)) for e in f.flatten()])
    out = torch.autograd.functional.hessian(lambda f: loss_fn(f, y), f.detach())
    expected = J.T @ out.reshape(f.numel(), -1) @ J
    # Sums over the batch of products of order ten.
    torch.testing.assert_close(gauss_newton(objective, params), expected, rtol=1e-11, atol=1e-11)
    counts = objective.counts.as_dict()
    passes = (counts["vjp"], counts["ggn"])
    assert passes == ((0, 26) if batch == 40 else (2 * batch, 0))  # the fewer of the two
    each = [torch.autograd.grad(loss_fn(model(x[i : i + 1]), y[i : i + 1]), params)
            for i in range(batch)]  # fmt: skip
    G = torch.stack([flat(g) for g in each])
    mean = torch.autograd.grad(loss_fn(model(x), y), params)
    found = sample_gradients(objective, params, mean, "Rule")
    found = torch.cat([part.reshape(batch, -1) for part in found], 1)
    torch.testing.assert_close(found, G, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
@pytest.mark.parametrize("max_dim", [512, 1])
def test_the_steps_use_these_matrices(kind, max_dim):
    model, (loss_fn, targets) = network(3), LOSSES["cross_entropy"]
    x, y = random(12, 3, seed=8), targets(12)
    params = list(model.parameters())
    params[1].requires_grad_(False)
    mine = [params[0], *params[2:]]
    g = torch.autograd.grad(loss_fn(model(x), y), mine)
    objective = Objective(model, loss_fn).on(x, y)
    if kind == "ggn":
        H = gauss_newton(objective, mine)
    else:
        parts = [p.reshape(12, -1) for p in sample_gradients(objective, mine, g, "Rule")]
        H = torch.cat(parts, 1).T @ torch.cat(parts, 1) / 12
    before, g = flat([p.detach() for p in mine]), flat(g)
    optimizer = GradientRegularizedNewton(params, hessian=kind, max_dim=max_dim, adaptive=False)
    optimizer.step(objective)
    A = H + g.norm() * torch.eye(len(g), dtype=D)
    step = flat([p.detach() for p in mine]) - before
    torch.testing.assert_close(step, -torch.linalg.solve(A, g), rtol=1e-8, atol=1e-9)
    assert all(p.grad is None for p in params)


class Mixing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


BATCHES = {
    "closure": (None, functional.mse_loss, "ggn", r"objective.on\(inputs, targets\)"),
    "closure of fisher": (None, functional.mse_loss, "fisher", r"objective.on\(inputs, targets\)"),
    "a sum": (nn.Linear(3, 2), lambda f, y: ((f - y) ** 2).sum(), "fisher", "mean over samples"),
    "mixing": (Mixing(3, 2), functional.mse_loss, "fisher", "mean over samples"),
    "dropout": (
        nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)),
        functional.mse_loss,
        "fisher",
        r"model.eval\(\)",
    ),
    "no tensor": (nn.Linear(3, 2), lambda f, y: ((f - y[0]) ** 2).mean(), "fisher", "one tensor"),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_without_such_a_matrix_are_refused(case):
    model, loss_fn, kind, message = BATCHES[case]
    x, y = random(6, 3, seed=1), random(6, 2, seed=2)
    plain = model is None
    model = (nn.Linear(3, 2) if plain else model).double()
    optimizer = GradientRegularizedNewton(model.parameters(), hessian=kind)
    start, state = flat(model.parameters()).detach().clone(), str(optimizer.state_dict())
    ask = (
        (lambda: loss_fn(model(x), y))
        if plain
        else Objective(model, loss_fn).on(x, (y,) if case == "no tensor" else y)
    )
    with pytest.raises(OracleError, match=message):
        optimizer.step(ask)
    assert torch.equal(flat(model.parameters()).detach(), start)
    assert str(optimizer.state_dict()) == state


def test_a_function_may_return_a_matrix_or_multiply_by_it():
    f, _ = logistic(30, 6, 5)
    start, matrix = random(6, seed=1), lambda x: hessian(f, x)
    runs = [
        Newton(f, start, 2),
        Newton(f, start, 2, hessian=matrix),
        Newton(f, start, 2, hessian=matrix, max_dim=1),  # it has been formed already
        Newton(f, start, 2, hessian=lambda x: lambda v: hessian(f, x) @ v),
    ]
    for _ in range(6):
        for run in runs:
            run.step()
        for run in runs[1:]:
            torch.testing.assert_close(run.w, runs[0].w, rtol=1e-7, atol=1e-8)
    wrong = Newton(f, start, hessian=lambda x: torch.ones(6, 5, dtype=D))
    with pytest.raises(ValueError, match=r"hessian must return a matrix \(6, 6\)"):
        wrong.step()
    endless = Newton(f, start, hessian=lambda x: torch.full((6, 6), math.inf, dtype=D))
    with pytest.raises(OracleError, match="finite Hessian"):
        endless.step()
